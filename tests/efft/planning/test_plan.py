"""Test which layers share factors, and compare the numbers of parameters with those of the paper and its code.

The expected percentages, backbone sizes and totals come from the paper, from runs of its public code, and from closed
formulas. None of them comes from this project.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import efft
from efft.params import ParameterCount, count_plan
from efft.planning.plan import make_plan
from efft_kernels import Site

Make = Callable[..., nn.Module]

VIT = {"vit_base": "vit_base_patch16_224", "vit_large": "vit_large_patch16_224", "vit_huge": "vit_huge_patch14_224"}
SWIN = {size: f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")}
DIMS = {"vit_base": (768, 12), "vit_large": (1024, 24), "vit_huge": (1280, 32)}


@cache
def on_meta(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'")
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def count(name: str, config: efft.EfftConfig) -> ParameterCount:
    model = on_meta(name)
    return count_plan(model, make_plan(model, config))


# --- ViT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "efft1", "efft2", "code"),
    [(8, 33_024, 47_616, 43_392), (16, 70_656, 104_448, 87_552), (32, 159_744, 245_760, 178_176)],
)
def test_vit_base_counts(rank: int, efft1: int, efft2: int, code: int) -> None:
    name = VIT["vit_base"]
    assert count(name, efft.EfftConfig(rank=rank, variant="efft1")).factors == efft1
    assert count(name, efft.EfftConfig(rank=rank)).factors == efft2
    assert count(name, efft.EfftConfig(rank=rank, core_sharing="shared")).factors == code


def test_headline_numbers_of_the_paper() -> None:
    """At the maximum rank 32, the paper reports 0.16M (EFFT1) and 0.25M = 0.28 % (EFFT2) extra parameters."""
    one, two = (count(VIT["vit_base"], efft.EfftConfig(rank=32, variant=v)) for v in ("efft1", "efft2"))
    assert (round(one.factors / 1e6, 2), round(two.factors / 1e6, 2)) == (0.16, 0.25)
    assert two.backbone == 85_798_656
    assert f"{100 * one.factors / one.backbone:.3f}" == "0.186"
    assert f"{100 * two.factors / two.backbone:.3f}" == "0.286"
    # With the head of 1000 classes, the model has 86,567,656 parameters.
    assert f"{100 * two.factors / (two.backbone + 769_000):.3f}" == "0.284"


def test_mean_over_the_19_published_ranks() -> None:
    """With EFFT1, 4, 5 and 10 of the 19 tasks use the ranks 8, 16 and 32. With EFFT2, 2, 9 and 8 tasks use them."""
    for variant, tasks, mean in (("efft1", (4, 5, 10), 0.110), ("efft2", (2, 9, 8), 0.158)):
        totals = [count(VIT["vit_base"], efft.EfftConfig(rank=r, variant=variant)).factors for r in (8, 16, 32)]
        assert round(sum(n * t for n, t in zip(tasks, totals, strict=True)) / 19e6, 3) == mean


@pytest.mark.parametrize(
    ("size", "rank", "per_layer", "code", "backbone"),
    [
        ("vit_base", 32, 245_760, 178_176, 85_798_656),
        ("vit_large", 24, 254_976, 175_488, 303_301_632),
        ("vit_huge", 32, 483_328, 292_864, 630_764_800),
    ],
)
def test_vit_sizes_at_the_papers_ranks(size: str, rank: int, per_layer: int, code: int, backbone: int) -> None:
    d, depth = DIMS[size]
    assert per_layer == 7 * d * rank + 6 * depth * rank**2
    assert code == 7 * d * rank + 6 * rank**2
    assert efft.paper_config(size).rank == rank
    counted = count(VIT[size], efft.paper_config(size))
    assert (counted.factors, counted.backbone) == (per_layer, backbone)
    assert counted.groups == {
        "mhsa": 2 * d * rank + 4 * depth * rank**2,
        "ffn": 5 * d * rank + 2 * depth * rank**2,
    }
    assert count(VIT[size], efft.paper_config(size, core_sharing="shared")).factors == code
    joint = count(VIT[size], efft.paper_config(size, "efft1"))
    assert joint.groups == {"joint": 5 * d * rank + 3 * depth * rank**2}


def test_parts_of_a_vit() -> None:
    d, depth, r = 768, 12, 16
    name = VIT["vit_base"]
    assert count(name, efft.EfftConfig(rank=r, targets="mhsa")).groups == {"mhsa": 2 * d * r + 4 * depth * r * r}
    assert count(name, efft.EfftConfig(rank=r, targets="ffn")).groups == {"ffn": 5 * d * r + 2 * depth * r * r}
    assert count(name, efft.EfftConfig(rank=r, targets=["attn.qkv"])).factors == 2 * d * r + 3 * depth * r * r
    assert count(name, efft.EfftConfig(rank=r, targets=["attn.proj"])).factors == 2 * d * r + depth * r * r
    assert count(name, efft.EfftConfig(rank=r, targets=["mlp.fc2"])).factors == 5 * d * r + depth * r * r
    some = efft.EfftConfig(rank=r, targets=[r"blocks\.[0-2]\.attn\.qkv"])
    assert count(name, some).factors == 2 * d * r + 3 * 3 * r * r
    rectangular = efft.EfftConfig(rank={"mhsa": (4, 6), "ffn": 8}, trainable_scale=True)
    assert count(name, rectangular).groups == {
        "mhsa": d * 4 + 4 * depth * 24 + 6 * d + 1,
        "ffn": d * 8 + 2 * depth * 64 + 8 * 4 * d + 1,
    }
    plain = count(name, efft.EfftConfig(rank=r)).factors
    for trained, scales in (("global", 1), ("group", 2), ("matrix", 6 * depth)):
        assert count(name, efft.EfftConfig(rank=r, trainable_scale=trained)).factors == plain + scales


def test_distilled_deit_has_two_heads() -> None:
    counted = count("deit_base_distilled_patch16_224", efft.EfftConfig(rank=32))
    assert counted.factors == 245_760
    assert counted.head == 2 * (768 * 1000 + 1000)


def test_giant_dinov2_has_a_gated_mlp() -> None:
    """The model has 40 blocks of width 1536.

    fc1 packs a gate and a value of width 4096, and has two cores. fc2 has one core.
    """
    r = 16
    counted = count("vit_giant_patch14_dinov2", efft.EfftConfig(rank=r))
    assert counted.groups == {"mhsa": 2 * 1536 * r + 40 * 4 * r * r, "ffn": (1536 + 4096) * r + 40 * 3 * r * r}
    assert counted.head == 0
    with pytest.raises(ValueError, match=r"efft1 takes \[q\|k\|v\|o\] and the MLP as matrices of one size.*efft2"):
        count("vit_giant_patch14_dinov2", efft.EfftConfig(rank=r, variant="efft1"))


# --- Swin ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "width", "attention", "mlp", "depths", "code_total", "per_layer"),
    [
        ("tiny", 96, 4, 4, (2, 2, 6, 2), 378_112, 388_992),
        ("small", 96, 4, 4, (2, 2, 18, 2), 378_112, 413_568),
        ("base", 128, 4, 2, (2, 2, 18, 2), 291_728, 316_960),
        ("large", 192, 8, 8, (2, 2, 18, 2), 1_512_448, 1_654_272),
    ],
)
def test_swin_counts(
    size: str, width: int, attention: int, mlp: int, depths: tuple[int, ...], code_total: int, per_layer: int
) -> None:
    """The public code allocates stage 3's MLP cores as [18, m, 2m] and uses 2; this library allocates only these 2."""
    m3 = mlp << 2  # m of stage 3
    dead = 16 * m3 * (2 * m3)
    shared = count(SWIN[size], efft.paper_config(f"swin_{size}", core_sharing="shared"))
    assert shared.factors == code_total - dead

    expected = {}
    for i, depth in enumerate(depths):
        d, a, m = width << i, attention << i, mlp << i
        expected[f"stage{i + 1}_mhsa"] = d * a + 4 * depth * a * a + a * d
        expected[f"stage{i + 1}_ffn"] = d * m + 2 * depth * m * 2 * m + 2 * m * 4 * d
    counted = count(SWIN[size], efft.paper_config(f"swin_{size}"))
    assert counted.groups == expected
    assert counted.factors == per_layer


def test_dead_slices_of_the_public_code() -> None:
    """The totals of the public code include unused MLP cores in stage 3 (see test_swin_counts)."""
    totals = {
        size: count(SWIN[size], efft.paper_config(f"swin_{size}", core_sharing="shared")).factors for size in SWIN
    }
    assert totals == {
        "tiny": 378_112 - 16 * 16 * 32,
        "small": 378_112 - 16 * 16 * 32,
        "base": 291_728 - 16 * 8 * 16,
        "large": 1_512_448 - 16 * 32 * 64,
    }
    assert totals["base"] == 289_680


def test_swin_backbones() -> None:
    millions = {
        size: round(count(name, efft.paper_config(f"swin_{size}")).backbone / 1e6, 2) for size, name in SWIN.items()
    }
    assert millions == {"tiny": 27.52, "small": 48.84, "base": 86.74, "large": 195.0}


# --- what is allocated -----------------------------------------------------------------------------------------------

CONFIGS = [
    efft.EfftConfig(rank=4),
    efft.EfftConfig(rank=4, core_sharing="shared"),
    efft.EfftConfig(rank=(3, 5), variant="efft1"),
    efft.EfftConfig(rank={"mhsa": 2, "ffn": (2, 4)}, trainable_scale=True),
    efft.EfftConfig(rank=4, trainable_scale="global"),
    efft.EfftConfig(rank=4, trainable_scale="matrix", core_sharing="shared"),
    efft.EfftConfig(rank=4, targets="mhsa"),
    efft.EfftConfig(rank=4, targets=["fc2"]),
    efft.EfftConfig(rank=4, head=[]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_apply_allocates_exactly_the_plan(
    config: efft.EfftConfig, architecture: str, tiny_vit: Make, tiny_swin: Make
) -> None:
    model = tiny_vit() if architecture == "vit" else tiny_swin()
    plain = sum(p.numel() for p in model.parameters())
    head = 0 if config.head == [] else model.get_classifier().weight.numel() + 5
    planned = count_plan(model, make_plan(model, config))
    efft.apply(model, config)
    counted = efft.count_parameters(model)
    assert counted == planned
    assert counted.head == head
    assert counted.backbone == plain - head
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    assert sum(trainable.values()) == counted.factors + counted.head
    stored = sum(t.numel() for n, t in model.state_dict().items() if n.startswith("efft."))
    assert stored == counted.factors, "shared factors must be stored once"
    assert {n: sum(p.numel() for p in f.parameters()) for n, f in model.efft.items()} == counted.groups


def test_table_text() -> None:
    table = str(count(VIT["vit_base"], efft.EfftConfig(rank=32)))
    assert table.splitlines() == [
        "                parameters  of backbone",
        "mhsa                98,304     0.115 %",
        "ffn                147,456     0.172 %",
        "all factors        245,760     0.286 %",
        "head               769,000     0.896 %",
        "backbone        85,798,656   100.000 %",
    ]


# --- sites -----------------------------------------------------------------------------------------------------------


def test_vit_sites(tiny_vit: Make) -> None:
    mhsa, ffn = make_plan(tiny_vit(), efft.EfftConfig(rank=4)).groups
    assert (mhsa.name, mhsa.d_in, mhsa.d_out, mhsa.n_layers, mhsa.n_cores) == ("mhsa", 16, 16, 2, 4)
    assert (ffn.name, ffn.d_in, ffn.d_out, ffn.n_layers, ffn.n_cores) == ("ffn", 16, 64, 2, 2)
    assert mhsa.sites["blocks.1.attn.qkv"] == Site(1, (0, 1, 2))
    assert mhsa.sites["blocks.1.attn.proj"] == Site(1, (3,))
    assert ffn.sites["blocks.0.mlp.fc1"] == Site(0, (0,))
    assert ffn.sites["blocks.0.mlp.fc2"] == Site(0, (1,), transpose=True, mask_scope=1)


def test_cores_of_absent_layers_are_not_made(tiny_vit: Make) -> None:
    config = efft.EfftConfig(rank=4, exclude=["attn.qkv", "mlp.fc1"])
    mhsa, ffn = make_plan(tiny_vit(), config).groups
    assert (mhsa.n_cores, ffn.n_cores) == (1, 1)
    assert mhsa.sites["blocks.0.attn.proj"].cores == (0,)
    assert ffn.sites["blocks.0.mlp.fc2"] == Site(0, (0,), transpose=True, mask_scope=1)


def test_blocks_are_counted_among_those_adapted(tiny_vit: Make) -> None:
    model = tiny_vit(depth=12)
    config = efft.EfftConfig(rank=4, targets=[r"blocks\.(2|10|11)\.attn\.proj"])
    (group,) = make_plan(model, config).groups
    assert group.n_layers == 3
    assert {name: site.layer for name, site in group.sites.items()} == {
        "blocks.2.attn.proj": 0,
        "blocks.10.attn.proj": 1,
        "blocks.11.attn.proj": 2,
    }


def test_efft1_sites(tiny_vit: Make) -> None:
    (joint,) = make_plan(tiny_vit(), efft.EfftConfig(rank=4, variant="efft1")).groups
    assert (joint.d_in, joint.d_out, joint.n_cores) == (16, 64, 3)
    assert joint.sites["blocks.1.attn.qkv"] == Site(1, (0,), columns=(0, 48), mask_scope=0)
    assert joint.sites["blocks.1.attn.proj"] == Site(1, (0,), columns=(48, 64), mask_scope=0)
    assert joint.sites["blocks.1.mlp.fc1"] == Site(1, (1,), mask_scope=1)
    assert joint.sites["blocks.1.mlp.fc2"] == Site(1, (2,), transpose=True, mask_scope=2)


def test_swin_groups_by_stage(tiny_swin: Make) -> None:
    plan = make_plan(tiny_swin(), efft.EfftConfig(rank=2))
    assert [g.name for g in plan.groups] == [f"stage{i}_{kind}" for i in (1, 2, 3, 4) for kind in ("mhsa", "ffn")]
    assert [g.d_in for g in plan.groups] == [8, 8, 16, 16, 32, 32, 64, 64]
    assert plan.head == ["head.fc"]


def test_blocks_may_lie_deeper_in_the_model(tiny_vit: Make) -> None:
    (group,) = make_plan(nn.ModuleDict({"backbone": tiny_vit()}), efft.EfftConfig(rank=2, targets="mhsa")).groups
    assert group.sites["backbone.blocks.1.attn.qkv"] == Site(1, (0, 1, 2))


# --- layers that cannot share a tensor train --------------------------------------------------------------------------


def test_ranks_for_unknown_groups(tiny_vit: Make) -> None:
    with pytest.raises(ValueError, match=r"EfftConfig.rank names the groups \['mhsa'\] but not 'ffn': add 'ffn'$"):
        make_plan(tiny_vit(), efft.EfftConfig(rank={"mhsa": 4}))
    with pytest.raises(
        ValueError, match=r"EfftConfig.rank names \['fnn'\], but the groups of this model are \['ffn', 'm"
    ):
        make_plan(tiny_vit(), efft.EfftConfig(rank={"mhsa": 4, "ffn": 2, "fnn": 3}))
    with pytest.raises(ValueError, match=r"rank names \['fnn'\], but the groups .*; did you mean 'ffn'\?"):
        make_plan(tiny_vit(), efft.EfftConfig(rank={"mhsa": 4, "fnn": 3}))
    with pytest.raises(ValueError, match=r"EfftConfig.scale names \['stage5_mhsa'\], but the groups of this model are"):
        make_plan(tiny_vit(), efft.EfftConfig(scale={"mhsa": 1.0, "ffn": 2, "stage5_mhsa": 3}))


def sizes(model: nn.Module, **changes: Any) -> dict[str, tuple[int, int, int, int]]:
    """Return d_in, d_out, the number of layers and the cores per layer of each group."""
    groups = make_plan(model, efft.EfftConfig(rank=4, **changes)).groups
    return {g.name: (g.d_in, g.d_out, g.n_layers, g.n_cores) for g in groups}


def test_layers_of_unequal_sizes(tiny_vit: Make) -> None:
    """The plan has one tensor train per size of the MLP, and one for the attention."""
    model = tiny_vit()
    model.blocks[1].mlp.fc1 = nn.Linear(16, 32)
    model.blocks[1].mlp.fc2 = nn.Linear(32, 16)
    assert sizes(model) == {"mhsa": (16, 16, 2, 4), "ffn_16x64": (16, 64, 2, 1), "ffn_16x32": (16, 32, 2, 1)}
    assert sizes(model, exclude=[r"blocks\.1\.mlp.*"]) == {"mhsa": (16, 16, 2, 4), "ffn": (16, 64, 2, 1)}


def test_attention_that_is_not_square(tiny_vit: Make) -> None:
    """Three 16 x 8 matrices in qkv and the output projection back to 16 share one tensor train."""
    model = tiny_vit()
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = nn.Linear(16, 3 * 8), nn.Linear(8, 16)
    assert sizes(model) == {"mhsa": (16, 8, 2, 4), "ffn": (16, 64, 4, 1)}
    (mhsa, _) = make_plan(model, efft.EfftConfig(rank=4)).groups
    assert mhsa.sites["blocks.1.attn.qkv"] == Site(1, (0, 1, 2))
    assert mhsa.sites["blocks.1.attn.proj"] == Site(1, (3,), transpose=True, mask_scope=1)


def test_a_packed_projection_without_a_like_matrix_is_one_matrix(tiny_vit: Make) -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.mlp.fc1 = nn.Linear(16, 80)
    assert sizes(model)["ffn_16x80"] == (16, 80, 2, 1)
    assert sizes(model)["ffn_64x16"] == (64, 16, 2, 1)
