"""Test which layers a configuration selects, which modules count as the head, and the errors if nothing matches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import efft
from efft.planning.targets import find_head, find_targets

Make = Callable[..., nn.Module]
VIT_LAYERS = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def names(model: nn.Module, **changes: Any) -> list[str]:
    config = efft.EfftConfig(rank=2, **changes)
    found = find_targets(model, find_head(model, None), config.targets, config.exclude, config.kinds)
    return [t.name for t in found]


# --- selection -------------------------------------------------------------------------------------------------------


def test_presets(tiny_vit: Make) -> None:
    model = tiny_vit()
    assert names(model) == VIT_LAYERS
    assert names(model, targets="mhsa") == [n for n in VIT_LAYERS if ".attn." in n]
    assert names(model, targets="ffn") == [n for n in VIT_LAYERS if ".mlp." in n]


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["qkv"], VIT_LAYERS[0::4]),
        (["attn.qkv", "fc2"], [n for n in VIT_LAYERS if n.endswith(("qkv", "fc2"))]),
        (["blocks.1.attn.proj"], ["blocks.1.attn.proj"]),
        ([r"blocks\.0\..*"], VIT_LAYERS[:4]),
        ([r".*\.(qkv|fc1)"], [n for n in VIT_LAYERS if n.endswith(("qkv", "fc1"))]),
        (["fc1", "mlp.fc1"], VIT_LAYERS[2::4]),
    ],
)
def test_names_endings_and_regular_expressions(targets: list[str], chosen: list[str], tiny_vit: Make) -> None:
    assert names(tiny_vit(), targets=targets) == chosen


def test_endings_match_whole_components(tiny_vit: Make) -> None:
    with pytest.raises(ValueError, match="'kv' matches no linear layer"):
        names(tiny_vit(), targets=["kv"])
    model = tiny_vit(depth=12)
    assert names(model, targets=["1.attn.qkv"]) == ["blocks.1.attn.qkv"], "the ending must not match blocks.11"


def test_exclude(tiny_vit: Make) -> None:
    assert names(tiny_vit(), exclude=[r"blocks\.0\..*", "fc2"]) == VIT_LAYERS[4:7]
    assert names(tiny_vit(), targets=["qkv", "proj"], exclude=["blocks.1.attn.proj"]) == [
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.1.attn.qkv",
    ]


def test_swin_presets_leave_the_downsampling_alone(tiny_swin: Make) -> None:
    chosen = names(tiny_swin())
    assert len(chosen) == 4 * 2 * 4
    assert not [n for n in chosen if "reduction" in n]
    targets = find_targets(tiny_swin(), [])
    assert {t.stage for t in targets} == {0, 1, 2, 3}


# --- nothing matches --------------------------------------------------------------------------------------------------


def test_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match=r"targets=.all. finds nothing to adapt\. Linear layers present: none"):
        names(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)))


def test_without_repeated_blocks_everything_is_adapted() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert names(model) == ["0", "2"]


def test_typo_names_the_nearest(tiny_vit: Make) -> None:
    message = (
        r"targets: 'attn.qvk' matches no linear layer of this VisionTransformer; nearest: .*attn.qkv.*"
        r"Linear layers present: 'blocks.0.attn.qkv'"
    )
    with pytest.raises(ValueError, match=message):
        names(tiny_vit(), targets=["qkv", "attn.qvk"])
    with pytest.raises(ValueError, match=r"'zzzzzz' matches no linear layer of this VisionTransformer\. Linear layers"):
        names(tiny_vit(), targets=["zzzzzz"])


def test_long_models_are_not_listed_in_full(tiny_vit: Make) -> None:
    with pytest.raises(ValueError, match=r", \.\.\. \(48 in all\)$"):
        names(tiny_vit(depth=12), targets=["zzz"])


def test_invalid_regular_expression(tiny_vit: Make) -> None:
    with pytest.raises(ValueError, match=r"'blocks\.\(0' is neither a layer name nor a regular expression: .*"):
        names(tiny_vit(), targets=["blocks.(0"])
    with pytest.raises(ValueError, match="neither a layer name nor a regular expression"):
        names(tiny_vit(), exclude=["*fc1"])


def test_exclude_that_matches_nothing_or_everything(tiny_vit: Make) -> None:
    with pytest.raises(ValueError, match=r"exclude: 'fc3' matches no linear layer. Linear layers present"):
        names(tiny_vit(), exclude=["fc3"])
    with pytest.raises(ValueError, match=r"targets='mhsa' without exclude=\['attn.qkv', 'attn.proj'\] leaves no layer"):
        names(tiny_vit(), targets="mhsa", exclude=["attn.qkv", "attn.proj"])
    with pytest.raises(ValueError, match=r"^targets=\[\] leaves no layer"):
        names(tiny_vit(), targets=[])


@pytest.mark.parametrize("where", ["TransformerEncoderLayer", "torchvision"])
def test_multihead_attention(where: str) -> None:
    """The output projection is a layer, and the packed input projection is a parameter."""
    if where == "torchvision":
        models = pytest.importorskip(
            "torchvision", reason="needs torchvision: pip install 'efft-kernels[vision]'"
        ).models
        model: nn.Module = models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)
    else:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    chosen = names(model, targets="mhsa")
    assert len(chosen) == 4
    assert {name.rpartition(".")[2] for name in chosen} == {"in_proj_weight", "out_proj"}
    assert names(model, targets=["out_proj"]) == [name for name in chosen if name.endswith("out_proj")]
    assert names(model, targets=["in_proj_weight"]) == [name for name in chosen if name.endswith("in_proj_weight")]


def test_a_bare_parameter_of_another_size_than_activations_is_left_out() -> None:
    """``A_log`` holds the decays of a state space model. It multiplies no activations, so it must not be adapted."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.conv = nn.Linear(8, 16), nn.Conv1d(16, 16, 4, groups=16)
            self.A_log, self.mixes = nn.Parameter(torch.zeros(16, 4)), nn.Parameter(torch.zeros(16, 8))

    model = nn.ModuleList(Mixer() for _ in range(2))
    assert names(model, head=[]) == [f"{i}.{name}" for i in (0, 1) for name in ("mixes", "inside", "conv")]


def test_layers_with_their_own_forward_are_known_by_their_parameter() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    assert names(nn.Sequential(Doubling(4, 4)), targets=["0"]) == ["0.weight"]


def test_parametrized_layers_are_refused() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="layer '0' cannot be adapted: the layer's weight is parametrized; remove"):
        names(nn.Sequential(layer), targets=["0"])


# --- head ------------------------------------------------------------------------------------------------------------


def test_head_of_timm_models(tiny_vit: Make, tiny_swin: Make) -> None:
    assert find_head(tiny_vit(), None) == ["head"]
    assert find_head(tiny_swin(), None) == ["head.fc"]
    assert find_head(tiny_vit(num_classes=0), None) == [], "an Identity has no parameters to train"


def test_head_of_a_distilled_model() -> None:
    models = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'").models
    model = models.deit.VisionTransformerDistilled(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5
    )
    assert find_head(model, None) == ["head", "head_dist"]


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [
        (["attention.attention.query", "attention.attention.key", "attention.attention.value"], True),
        (["attention.self.query", "attention.self.key", "attention.self.value"], False),
    ],
)
@pytest.mark.parametrize("block", ["vit.encoder.layer.0", "swin.encoder.layers.0.blocks.0"])
def test_names_before_transformers_5(block: str, attention: list[str], mlp: bool) -> None:
    """The names are those that transformers 4 gave to the layers of ViT, DeiT, BEiT, DINOv2 and Swin."""
    roles = dict(zip([*attention, "attention.output.dense"], "qkvo", strict=True))
    fc1, fc2 = ("mlp.fc1", "mlp.fc2") if mlp else ("intermediate.dense", "output.dense")
    roles |= {fc1: "fc1", fc2: "fc2"}
    model = nn.Module()
    for name in roles:
        *path, last = f"{block}.{name}".split(".")
        parent = model
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, nn.Linear(4, 4))
    targets = find_targets(model, [])
    assert {t.name: t.role for t in targets} == {f"{block}.{name}": role for name, role in roles.items()}
    assert {t.block for t in targets} == {block}
    assert {t.stage for t in targets} == {0 if "swin" in block else None}


@pytest.mark.parametrize("attribute", ["classifier", "head", "fc", "score"])
def test_head_by_its_usual_names(attribute: str) -> None:
    model = nn.Module()
    model.body = nn.Linear(4, 4)
    setattr(model, attribute, nn.Linear(4, 2))
    assert find_head(model, None) == [attribute]


def test_head_of_a_model_inside_another(tiny_vit: Make) -> None:
    """Evaluation code often puts a normalization before a timm model. The head of the outer module takes precedence."""
    assert find_head(nn.Sequential(nn.Identity(), tiny_vit()), None) == ["1.head"]
    outer = nn.Module()
    outer.body, outer.head = tiny_vit(), nn.Linear(4, 2)
    assert find_head(outer, None) == ["head"]
    outer.head = nn.Identity()
    assert find_head(outer, None) == ["body.head"]
    assert find_head(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), None) == []


def test_head_given_by_name(tiny_vit: Make) -> None:
    assert find_head(tiny_vit(), ["norm", "head"]) == ["norm", "head"]
    assert find_head(tiny_vit(), []) == []
    with pytest.raises(ValueError, match="head: no module named 'haed'; nearest: head"):
        find_head(tiny_vit(), ["haed"])


def test_head_is_never_adapted() -> None:
    model = nn.Module()
    model.body, model.header = nn.Linear(4, 4), nn.Linear(4, 4)
    model.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert names(model, targets=[".*"]) == ["body", "header"]
    with pytest.raises(
        ValueError, match=r"targets: 'head.0' matches no linear layer.*Linear layers present: 'body', 'header'"
    ):
        names(model, targets=["head.0"])
