"""Test ``efft.fuse``, which saves memory in training.

Adapted layers of a fused model recompute the outputs of norms and GELUs in the backward pass instead of saving them.
The results must not change, and fusing can be undone completely.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import efft
from efft_kernels.nn import mlp
from efft_kernels.nn.producers import ProducerOutput


def adapted(name: str = "test_vit", **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    efft.apply(model, efft.EfftConfig(rank=4, **{"dropout": 0.0, **config}))
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor, std=0.2)
    return model


@pytest.fixture
def mlps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which every MLP that runs as one op appends its keyword arguments."""
    found: list[Any] = []
    op = mlp.tt_mlp

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        found.append(kwargs)
        return op(*args, **kwargs)

    monkeypatch.setattr(mlp, "tt_mlp", noted)
    return found


def images(model: nn.Module) -> Tensor:
    return torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: Tensor, forward: Any = None) -> tuple[list[Tensor], int]:
    """Return the output and the gradients of a training step, and the bytes of saved tensors without the parameters."""
    kept = {}
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = (forward or model)(x)
    n_bytes = sum(n for n, _ in kept.values())
    leaves = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)], n_bytes


def test_the_same_in_less_memory(mlps: list[Any]) -> None:
    model = adapted().train()
    x = images(model)
    before, kept_before = step(model, x)
    names = efft.fuse(model)
    assert len(names) == 3 * len(model.blocks) + 1, (
        "the candidates must be two norms and one GELU of each block, and the last norm"
    )
    assert {"blocks.0.norm1", "blocks.0.norm2", "blocks.0.mlp.act"} <= set(names)
    after, kept_after = step(model, x)
    for got, expected in zip(after, before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert kept_after < 0.7 * kept_before
    assert len(mlps) == len(model.blocks)
    assert mlps[0]["gamma"] is model.blocks[0].norm2.weight


def transformer(architecture: str, **config: Any) -> tuple[nn.Module, Any]:
    """Return an adapted model of transformers and a function that returns its output."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    settings = getattr(transformers, f"{architecture}Config")(**sizes, **config)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}Model")(settings)
    efft.apply(model, efft.EfftConfig(rank=4, dropout=0.0, head=[]))
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor, std=0.2)
    return model.double().eval(), lambda model: lambda x: model(x).last_hidden_state


PIXELS = {"image_size": 16, "patch_size": 8}
#: The models of transformers, with the number of MLPs that run as one op.
TRANSFORMERS = {
    "ViT": ({**PIXELS, "hidden_act": "gelu"}, 2),
    "SiglipVision": ({**PIXELS, "hidden_act": "gelu_pytorch_tanh"}, 2),
    "Bert": ({"vocab_size": 50, "hidden_act": "gelu_new"}, 0),  # its two layers belong to different modules
    "CLIPVision": ({**PIXELS, "hidden_act": "quick_gelu"}, 0),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name: str, mlps: list[Any]) -> None:
    config, n_mlps = TRANSFORMERS[name]
    model, output = transformer(name, **config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    if name == "Bert":
        x = torch.randint(50, (2, 9), generator=generator)
    before, kept_before = step(model, x, output(model))
    names = efft.fuse(model)
    after, kept_after = step(model, x, output(model))
    torch.testing.assert_close(after, before)
    assert kept_after < kept_before
    assert len(mlps) == n_mlps
    gelus = [name for name in names if not isinstance(model.get_submodule(name), nn.LayerNorm)]
    assert len(gelus) == (0 if config["hidden_act"] == "quick_gelu" else 2)


def test_outputs_of_the_model_are_ordinary_tensors() -> None:
    """The last norm of this model belongs to no adapted layer, and an optimizer changes its parameters."""
    model, output = transformer("ViT", **PIXELS, hidden_act="gelu")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for parameter in model.layernorm.parameters():
        parameter.requires_grad_()
    efft.fuse(model)
    y = output(model)(x)
    assert type(y) is Tensor
    expected = y.detach().clone()
    y.sum().backward()
    torch.optim.SGD(model.layernorm.parameters(), lr=1.0).step()
    assert torch.equal(y, expected)
    assert not torch.equal(output(model)(x), expected)
    copied = copy.deepcopy(model)
    assert type(output(copied)(x)) is Tensor
    n_hooks = len(model._forward_hooks)
    efft.fuse(model)
    assert len(model._forward_hooks) == n_hooks
    efft.unfuse(model)
    assert len(model._forward_hooks) == n_hooks - 1
    efft.remove(copied)
    assert not copied._forward_hooks


@pytest.mark.parametrize("name", ["test_vit2", "test_vit3", "test_vit4", "swin_tiny_patch4_window7_224"])
def test_other_blocks(name: str) -> None:
    """Fusion must also be correct with layer scales, register tokens, attention pooling, RMSNorm and windows."""
    model = adapted(name).eval()
    x = images(model)
    with torch.no_grad():
        before = model(x)
        assert efft.fuse(model)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_undone(tmp_path: Any) -> None:
    model = adapted()
    clean = {name: set(module.__dict__) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    assert efft.fuse(model)
    assert efft.fuse(model) == [], "a second call must not fuse anything"
    assert list(model.state_dict()) == list(state)
    efft.save_adapter(model, tmp_path)
    efft.unfuse(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == clean
    efft.fuse(model)
    efft.remove(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(ValueError, match="not adapted"):
        efft.fuse(model)


def test_disabled_merged_and_copied() -> None:
    model = adapted().eval()
    x = images(model)
    with torch.no_grad(), efft.disabled(model):
        base = model(x)
    y = model(x)
    efft.fuse(model)
    with torch.no_grad(), efft.disabled(model):
        assert torch.equal(model(x), base)
    torch.testing.assert_close(copy.deepcopy(model)(x), y, rtol=1e-4, atol=1e-4)
    efft.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing(use_reentrant: bool) -> None:
    model = adapted()
    x = images(model).requires_grad_(use_reentrant)
    expected, _ = step(model, x)
    efft.fuse(model)
    for block in model.blocks:
        block.forward = lambda x, f=block.forward, **_: checkpoint(f, x, use_reentrant=use_reentrant)
    loss = model(x).square().sum()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    for got, wanted in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_hooks_see_ordinary_values() -> None:
    model = adapted()
    x = images(model)
    seen: list[Tensor] = []
    model.blocks[0].norm1.register_forward_hook(lambda module, args, output: seen.append(output + 0))
    model(x)
    efft.fuse(model)
    model(x)
    assert not isinstance(seen[1], ProducerOutput)
    assert torch.equal(seen[0], seen[1])


def test_bf16_autocast_step_is_as_accurate() -> None:
    model = adapted().train()
    x = images(model)
    exact, _ = step(copy.deepcopy(model).double(), x.double())
    results = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, x)[0])
        efft.fuse(model)
    for got, usual, formula in zip(results[1], results[0], exact, strict=True):
        errors = [(t.double() - formula).norm() for t in (got, usual)]
        assert errors[0] <= 2 * errors[1]
