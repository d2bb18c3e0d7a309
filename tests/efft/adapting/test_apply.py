"""Test ``efft.apply``, ``efft.remove`` and ``efft.disabled``, and which parameters are trained.

A new adapter does not change the output, only its factors and the head are trained, ``efft.remove`` restores the model,
and an error leaves the model unchanged. Other tests cover ``efft.freeze_backbone`` and ``efft.parameter_groups``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels import EfftLinear

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]


def train_a_little(model: nn.Module, images: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=0.05))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(len(images))).backward()
        optimizer.step()


# --- step 0 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("variant", "init"), [("efft2", i) for i in ("u", "v", "uu", "uv", "vu", "vv")] + [("efft1", "u"), ("efft1", "v")]
)
def test_first_step_is_an_exact_no_op(variant: Any, init: str, training: bool, tiny_vit: Make, images: Tensor) -> None:
    model = tiny_vit().train(training)
    before = model(images)
    efft.apply(model, efft.EfftConfig(variant=variant, rank=4, init=init, dropout=0.3))
    assert torch.equal(model(images), before)


def test_first_step_of_swin_is_an_exact_no_op(tiny_swin: Make) -> None:
    model, x = tiny_swin().eval(), torch.randn(2, 3, 32, 32)
    before = model(x)
    assert torch.equal(efft.apply(model, efft.EfftConfig(rank=(2, 4), init="vu"))(x), before)


@pytest.mark.parametrize(
    ("variant", "init"), [("efft2", i) for i in ("u", "v", "uv", "vu")] + [("efft1", "u"), ("efft1", "v")]
)
def test_only_the_zero_side_learns_at_step_0(variant: Any, init: str, tiny_vit: Make, images: Tensor) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig(variant=variant, rank=4, init=init, trainable_scale=True))
    model(images).square().sum().backward()
    for name, factors in model.efft.items():
        zero = (init[-1] if name == "ffn" else init[0]).upper()
        for factor in ("U", "C", "V"):
            parameter = getattr(factors, factor)
            assert bool(parameter.any()) == (factor != zero), f"initial values of {name}.{factor}"
            assert bool(parameter.grad.any()) == (factor == zero), f"gradient of {name}.{factor}"
        assert not factors.log_scale.grad.any()


def test_core_init_follows_the_papers_layouts(tiny_vit: Make) -> None:
    """The bounds are those of xavier_uniform_ for shapes [r, r, 4 L], [4 L, r, r] and [r, r] for L blocks."""
    r, n = 4, 4 * 8
    bounds = {}
    for layout, like in (("last", (r, r, n)), ("first", (n, r, r)), ("matrix", (r, r))):
        bound = (6 / sum(nn.init._calculate_fan_in_and_fan_out(torch.empty(like)))) ** 0.5
        model = efft.apply(tiny_vit(depth=8), efft.EfftConfig(rank=r, core_init=layout, targets="mhsa"))
        largest = model.efft["mhsa"].C.abs().max().item()
        assert 0.95 * bound < largest <= bound
        bounds[layout] = bound
    assert len({round(b, 3) for b in bounds.values()}) == 3


# --- what is trained --------------------------------------------------------------------------------------------------


def test_everything_but_factors_and_head_is_frozen(tiny_vit: Make) -> None:
    model = tiny_vit()
    assert efft.apply(model, efft.EfftConfig(rank=4)) is model
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    factors = {f"efft.{group}.{f}" for group in ("mhsa", "ffn") for f in "UCV"}
    assert trainable == factors | {"head.weight", "head.bias"}
    assert dict(efft.named_factors(model)).keys() == factors
    assert {n for n, m in model.named_modules() if isinstance(m, EfftLinear)} == set(model.efft.layers)


def test_head_can_be_chosen(tiny_vit: Make) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4, head=["norm", "head"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("efft.")} == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4, head=[]))
    assert all(n.startswith("efft.") for n, p in model.named_parameters() if p.requires_grad)


def test_base_keeps_its_names_values_and_parameters(tiny_vit: Make) -> None:
    model = tiny_vit()
    values = copy.deepcopy(model.state_dict())
    objects = dict(model.named_parameters())
    efft.apply(model, efft.EfftConfig(rank=4))
    state = model.state_dict()
    assert [n for n in state if not n.startswith("efft.")] == list(values)
    assert all(torch.equal(state[n], values[n]) for n in values)
    assert all(model.get_parameter(n) is p for n, p in objects.items())
    model.load_state_dict(values, strict=False)  # a checkpoint of the original model still loads


def test_only_factors_and_head_change_in_training(tiny_vit: Make, images: Tensor) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4))
    before = copy.deepcopy(model.state_dict())
    train_a_little(model.train(), images)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def test_factors_are_fp32_on_a_narrow_base(tiny_vit: Make) -> None:
    for base, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        model = efft.apply(tiny_vit().to(base), efft.EfftConfig(rank=4))
        assert {p.dtype for _, p in efft.named_factors(model)} == {expected}
        assert model.blocks[0].attn.qkv.weight.dtype == base


def test_repr_shows_the_adaptation(adapted_vit: Make) -> None:
    text = repr(adapted_vit(scale=2.0))
    assert (
        "EfftLinear(in_features=16, out_features=48, bias=True, rank=(4, 4), layer=1, cores=(0, 1, 2), scale=2)" in text
    )
    assert "layer=0, cores=(1,), transpose=True, scale=2)" in text
    assert "TTFactors(d_in=16, d_out=64, rank=(4, 4), n_layers=2, n_cores=2, core_sharing='per_layer'" in text


def test_meta_models(tiny_vit: Make) -> None:
    with torch.device("meta"):
        model = tiny_vit()
    efft.apply(model, efft.EfftConfig(rank=4))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_config_can_be_reused_for_the_next_model(tiny_vit: Make) -> None:
    config = efft.EfftConfig(rank=4)
    model = efft.apply(tiny_vit(), config)
    config.rank = 8
    assert model.efft.config.rank == 4, "the model must have its own copy of the configuration"


# --- remove -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "config", [{}, {"variant": "efft1"}, {"core_sharing": "shared"}, {"targets": ["fc2"]}], ids=str
)
def test_remove_restores_everything(
    config: dict[str, Any], training: bool, tiny_vit: Make, unchanged: Unchanged, images: Tensor
) -> None:
    model = tiny_vit().train(training)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].mlp.fc1.bias.requires_grad_(False)
    model.blocks[1].mlp.eval()
    with unchanged(model):
        efft.apply(model, efft.EfftConfig(rank=4, **config))
        model(images)
        assert efft.remove(model) is model
    assert not hasattr(model, "efft")


def test_remove_after_training_keeps_the_head(tiny_vit: Make, images: Tensor) -> None:
    model = tiny_vit().eval()
    modules = dict(model.named_modules())
    before = copy.deepcopy(model.state_dict())
    efft.apply(model, efft.EfftConfig(rank=4))
    train_a_little(model.train(), images)
    head = copy.deepcopy(model.head.state_dict())
    efft.remove(model)
    state = model.state_dict()
    assert list(state) == list(before)
    assert [n for n in state if not torch.equal(state[n], before[n])] == ["head.weight", "head.bias"]
    assert all(torch.equal(state[f"head.{n}"], t) for n, t in head.items())
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert all(m.training for m in model.modules()), "remove must not change the training mode"
    assert all(p.requires_grad for p in model.parameters())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_remove_after_conversion(tiny_vit: Make, images: Tensor) -> None:
    model = efft.apply(tiny_vit().eval(), efft.EfftConfig(rank=4)).double()
    efft.remove(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model(images.double()), tiny_vit().eval().double()(images.double()))


def test_apply_again_after_remove(tiny_vit: Make, images: Tensor, randomize: Make) -> None:
    model = tiny_vit().eval()
    efft.remove(randomize(efft.apply(model, efft.EfftConfig(rank=4))))
    base = model(images)
    efft.apply(model, efft.EfftConfig(rank=2, variant="efft1"))
    assert torch.equal(model(images), base)
    assert list(model.efft) == ["joint"]


def _replace(model: nn.Module) -> None:
    old = model.blocks[0].mlp.fc1
    model.blocks[0].mlp.fc1 = nn.Linear(old.in_features, old.out_features)


def _drop(model: nn.Module) -> None:
    model.blocks = model.blocks[1:]


@pytest.mark.parametrize("config", [{}, {"bias": "all", "norms": True}], ids=["factors", "biases and norms"])
@pytest.mark.parametrize("lose", [_replace, _drop], ids=["replaced", "removed"])
def test_adapted_layers_that_the_model_lost_are_reported(
    lose: Callable[[nn.Module], None], config: dict[str, Any], tiny_vit: Make, images: Tensor, tmp_path: Path
) -> None:
    """The update of such a layer has no effect, so results and files would not contain it."""
    model = efft.apply(tiny_vit().eval(), efft.EfftConfig(rank=4, **config))
    model(images)
    lose(model)
    operations: list[Callable[[], Any]] = [
        lambda: model(images),
        lambda: efft.merge(model),
        lambda: efft.merged_state_dict(model),
        lambda: efft.save_adapter(model, tmp_path / "adapter"),
        lambda: efft.adapted_layers(model),
        lambda: efft.remove(model),
    ]
    for operation in operations:
        with pytest.raises(RuntimeError, match=r"adapted layers, 'blocks\.\S+' first, are not at their places"):
            operation()
    assert not (tmp_path / "adapter").exists()


def test_a_wrapped_layer_runs_but_is_not_merged(tiny_vit: Make, images: Tensor, randomize: Make) -> None:
    """A module of another library around an adapted layer does not change the result of the layer."""
    model = randomize(efft.apply(tiny_vit().eval(), efft.EfftConfig(rank=4, dropout=0.0)))
    expected = model(images)
    layer = model.blocks[0].mlp.fc1
    model.blocks[0].mlp.fc1 = nn.Sequential(layer)
    for training in (False, True):
        assert torch.equal(model.train(training)(images), expected)
    with pytest.raises(RuntimeError, match=r"'blocks.0.mlp.fc1' first, are not at their places"):
        efft.merge(model)
    model.blocks[0].mlp.fc1 = layer
    efft.merge(model)


def test_remove_from_a_plain_model(tiny_vit: Make, unchanged: Unchanged) -> None:
    model = tiny_vit()
    with (
        unchanged(model),
        pytest.raises(ValueError, match=re.escape("this VisionTransformer is not adapted: call efft.apply")),
    ):
        efft.remove(model)


# --- errors do not change the model -----------------------------------------------------------------------------------


def unequal_widths(model: nn.Module) -> None:
    model.blocks[1].mlp.fc1, model.blocks[1].mlp.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)


def gated(model: nn.Module) -> None:
    for block in model.blocks:
        block.mlp.fc1 = nn.Linear(16, 128)


def with_own_efft(model: nn.Module) -> None:
    model.efft = nn.Linear(1, 1)


ERRORS: list[tuple[str, Callable[[nn.Module], None] | None, dict[str, Any], str]] = [
    (
        "typo",
        None,
        {"targets": ["qkv", "fc11"]},
        "'fc11' matches no linear layer of this VisionTransformer; nearest: fc1",
    ),
    ("regex", None, {"targets": ["("]}, "neither a layer name nor a regular expression"),
    ("nothing left", None, {"exclude": [".*"]}, "leaves no layer"),
    ("head", None, {"head": ["classifier"]}, "head: no module named 'classifier'"),
    ("rank", None, {"rank": {"mhsa": 4}}, "names the groups ['mhsa'] but not 'ffn'"),
    (
        "scale",
        None,
        {"scale": {"mhsa": 4, "mlp": 3}},
        "names ['mlp'], but the groups of this model are ['ffn', 'mhsa']",
    ),
    ("own attribute", with_own_efft, {}, "this VisionTransformer has an attribute 'efft' of its own"),
    ("efft1 on gated MLP", gated, {"variant": "efft1"}, "efft1 takes [q|k|v|o] and the MLP as matrices of one size"),
]


@pytest.mark.parametrize(("change", "config", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors_leave_the_model_untouched(
    change: Callable[[nn.Module], None] | None,
    config: dict[str, Any],
    message: str,
    tiny_vit: Make,
    unchanged: Unchanged,
) -> None:
    model = tiny_vit()
    if change is not None:
        change(model)
    model.blocks[0].requires_grad_(False)
    with unchanged(model), pytest.raises(ValueError, match=re.escape(message)):
        efft.apply(model, efft.EfftConfig(**{"rank": 4, **config}))


def test_a_qkv_with_a_remainder_is_one_matrix(tiny_vit: Make) -> None:
    model = tiny_vit()
    model.blocks[1].attn.qkv = nn.Linear(16, 49)
    efft.apply(model, efft.EfftConfig(rank=4))
    assert efft.adapted_layers(model)["blocks.1.attn.qkv"].delta_weight().shape == (49, 16)


def test_applying_twice(adapted_vit: Make, unchanged: Unchanged) -> None:
    model = adapted_vit()
    message = "this model is adapted already; call efft.remove(model) first to adapt it differently"
    with unchanged(model), pytest.raises(ValueError, match=re.escape(message)):
        efft.apply(model, efft.EfftConfig(rank=2))


def test_applying_around_an_adapted_model(adapted_vit: Make, unchanged: Unchanged) -> None:
    outer = nn.ModuleDict({"net": adapted_vit()})
    message = "in this ModuleDict is adapted already: call efft.remove on the model inside first"
    with unchanged(outer), pytest.raises(ValueError, match=re.escape(message)):
        efft.apply(outer, efft.EfftConfig(rank=2))


# --- switched off -----------------------------------------------------------------------------------------------------


def test_disabled_is_the_base_exactly(tiny_vit: Make, adapted_vit: Make, images: Tensor) -> None:
    base = tiny_vit().eval()(images)
    model = adapted_vit()
    with_update = model(images)
    assert not torch.allclose(with_update, base, atol=1e-2)
    with efft.disabled(model) as same:
        assert same is model
        assert torch.equal(model(images), base)
        assert torch.equal(model.forward_head(model.forward_features(images)), base)
        assert "disabled" in repr(model)
    assert torch.equal(model(images), with_update)
    assert "disabled" not in repr(model)


def test_disabled_ends_with_an_exception(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit()
    with_update = model(images)
    with pytest.raises(KeyError), efft.disabled(model):
        raise KeyError("inside")
    assert torch.equal(model(images), with_update)


def test_disabled_nests(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit()
    with efft.disabled(model):
        base = model(images)
        with efft.disabled(model):
            assert torch.equal(model(images), base)
        assert torch.equal(model(images), base)


def test_disabled_on_a_merged_or_plain_model(adapted_vit: Make, tiny_vit: Make, images: Tensor) -> None:
    """``disabled`` removes a merged update from the weights, and restores the merged weights exactly at its end."""
    model = adapted_vit().eval()
    with torch.no_grad(), efft.disabled(model):
        base = model(images)
    efft.merge(model)
    with torch.no_grad():
        merged = model(images)
        with efft.disabled(model):
            assert torch.equal(model(images), base)
        assert torch.equal(model(images), merged)
    assert not torch.equal(merged, base)
    with pytest.raises(ValueError, match="is not adapted"), efft.disabled(tiny_vit()):
        pass


# --- freezing and parameter groups ------------------------------------------------------------------------------------


def test_freeze_backbone(tiny_vit: Make) -> None:
    model = tiny_vit()
    assert efft.freeze_backbone(model) == ["head"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert efft.freeze_backbone(model, ["norm"]) == ["norm"]
    with pytest.raises(
        ValueError, match=r"found no classifier in this VisionTransformer: create it with num_classes=..."
    ):
        efft.freeze_backbone(tiny_vit(num_classes=0))
    with pytest.raises(ValueError, match="head: no module named 'haed'; nearest: head"):
        efft.freeze_backbone(model, ["haed"])


def test_parameter_groups(tiny_vit: Make) -> None:
    model = efft.apply(tiny_vit(), efft.EfftConfig(rank=4, trainable_scale=True))
    groups = {g["name"]: g for g in efft.parameter_groups(model, lr=1e-3, weight_decay=0.02, head_lr=5e-3)}
    settings = {n: (g["lr"], g["weight_decay"], len(g["params"])) for n, g in groups.items()}
    assert settings == {"factors": (1e-3, 0.02, 6), "head": (5e-3, 0.02, 2), "scales": (1e-2, 0.0, 2)}
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable), "every trainable parameter must be in exactly one group"
    assert {id(p) for p in groups["head"]["params"]} == {id(p) for p in model.head.parameters()}
    assert all(p.numel() == 1 for p in groups["scales"]["params"])
    assert efft.parameter_groups(model, lr=1e-3, scale_lr=0.0)[-1]["lr"] == 0.0


def test_parameter_groups_default_and_empty(tiny_vit: Make) -> None:
    groups = efft.parameter_groups(efft.apply(tiny_vit(), efft.EfftConfig(rank=4, head=[])), lr=2e-3)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("factors", 2e-3, 1e-4)]
    probe = tiny_vit()
    efft.freeze_backbone(probe)
    assert [g["name"] for g in efft.parameter_groups(probe, lr=1e-3)] == ["head"]


def test_parameter_groups_warn_where_nothing_is_frozen(tiny_vit: Make) -> None:
    with pytest.warns(UserWarning, match="is not adapted and nothing in it is frozen, so all of it will be trained"):
        efft.parameter_groups(tiny_vit(), lr=1e-3)


def test_head_learning_rate_of_zero(tiny_vit: Make) -> None:
    groups = efft.parameter_groups(efft.apply(tiny_vit(), efft.EfftConfig(rank=4)), lr=1e-3, head_lr=0.0)
    assert {g["name"]: g["lr"] for g in groups} == {"factors": 1e-3, "head": 0.0}
