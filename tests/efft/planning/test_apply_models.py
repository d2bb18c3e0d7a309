"""Test ``efft.apply`` on models of unusual structure.

The tests cover layers that are selected by name, models of transformers, nested models, layers that a model does not
call, and layers with hooks or replaced forwards.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels import EfftLinear

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]


class MLP(nn.Module):
    """Apply hidden layers of equal size, with unusual names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        out: Tensor = self.fc(x)
        return out


def test_layers_by_name_in_any_model(randomize: Make) -> None:
    torch.manual_seed(0)
    model, x = MLP().double(), torch.randn(5, 6, dtype=torch.float64)
    base = copy.deepcopy(model)
    efft.apply(model, efft.EfftConfig(rank=3, targets=["stem", r"layers\.\d"], scale=0.5))
    assert torch.equal(model(x), base(x))
    assert list(model.efft) == ["linear_6x12", "linear_12x12"]
    assert model.efft["linear_12x12"].C.shape == (3, 1, 3, 3)
    assert model.efft.head == ["fc"]
    randomize(model).eval()
    with torch.no_grad():
        bank = model.efft["linear_12x12"]
        for i, layer in enumerate(base.layers):
            layer.weight += 0.5 * (bank.U @ bank.C[i, 0] @ bank.V).t()
        bank = model.efft["linear_6x12"]
        base.stem.weight += 0.5 * (bank.U @ bank.C[0, 0] @ bank.V).t()
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)


HF: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "vit": ("ViT", {"hidden_size": 16, "image_size": 16, "patch_size": 8}, [r".*\.[qkvo]_proj", "fc1", "fc2"]),
    "bert": ("Bert", {"hidden_size": 16, "vocab_size": 50}, ["query", "value", r".*\.layer\.\d+\..*dense"]),
    "swin": (
        "Swin",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 2},
        ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    ),
    "dinov2": ("Dinov2", {"hidden_size": 16, "image_size": 16, "patch_size": 8, "mlp_ratio": 2}, ["q_proj", "fc2"]),
}


def hugging_face(name: str) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """Return a tiny random model of transformers, its inputs and the layers to adapt."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    family, sizes, targets = HF[name]
    if name != "swin":
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, **sizes}
        if name == "dinov2":
            del sizes["intermediate_size"]
    task = "SequenceClassification" if name == "bert" else "ImageClassification"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(num_labels=5, **sizes)
    model: nn.Module = getattr(transformers, f"{family}For{task}")(config).eval()
    if name == "bert":
        return model, {"input_ids": torch.arange(14).view(2, 7)}, targets
    return model, {"pixel_values": torch.randn(2, 3, sizes["image_size"], sizes["image_size"])}, targets


@pytest.mark.parametrize("name", HF)
def test_transformers_models_by_name(name: str, unchanged: Unchanged) -> None:
    model, inputs, targets = hugging_face(name)
    with unchanged(model):
        base = model(**inputs).logits
        efft.apply(model, efft.EfftConfig(rank=2, targets=targets))
        assert model.efft.head == ["classifier"]
        # Not exactly equal, because nn.Linear does not use addmm for the strided windows of Swin.
        torch.testing.assert_close(model(**inputs).logits, base, rtol=1e-6, atol=1e-8)
        efft.remove(model)

    efft.apply(model, efft.EfftConfig(rank=2, targets=targets)).train()
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=0.05))
    losses = []
    for _ in range(8):
        output = model(**inputs, labels=torch.tensor([1, 3]))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert all(p.grad is not None and p.grad.any() for _, p in efft.named_factors(model))
    assert losses[-1] < 0.7 * losses[0]


class Wrapper(nn.Module):
    """Hold a backbone without a classifier inside a bigger model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(x))
        return out


def test_model_inside_a_bigger_one(tiny_vit: Make, images: Tensor, unchanged: Unchanged, randomize: Make) -> None:
    model = Wrapper(tiny_vit(num_classes=0)).eval()
    with unchanged(model):
        base = model(images)
        efft.apply(model, efft.EfftConfig(rank=4))
        assert torch.equal(model(images), base)
        assert model.efft.layers[0] == "net.blocks.0.attn.qkv"
        assert model.efft.head == ["head"]
        efft.remove(model)
    randomize(efft.apply(model, efft.EfftConfig(rank=4)))
    whole = model(images)
    assert not torch.allclose(whole, base, atol=1e-2)
    torch.testing.assert_close(model.head(model.net(images)), whole, msg="the inner model called alone")


# --- layers that are not called --------------------------------------------------------------------------------------


class TorchEncoder(nn.Module):
    """Hold torch's own encoder. In eval mode, its fast path reads the weights and does not call the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x.flatten(2)[..., :16]))
        return out


@pytest.mark.parametrize("name", ["beit", "swinv2"])
def test_attention_that_reads_its_weight(name: str) -> None:
    """timm's BEiT and Swin v2 do not call qkv, but read its weight. This weight must include the update."""
    models = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'").models
    if name == "beit":
        model = models.beit.Beit(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()
        x, layer = torch.randn(2, 3, 16, 16), "blocks.0.attn.qkv"
    else:
        model = models.SwinTransformerV2(
            img_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=2, num_classes=3
        ).eval()
        x, layer = torch.randn(2, 3, 32, 32), "layers.0.blocks.0.attn.qkv"
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.ones_(norm.weight)  # some norms start at zero and would block all signals
    model, x = model.double(), x.double()
    base = model(x)
    efft.apply(model, efft.EfftConfig(rank=2, targets=["qkv"]))
    assert layer in efft.adapted_layers(model)
    torch.testing.assert_close(model(x), base)
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor)
    live, features = model(x), model.forward_features(x)
    efft.merge(model)
    assert not torch.allclose(live, base)
    torch.testing.assert_close(live, model(x))
    torch.testing.assert_close(features, model.forward_features(x))


class Part(nn.Module):
    """Run only some blocks of a ViT, as LayerDrop does."""

    def __init__(self, vit: nn.Module, *blocks: int) -> None:
        super().__init__()
        self.vit, self.blocks = vit, blocks

    def forward(self, x: Tensor) -> Tensor:
        x = self.vit.patch_embed(x)
        for i in self.blocks:
            x = self.vit.blocks[i](x)
        return x


def test_blocks_that_do_not_run_are_no_fault(tiny_vit: Make, images: Tensor) -> None:
    model = efft.apply(Part(tiny_vit(), 1), efft.EfftConfig(rank=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images).sum().backward()
    gradient = model.efft["mhsa"].C.grad
    assert gradient is not None
    assert not gradient[0].any(), "block 0 did not run, so its cores must have no gradient"


def test_layers_that_run_in_no_block_are_reported_once(tiny_vit: Make, images: Tensor) -> None:
    """A layer that runs in none of the blocks probably has no effect, so the first pass warns about it."""
    model = efft.apply(Part(tiny_vit()), efft.EfftConfig(rank=4))
    with pytest.warns(UserWarning, match=r"8 of 8 adapted layers did not run .*'vit\.blocks\.0\.attn\.qkv' first"):
        model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
        efft.apply(tiny_vit(), efft.EfftConfig(rank=4))(images)


def test_layer_drop_warns_of_nothing() -> None:
    """Wav2Vec2 randomly skips layers in training, which must not cause a warning."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 4}
    config = transformers.Wav2Vec2Config(
        **sizes, **convolutions, num_conv_pos_embedding_groups=2, layerdrop=0.2, apply_spec_augment=False
    )
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    efft.apply(model, efft.EfftConfig(rank=2, targets=[r"layers\.\d+\.feed_forward\..*"]))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            model.train()(torch.randn(2, 200))


@pytest.mark.parametrize("first", ["eval", "train"])
def test_fast_path_of_torchs_encoder(first: str) -> None:
    """Training calls the layers, and evaluation reads their weights. The update must take effect in both cases."""
    model, x = TorchEncoder(), torch.randn(2, 3, 4, 4)
    efft.apply(model, efft.EfftConfig(rank=4, targets=["linear1", "linear2"], head=[]))
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor)
    if first == "train":
        model.train()(x)
    with torch.no_grad():
        fast = model.eval()(x)
    called = model(x)
    efft.merge(model)
    torch.testing.assert_close(fast, called.detach())
    torch.testing.assert_close(called, model(x))


def test_all_of_a_half_known_architecture(tiny_vit: Make) -> None:
    """A timm ViT with unknown attention modules must be adapted completely."""
    model = tiny_vit()
    for block in model.blocks:
        block.attn = nn.Sequential(nn.Linear(16, 16))
    efft.apply(model, efft.EfftConfig(rank=2))
    assert [name for name in efft.adapted_layers(model) if name.startswith("blocks.1")] == [
        "blocks.1.attn.0",
        "blocks.1.mlp.fc1",
        "blocks.1.mlp.fc2",
    ]


# --- layers with hooks or other attributes ----------------------------------------------------------------------------


def test_forward_set_on_the_layer(tiny_vit: Make, images: Tensor) -> None:
    """Many profilers replace a layer's forward. The replacement must run, with a weight that includes the update."""
    model = tiny_vit().eval()
    layer = model.blocks[0].mlp.fc1
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    efft.apply(model, efft.EfftConfig(rank=4))
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor)
    live = model(images)
    efft.merge(model)
    torch.testing.assert_close(live, model(images))
    efft.remove(model)
    assert model.blocks[0].mlp.fc1 is layer


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_computed_weights_are_left_out_by_name(norm: Callable[[nn.Module], nn.Module], tiny_vit: Make) -> None:
    model = tiny_vit()
    norm(model.blocks[0].mlp.fc1)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp\.fc1' cannot .*(weight_norm|parametrization)"):
        efft.apply(model, efft.EfftConfig(rank=4, targets=["fc1"], exclude=["blocks.1.mlp.fc1"]))
    assert list(model.state_dict()) == names
    with pytest.warns(
        UserWarning, match=r"stay untouched: blocks\.\*\.mlp\.fc1\.weight \(1, .*(weight_norm|parametriz)"
    ):
        efft.apply(model, efft.EfftConfig(rank=4))


def test_hooks_on_adapted_layers_keep_firing(tiny_vit: Make, images: Tensor) -> None:
    """Hooks from before apply, and hooks on the adapted layer, must run until their handles remove them."""
    model = tiny_vit()
    calls: list[str] = []
    layer = model.blocks[0].mlp.fc1
    layer.note = "set by a user"
    pre = layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("post"))
    efft.apply(model, efft.EfftConfig(rank=4))
    adapted = model.blocks[0].mlp.fc1
    assert adapted is not layer
    assert adapted.note == "set by a user"
    model(images)
    adapted.register_full_backward_hook(lambda *_: calls.append("backward"))
    pre.remove()
    model(images).sum().backward()
    efft.remove(model)
    assert model.blocks[0].mlp.fc1 is layer
    model(images).sum().backward()
    assert calls == ["pre", "post", *["post", "backward"] * 2]


def test_a_layer_used_in_two_places_is_adapted_in_both(randomize: Make) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = linear = model["a"]
    randomize(efft.apply(model, efft.EfftConfig(rank=2, targets=["a"])))
    assert isinstance(model["a"], EfftLinear)
    assert model["b"] is model["a"]
    efft.remove(model)
    assert model["a"] is model["b"] is linear


def test_a_shared_layer_is_merged_under_each_name(randomize: Make) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    randomize(efft.apply(model, efft.EfftConfig(rank=2, targets=["a"])))
    expected = model["a"].weight + model["a"].delta_weight()
    state = efft.merged_state_dict(model)
    torch.testing.assert_close(state["a.weight"], expected)
    assert torch.equal(state["b.weight"], state["a.weight"])


def test_a_sequential_of_normalisation_and_model(tiny_vit: Make, images: Tensor) -> None:
    model = nn.Sequential(nn.Identity(), tiny_vit())
    base = model(images)
    efft.apply(model, efft.EfftConfig(rank=4))
    assert torch.equal(model(images), base)
    assert model.efft.head == ["1.head"]
    efft.remove(model)
    assert len(model) == 2


def test_a_forward_set_after_apply_must_go_before_remove(tiny_vit: Make, images: Tensor) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4))
    layer = model.blocks[0].mlp.fc1
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    with pytest.raises(ValueError, match=r"forward was set on 'blocks\.0\.mlp\.fc1' after efft\.apply"):
        efft.remove(model)
    del layer.forward
    efft.remove(model)
    model(images)


def test_removing_what_is_switched_off(tiny_vit: Make) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4))
    with efft.disabled(model):
        efft.remove(model)
    assert not hasattr(model, "efft")


def test_training_a_merged_model_warns(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit()
    efft.merge(model)
    with pytest.warns(UserWarning, match=r"training a merged model: .* call efft\.unmerge"):
        model.train()(images)


def test_other_things_than_a_model_and_a_configuration(tiny_vit: Make) -> None:
    for arguments in ((tiny_vit(), {"rank": 8}), (efft.EfftConfig(), tiny_vit())):
        with pytest.raises(TypeError, match=r"expected efft\.apply\(model, EfftConfig\(\.\.\.\)\), got"):
            efft.apply(*arguments)


def test_blocks_of_another_kind(tiny_vit: Make) -> None:
    """Blocks of other kinds, such as the class-attention blocks of XCiT and CaiT, are adapted as well."""
    model = tiny_vit()
    model.cls_blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(2)])
    efft.apply(model, efft.EfftConfig(rank=4))
    assert {"cls_blocks.0.q", "cls_blocks.1.q", "blocks.1.attn.proj"} <= efft.adapted_layers(model).keys()


def test_tied_weights_are_refused(unchanged: Unchanged) -> None:
    """Merging the layer would also change the other module, because both weights have the same memory."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "words": nn.Embedding(8, 8)})
    model["words"].weight = model["a"].weight
    with unchanged(model), pytest.raises(ValueError, match=r"'a' cannot .* tied: a and words have the same"):
        efft.apply(model, efft.EfftConfig(rank=2, targets=["a"]))
    model["words"].weight = nn.Parameter(model["a"].weight.data)
    with pytest.raises(ValueError, match="tied: a and words"):
        efft.apply(model, efft.EfftConfig(rank=2, targets=["a"]))
