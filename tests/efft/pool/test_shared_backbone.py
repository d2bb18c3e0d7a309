"""Test ``efft.SharedBackbone``, which trains several models together.

Each model must end with the same weights as if it were trained alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efft
from efft import methods
from efft.config import AdapterConfig
from efft_kernels import Backend, can_run, use_backend
from efft_kernels.testing import assert_close_budget

Make = Callable[..., nn.Module]
STEPS = 4

CONFIGS: dict[str, list[AdapterConfig]] = {
    "efft2": [efft.EfftConfig(rank=4, scale=scale) for scale in (0.5, 1.0, 4.0)],
    "ranks": [efft.EfftConfig(rank=rank) for rank in (2, 5, (3, 4))],
    "biases and norms": [efft.EfftConfig(rank=4, bias="all", norms=True, layer_scale="both")] * 3,
    "adapted biases": [efft.EfftConfig(rank=4, bias="adapted", trainable_scale="matrix")] * 3,
    "attention": [efft.EfftConfig(rank=4, targets="mhsa")] * 3,
    "methods": [efft.EfftConfig(rank=4), methods.LoRAConfig(rank=3), methods.FacTTKConfig(rank=4)],
}
RATES = {"a": 1e-2, "b": 3e-3, "c": 3e-2}
CLASSES = {"a": 5, "b": 3, "c": 7}


@pytest.fixture
def member(tiny_vit: Make) -> Make:
    """Return a function that creates models with the same base, but each with its own seed and number of classes."""

    def make(name: str, config: AdapterConfig | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        model: Any = tiny_vit().to(dtype)
        torch.manual_seed(ord(name))
        model.head = nn.Linear(16, CLASSES[name], dtype=dtype)
        return efft.apply(model, config or efft.EfftConfig(rank=4)).train()

    return make


def data(name: str, step: int, dtype: torch.dtype, n: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + ord(name))
    images = torch.randn(n, 3, 16, 16, generator=generator).to(dtype)
    return images, torch.randint(CLASSES[name], (n,), generator=generator)


def seed_of(name: str) -> int:
    return 7 + ord(name)


def train_alone(model: nn.Module, name: str, dtype: torch.dtype, sizes: Callable[[str, int], int]) -> None:
    torch.manual_seed(seed_of(name))
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, RATES[name], weight_decay=0.01))
    for step in range(STEPS):
        images, labels = data(name, step, dtype, sizes(name, step))
        if len(images):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()


def train_together(models: dict[str, nn.Module], dtype: torch.dtype, sizes: Callable[[str, int], int]) -> Any:
    shared = efft.SharedBackbone(models, seeds={name: seed_of(name) for name in models})
    groups = shared.parameter_groups({name: RATES[name] for name in models}, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for step in range(STEPS):
        batches = {name: data(name, step, dtype, sizes(name, step)) for name in models}
        batches = {name: batch for name, batch in batches.items() if len(batch[0])}
        outputs = shared({name: images for name, (images, _) in batches.items()})
        torch.stack([F.cross_entropy(outputs[name], labels) for name, (_, labels) in batches.items()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(torch.get_rng_state(), before), "training must not draw from torch's common generator"
    return shared


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def always_four(name: str, step: int) -> int:
    return 4


def uneven(name: str, step: int) -> int:
    """Return a batch size that depends on the model and the step. With size 0, the model skips the step."""
    return {"a": 4, "b": 1 + step, "c": 0 if step % 2 else 3}[name]


@pytest.fixture(params=[Backend.EAGER, Backend.CPU], ids=lambda b: b.value)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if (reason := can_run(request.param, torch.empty(1))) is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("sizes", [always_four, uneven])
@pytest.mark.parametrize("config", CONFIGS)
def test_each_model_ends_as_alone_in_fp64(
    config: str, sizes: Callable[[str, int], int], member: Make, tiny_vit: Make
) -> None:
    """The weights agree up to rounding, although the models differ in seed, task, learning rate and settings."""
    configs = dict(zip("abc", CONFIGS[config], strict=True))
    alone = {name: member(name, configs[name], torch.float64) for name in "abc"}
    together = {name: member(name, configs[name], torch.float64) for name in "abc"}
    with use_backend(Backend.EAGER):
        for name, model in alone.items():
            train_alone(model, name, torch.float64, sizes)
        train_together(together, torch.float64, sizes)
    start = {name: trained(member(name, configs[name], torch.float64)) for name in "abc"}
    for name in "abc":
        got, expected = trained(together[name]), trained(alone[name])
        assert got.keys() == expected.keys()
        for parameter, value in got.items():
            torch.testing.assert_close(value, expected[parameter], rtol=1e-8, atol=1e-10, msg=f"{name} {parameter}")
        assert sum(not torch.equal(value, start[name][p]) for p, value in got.items()) > 3


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_each_model_ends_as_alone_in_fp32(backend: Backend, dropout: float, member: Make) -> None:
    """The error against a run in fp64 is at most twice that of the model that is trained alone."""
    config = efft.EfftConfig(rank=4, dropout=dropout, bias="adapted")
    ends: dict[torch.dtype, dict[str, dict[str, Tensor]]] = {}
    for dtype in (torch.float64, torch.float32):
        models = {name: member(name, config, dtype) for name in "abc"}
        with use_backend(Backend.EAGER if dtype == torch.float64 else backend):
            for name, model in models.items():
                train_alone(model, name, dtype, always_four)
        ends[dtype] = {name: trained(model) for name, model in models.items()}
    together = {name: member(name, config) for name in "abc"}
    train_together(together, torch.float32, always_four)
    equal = 0
    for name in "abc":
        mine, exact, alone = (
            torch.cat([t.flatten() for t in end.values()])
            for end in (trained(together[name]), ends[torch.float64][name], ends[torch.float32][name])
        )
        assert_close_budget(mine, exact, alone, name=name)
        equal += torch.equal(mine, alone)
    print(f"{backend.value}: {equal} of 3 models are exactly equal")


def test_windows_and_stages(tiny_swin: Make, randomize: Make) -> None:
    config = efft.EfftConfig(rank={"mhsa": 2, "ffn": (2, 4)}, norms=True, dropout=0.0)
    models = {name: randomize(efft.apply(tiny_swin().double(), config), 0.2, ord(name)) for name in "ab"}
    alone = copy.deepcopy(models)
    shared = efft.SharedBackbone(models)
    x = {name: torch.randn(n, 3, 32, 32, dtype=torch.float64) for name, n in (("a", 3), ("b", 2))}
    outputs = shared(x)
    sum(y.square().sum() for y in outputs.values()).backward()
    for name in "ab":
        expected = alone[name](x[name])
        torch.testing.assert_close(outputs[name], expected)
        expected.square().sum().backward()
        for (key, got), (_, want) in zip(models[name].named_parameters(), alone[name].named_parameters(), strict=True):
            if want.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, msg=f"{name} {key}")


def test_models_remain_models(member: Make, images: Tensor, tmp_path: Path, tiny_vit: Make) -> None:
    """The models share the memory of the frozen weights, can be called, saved and loaded, and cannot be merged."""
    shared = efft.SharedBackbone((name, member(name)) for name in "abc")
    a, b = (shared.models[name] for name in "ab")
    assert a.blocks[0].attn.qkv.weight is b.blocks[0].attn.qkv.weight is shared.backbone.blocks[0].attn.qkv.weight
    assert a.head.weight is not b.head.weight
    once = {p.data_ptr(): p.numel() for p in shared.parameters()}
    frozen = sum(p.numel() for p in a.parameters() if not p.requires_grad)
    own = sum(p.numel() for m in shared.models.values() for p in m.parameters() if p.requires_grad)
    assert sum(once.values()) == frozen + own
    shared.eval()
    with torch.no_grad():
        outputs = shared({"c": images, "a": images[:2]})
        for name, x in (("c", images), ("a", images[:2])):
            torch.testing.assert_close(outputs[name], shared.models[name](x), rtol=1e-5, atol=1e-5)
    efft.save_adapter(b, tmp_path / "b")
    loaded: Any = tiny_vit()
    loaded.head = nn.Linear(16, CLASSES["b"])
    efft.load_adapter(loaded, tmp_path / "b")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), b(images))
    with pytest.raises(ValueError, match=r"belong to an efft\.SharedBackbone, and merging would change them"):
        efft.merge(b)
    own = copy.deepcopy(b)
    efft.merge(own)
    with torch.no_grad():
        torch.testing.assert_close(own(images), b(images), rtol=1e-4, atol=1e-5)
    assert efft.merged_state_dict(b)["blocks.0.attn.qkv.weight"].shape == (48, 16)
    assert [group["name"] for group in shared.parameter_groups(1e-3)][:3] == ["a/factors", "a/head", "b/factors"]


def test_removing_a_model_restores_its_base(member: Make, images: Tensor, tiny_vit: Make) -> None:
    config = efft.EfftConfig(rank=4, bias="adapted", head=[])
    models = {name: efft.apply(tiny_vit(), config) for name in "ab"}
    base = tiny_vit().eval()
    shared = efft.SharedBackbone(models)
    optimizer = torch.optim.SGD(shared.parameter_groups(0.1))
    sum(y.sum() for y in shared({"a": images, "b": images}).values()).backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(efft.remove(models["b"]).eval()(images), base(images))


def test_keyword_arguments_and_structured_outputs() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )

    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
        torch.manual_seed(ord(name))
        efft.apply(model, efft.EfftConfig(rank=4))
        for _, factor in efft.named_factors(model):
            nn.init.normal_(factor, std=0.2)
        return model

    shared = efft.SharedBackbone({name: make(name) for name in "ab"})
    ids = {name: torch.randint(40, (n, 6)) for name, n in (("a", 2), ("b", 3))}
    batches = {name: {"input_ids": x, "attention_mask": torch.ones_like(x)} for name, x in ids.items()}
    outputs = shared(batches)
    for name, batch in batches.items():
        expected = shared.models[name](**batch)
        torch.testing.assert_close(outputs[name].logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu(member: Make, images: Tensor) -> None:
    """Dropout masks and gradients equal those of each model alone. A pass in eval mode must not wait for the GPU."""
    config, x = efft.EfftConfig(rank=4, dropout=0.2, bias="adapted"), images.cuda()
    alone = {name: member(name, config).cuda() for name in "ab"}
    shared = efft.SharedBackbone({name: member(name, config).cuda() for name in "ab"}, seeds={"a": 3, "b": 4})
    outputs = shared({"a": x, "b": x[:2]})
    sum(y.square().sum() for y in outputs.values()).backward()
    for name, seed, own in (("a", 3, x), ("b", 4, x[:2])):
        torch.manual_seed(seed)
        expected = alone[name](own)
        torch.testing.assert_close(outputs[name], expected, rtol=1e-3, atol=1e-3)
        expected.square().sum().backward()
        for got, want in zip(shared.models[name].parameters(), alone[name].parameters(), strict=True):
            if want.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-2, atol=1e-3)
    shared.eval()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            shared({"a": x, "b": x})
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(models: Any, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        efft.SharedBackbone(models, **options)


def test_models_that_do_not_fit_together(member: Make, tiny_vit: Make) -> None:
    refused({}, "expected at least one model")
    refused({"a": tiny_vit()}, "is not adapted")
    refused([("a", member("a")), ("a", member("b"))], "expected a name of its own for each model, got 'a'")
    refused({"a": member("a")}, r"expected a seed for each of \['a'\], got \['b'\]", seeds={"b": 1})
    attention = efft.EfftConfig(rank=4, targets="mhsa")
    refused({"a": member("a"), "b": member("b", attention)}, "the same layers in all models, but 'blocks.0.mlp")
    norms = efft.EfftConfig(rank=4, norms=True)
    refused({"a": member("a"), "b": member("b", norms)}, "expected the same trained biases and norms in all models")
    other = member("b")
    with torch.no_grad():
        other.blocks[1].attn.qkv.weight[3, 4] += 1
    refused({"a": member("a"), "b": other}, r"blocks\.1\.attn\.qkv\.weight' differs from the first model's")
    merged = member("a")
    efft.merge(merged)
    refused({"a": merged}, "its update is merged or switched off")
    stray = member("a")
    stray.cls_token.requires_grad_(True)
    refused({"a": stray}, "'cls_token' is trained in addition to factors, head, biases and norms")


def test_other_kinds_of_weights_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 8, 8))
    efft.apply(model, efft.EfftConfig(rank=2, targets=["0", "2"], head=["4"]))
    refused({"a": model}, "but '0' is EfftConv2d")


def test_batches_that_do_not_fit(member: Make, images: Tensor) -> None:
    shared = efft.SharedBackbone({name: member(name) for name in "ab"})
    for batches, message in (
        ({}, r"expected batches for some of \['a', 'b'\], got \[\]"),
        ({"d": images}, r"got \['d'\]"),
        ({"a": images, "b": (images, images)}, "in the same arguments for all models"),
        ({"a": images, "b": images[..., :8]}, "expected inputs that differ only in the number of samples"),
        ({"a": images[:0], "b": images}, "expected tensors with one number of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            shared(batches)
    shared.models["a"].eval()
    with pytest.raises(ValueError, match="all models in training mode or all in evaluation mode, got both"):
        shared({"a": images, "b": images})
    shared.train()
    with efft.disabled(shared.models["b"]), pytest.raises(ValueError, match="model 'b': its update is merged or swi"):
        shared({"a": images, "b": images})


class Contrasts(nn.Module):
    """Returns the similarities of all samples of the batch, as CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"features": x, "similarities": x @ x.t()}


def test_outputs_that_compare_samples_are_refused() -> None:
    """The similarities of samples of different models have no meaning, and a model alone would not return them."""
    models = {}
    for name in "ab":
        torch.manual_seed(0)
        models[name] = efft.apply(Contrasts(), efft.EfftConfig(rank=2, head=[]))
    shared = efft.SharedBackbone(models)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"an output of shape \[4, 4\] compares the samples of the batch"):
            shared({name: torch.randn(2, 6) for name in "ab"})


class ReadsItsNorm(nn.Module):
    def __init__(self, reads: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm, self.reads = nn.LayerNorm(6), reads

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.reads == "eps":
            return self.norm(x) * self.norm.eps
        return F.layer_norm(x, self.norm.normalized_shape, self.norm.weight)


def test_a_trained_norm_that_is_read_directly() -> None:
    """Settings can be read. Parameters cannot, because they differ between the models."""
    config = efft.EfftConfig(rank=2, head=[], norms=True)
    for reads in ("eps", "weight"):
        torch.manual_seed(0)
        first = efft.apply(ReadsItsNorm(reads), config)
        second = copy.deepcopy(first)
        nn.init.normal_(second.norm.weight)
        batches = {"a": torch.randn(2, 6), "b": torch.randn(3, 6)}
        expected = {"a": first(batches["a"]), "b": second(batches["b"])}
        shared = efft.SharedBackbone({"a": first, "b": second})
        if reads == "eps":
            torch.testing.assert_close(shared(batches), expected)
            continue
        with pytest.raises(RuntimeError, match="'weight' of a LayerNorm is read directly by the module around it"):
            shared(batches)


def test_random_numbers_of_the_backbone_are_refused_with_seeds(tiny_vit: Make, images: Tensor) -> None:
    models = {name: efft.apply(tiny_vit(drop_path_rate=0.5), efft.EfftConfig(rank=4)) for name in "ab"}
    shared = efft.SharedBackbone(copy.deepcopy(models), seeds={"a": 1, "b": 2})
    with pytest.raises(RuntimeError, match=r"a frozen module, probably 'blocks\.1\.drop_path1', draws random numbers"):
        shared({"a": images, "b": images})
    shared.eval()
    shared({"a": images, "b": images})
    efft.SharedBackbone(models).train()({"a": images, "b": images})


def test_statistics_of_all_models_are_refused(images: Tensor) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)
        return efft.apply(nn.Sequential(*layers), efft.EfftConfig(rank=2, targets=["1", "3"], head=["4"])).train()

    shared = efft.SharedBackbone({"a": make(), "b": make()})
    with pytest.raises(ValueError, match="2' updates its buffers in training, with the samples of all models"):
        shared({"a": images, "b": images})
    shared.eval()({"a": images, "b": images})


def test_checkpointing_is_refused(member: Make, images: Tensor) -> None:
    models = {name: member(name) for name in "ab"}
    for model in models.values():
        model.set_grad_checkpointing()
    shared = efft.SharedBackbone(models)
    outputs = shared({"a": images, "b": images})
    with pytest.raises(RuntimeError, match="Activation checkpointing does this in the backward pass"):
        sum(y.sum() for y in outputs.values()).backward()


def test_layers_that_compute_more_than_an_update_are_refused(member: Make) -> None:
    """The adapter of LoRETTA applies a nonlinearity after the layer, which the shared pass would leave out."""
    config = methods.LoRETTAAdpConfig(targets=["attn.proj"])
    with pytest.raises(ValueError, match="an adapter with a nonlinearity is not an update of a weight"):
        efft.SharedBackbone({name: member(name, config) for name in "ab"})
