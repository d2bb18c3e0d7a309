"""Test the counts of trainable parameters and the table that shows them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import efft

Make = Callable[..., nn.Module]

# Width 16, 2 blocks, rank 4: attention 2·16·4 + 2·4·4² = 256, MLP 16·4 + 2·2·4² + 4·64 = 384; 5 classes: 85.
# Backbone: embedding 192·16 + 16, class token 16, positions 5·16, blocks 2·(4·16 + 3·272 + 272 + 1088 + 1040), norm 32.
FACTORS = {"mhsa": 256, "ffn": 384}
HEAD = 85
BACKBONE = 3072 + 16 + 16 + 80 + 2 * (64 + 816 + 272 + 1088 + 1040) + 32


def test_adapted_model(tiny_vit: Make) -> None:
    counted = efft.count_parameters(efft.apply(tiny_vit(), efft.EfftConfig(rank=4)))
    assert counted == efft.ParameterCount(groups=FACTORS, head=HEAD, backbone=BACKBONE)
    assert counted.factors == 640


def test_counts_do_not_change_by_merging(adapted_vit: Make) -> None:
    model = adapted_vit()
    counted = efft.count_parameters(model)
    efft.merge(model)
    assert efft.count_parameters(model) == counted


def test_frozen_factors_still_count(adapted_vit: Make) -> None:
    model = adapted_vit()
    model.efft.requires_grad_(False)
    assert efft.count_parameters(model).groups == FACTORS


def test_linear_probe(tiny_vit: Make) -> None:
    model = tiny_vit()
    efft.freeze_backbone(model)
    assert efft.count_parameters(model) == efft.ParameterCount(groups={}, head=HEAD, backbone=BACKBONE)


def test_table(tiny_vit: Make, capsys: pytest.CaptureFixture[str]) -> None:
    efft.print_trainable_parameters(efft.apply(tiny_vit(), efft.EfftConfig(rank=4)))
    assert capsys.readouterr().out.splitlines() == [
        "                parameters  of backbone",
        "mhsa                   256     2.619 %",
        "ffn                    384     3.928 %",
        "all factors            640     6.547 %",
        "head                    85     0.869 %",
        "backbone             9,776   100.000 %",
        f"trainable params: {640 + 85} || all params: {640 + 85 + 9776:,} || trainable%: {72500 / 10501:.4f}",
    ]


def test_table_of_a_fully_trained_model(tiny_vit: Make, capsys: pytest.CaptureFixture[str]) -> None:
    efft.print_trainable_parameters(tiny_vit())
    assert f"{BACKBONE + HEAD:,}" in capsys.readouterr().out
