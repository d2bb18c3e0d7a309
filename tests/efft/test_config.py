"""Test EfftConfig: rejected values and their errors, values per group, and conversion to and from JSON."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efft import EfftConfig, paper_config

# --- rejected values --------------------------------------------------------------------------------------------------

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"variant": "efft3"}, "EfftConfig.variant must be one of ('efft1', 'efft2'), got 'efft3'"),
    ({"core_init": "xavier"}, "EfftConfig.core_init must be one of ('last', 'first', 'matrix'), got 'xavier'"),
    ({"core_sharing": "none"}, "EfftConfig.core_sharing must be one of ('per_layer', 'shared'), got 'none'"),
    ({"init": "w"}, "EfftConfig.init must be 'u' or 'v', or two of them (attention and MLP)"),
    ({"init": ""}, "EfftConfig.init must be 'u' or 'v'"),
    ({"init": "vvv"}, "got 'vvv'"),
    ({"init": None}, "got None"),
    ({"init": "vu", "variant": "efft1"}, "EfftConfig.init must be 'u' or 'v', got 'vu'"),
    ({"rank": 0}, "EfftConfig.rank must be an integer from 1 to 65536, a pair of them, or a dict of these, got 0"),
    ({"rank": -4}, "got -4"),
    ({"rank": 2.0}, "got 2.0"),
    ({"rank": True}, "got True"),
    ({"rank": "32"}, "got '32'"),
    ({"rank": (4, 0)}, "got (4, 0)"),
    ({"rank": (4, 4, 4)}, "got (4, 4, 4)"),
    ({"rank": {"mhsa": 4, "ffn": 0}}, "got {'mhsa': 4, 'ffn': 0}"),
    (
        {"scale": "1"},
        "EfftConfig.scale must be a number from -1000000 to 1000000, 'auto' or a dict of these, got '1'",
    ),
    ({"scale": True}, "got True"),
    ({"scale": {"mhsa": None}}, "got {'mhsa': None}"),
    ({"dropout": 1.0}, "EfftConfig.dropout must be in [0, 1), got 1.0"),
    ({"dropout": -0.1}, "got -0.1"),
    ({"dropout": float("nan")}, "got nan"),
    (
        {"targets": 7},
        "EfftConfig.targets must be 'all', 'all-linear', 'mhsa', 'ffn' or a list of layer names or patterns, got",
    ),
    ({"targets": [1]}, "got [1]"),
    ({"targets": None}, "got None"),
]


@pytest.mark.parametrize(("values", "message"), INVALID, ids=[str(v) for v, _ in INVALID])
def test_invalid_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EfftConfig(**values)


UNNOTICED: list[tuple[dict[str, Any], str]] = [
    ({"rank": (4,)}, "EfftConfig.rank must be"),
    ({"scale": float("nan")}, "EfftConfig.scale must be"),
    ({"scale": {"mhsa": float("inf")}}, "EfftConfig.scale must be"),
    ({"dropout": "0.1"}, "EfftConfig.dropout must be"),
    ({"exclude": {"qkv"}}, "EfftConfig.exclude must be"),
    ({"exclude": None}, "EfftConfig.exclude must be"),
    ({"head": 3}, "EfftConfig.head must be"),
    ({"trainable_scale": "no"}, "EfftConfig.trainable_scale must be False, 'global', 'group' (or True) or 'matrix'"),
]


@pytest.mark.parametrize(("values", "message"), UNNOTICED, ids=[str(v) for v, _ in UNNOTICED])
def test_values_that_should_be_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EfftConfig(**values)


def test_true_is_a_scale_for_each_group() -> None:
    assert EfftConfig(trainable_scale=True) == EfftConfig(trainable_scale="group") != EfftConfig()


def test_unknown_field() -> None:
    with pytest.raises(TypeError, match="rnk"):
        EfftConfig(rnk=4)  # type: ignore[call-arg]


# --- values per group ------------------------------------------------------------------------------------------------


def test_rank_and_scale_by_group_and_kind() -> None:
    config = EfftConfig(rank={"mhsa": 4, "stage2_mhsa": (3, 5), "ffn": [2, 8]}, scale={"mhsa": 2, "ffn": 0.5})
    assert config.rank_of("mhsa", "mhsa") == (4, 4)
    assert config.rank_of("stage1_mhsa", "mhsa") == (4, 4)
    assert config.rank_of("stage2_mhsa", "mhsa") == (3, 5), (
        "the entry of the group must take precedence over the entry of its kind"
    )
    assert config.rank_of("stage4_ffn", "ffn") == (2, 8)
    assert config.scale_of("stage3_mhsa", "mhsa") == 2.0
    assert config.scale_of("stage3_ffn", "ffn") == 0.5
    assert EfftConfig(rank=(2, 3), scale=3).rank_of("linear_4x5", "linear") == (2, 3)
    assert EfftConfig(rank=(2, 3), scale=3).scale_of("joint", "joint") == 3.0


def test_missing_group_says_what_to_add() -> None:
    config = EfftConfig(rank={"ffn": 4}, scale={})
    with pytest.raises(
        ValueError,
        match=r"EfftConfig.rank names the groups \['ffn'\] but not 'stage1_mhsa': add .*, or 'mhsa'",
    ):
        config.rank_of("stage1_mhsa", "mhsa")
    with pytest.raises(ValueError, match=r"EfftConfig.scale names the groups \[\] but not 'ffn'"):
        config.scale_of("ffn", "ffn")


@pytest.mark.parametrize(
    ("init", "mhsa", "ffn"), [("u", "u", "u"), ("v", "v", "v"), ("vu", "v", "u"), ("uv", "u", "v"), ("vv", "v", "v")]
)
def test_init_letters(init: str, mhsa: str, ffn: str) -> None:
    config = EfftConfig(init=init)
    assert (config.init_of("mhsa"), config.init_of("ffn"), config.init_of("linear")) == (mhsa, ffn, mhsa)
    assert EfftConfig(variant="efft1", init="u").init_of("joint") == "u"


# --- JSON ------------------------------------------------------------------------------------------------------------

ranks = st.one_of(st.integers(1, 128), st.tuples(st.integers(1, 64), st.integers(1, 64)))
names = st.sampled_from(["mhsa", "ffn", "joint", "linear", "stage1_mhsa", "stage4_ffn", "linear_16x64"])
scales = st.one_of(st.integers(-5, 100), st.floats(-100, 100))
patterns = st.lists(st.text(max_size=12), max_size=3)


@st.composite
def configs(draw: st.DrawFn) -> EfftConfig:
    variant = draw(st.sampled_from(["efft1", "efft2"]))
    return EfftConfig(
        variant=variant,
        rank=draw(st.one_of(ranks, st.dictionaries(names, ranks, min_size=1))),
        scale=draw(st.one_of(scales, st.dictionaries(names, scales, min_size=1))),
        trainable_scale=draw(st.sampled_from([False, True, "global", "group", "matrix"])),
        init=draw(st.sampled_from(["u", "v"] if variant == "efft1" else ["u", "v", "uu", "uv", "vu", "vv"])),
        core_init=draw(st.sampled_from(["last", "first", "matrix"])),
        dropout=draw(st.floats(0, 1, exclude_max=True)),
        targets=draw(st.one_of(st.sampled_from(["all", "all-linear", "mhsa", "ffn"]), patterns)),
        exclude=draw(patterns),
        core_sharing=draw(st.sampled_from(["per_layer", "shared"])),
        head=draw(st.one_of(st.none(), patterns)),
    )


@settings(max_examples=100)
@given(configs())
def test_json_round_trip(config: EfftConfig) -> None:
    text = json.dumps(config.to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = EfftConfig.from_dict(json.loads(text))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert json.dumps(again.to_dict()) == text


def test_to_dict_is_a_copy_that_says_what_it_is() -> None:
    config = EfftConfig(rank={"mhsa": 4, "ffn": 2})
    values = config.to_dict()
    assert (values["method"], values["format_version"]) == ("efft", 1)
    values["rank"]["mhsa"] = 9
    values["exclude"].append("x")
    assert config == EfftConfig(rank={"mhsa": 4, "ffn": 2})


def test_from_dict_leaves_its_argument_alone() -> None:
    values = EfftConfig(rank=[4, 8]).to_dict()  # type: ignore[arg-type]
    before = json.dumps(values)
    EfftConfig.from_dict(values)
    assert json.dumps(values) == before


def test_unknown_keys_are_reported_and_ignored() -> None:
    values = {**EfftConfig(rank=4).to_dict(), "rnk": 3, "zzz": None}
    with pytest.warns(UserWarning, match=r"ignored unknown keys: 'rnk' \(near 'rank'\), 'zzz'"):
        assert EfftConfig.from_dict(values) == EfftConfig(rank=4)


def test_newer_format_is_reported() -> None:
    values = {**EfftConfig(rank=4).to_dict(), "format_version": 2}
    with pytest.warns(UserWarning, match=r"EfftConfig of format version 2 \(this library reads 1\)"):
        assert EfftConfig.from_dict(values) == EfftConfig(rank=4)


def test_configs_of_other_methods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a config of method 'efft', got method 'lora'"):
        EfftConfig.from_dict({"method": "lora", "r": 8})


def test_from_dict_checks_values() -> None:
    with pytest.raises(ValueError, match=r"EfftConfig\.rank must be an integer from 1 to"):
        EfftConfig.from_dict({"rank": "big"})


# --- the paper's settings --------------------------------------------------------------------------------------------


def test_paper_ranks() -> None:
    assert paper_config("vit_base_patch16_224.augreg_in21k") == EfftConfig(rank=32)
    assert paper_config("vit_large_patch16_224").rank == 24
    assert paper_config("vit_huge_patch14_224", "efft1") == EfftConfig(variant="efft1", rank=32)
    swin = paper_config("swin_base_patch4_window7_224")
    assert swin.core_init == "first"
    assert [swin.rank_of(f"stage{i}_mhsa", "mhsa") for i in (1, 2, 3, 4)] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    assert [swin.rank_of(f"stage{i}_ffn", "ffn") for i in (1, 2, 3, 4)] == [(2, 4), (4, 8), (8, 16), (16, 32)]
    small, large = paper_config("swin_small"), paper_config("swin_large")
    assert small.rank == paper_config("swin_tiny").rank
    assert small.rank_of("stage4_ffn", "ffn") == (32, 64)
    assert (large.rank_of("stage4_mhsa", "mhsa"), large.rank_of("stage4_ffn", "ffn")) == ((64, 64), (64, 128))


def test_paper_config_changes() -> None:
    config = paper_config("vit_base", rank=8, scale=10.0, init="vu")
    assert (config.rank, config.scale, config.init, config.dropout) == (8, 10.0, "vu", 0.1)


@pytest.mark.parametrize(("name", "variant"), [("resnet50", "efft2"), ("swin_base", "efft1"), ("deit_base", "efft2")])
def test_architectures_without_paper_ranks(name: str, variant: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"no {variant} ranks for '{name}'.*vit_base, vit_large.*Set EfftConfig\(rank"
    ):
        paper_config(name, variant)


def test_one_name_is_a_list_of_one() -> None:
    config = EfftConfig(targets="attn.qkv", exclude="blocks.0.attn.qkv")  # type: ignore[arg-type]
    assert (config.targets, config.exclude) == (["attn.qkv"], ["blocks.0.attn.qkv"])
    assert EfftConfig(targets="mhsa").targets == "mhsa"
