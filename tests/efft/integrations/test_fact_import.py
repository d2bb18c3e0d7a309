"""Test ``efft.import_fact``, which imports checkpoints of FacT (another tensor method for vision transformers).

The oracle computes each update with the formulas of the FacT authors' code. Other tests cover files that are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.adapting.inject import adapted_layers

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]
Tensors = dict[str, Tensor]

D, R, L, S = 16, 3, 2, 0.7  # width of the tiny ViT, rank, number of blocks, scale


def drawn(*shape: int) -> Tensor:
    return 0.5 * torch.randn(shape)


def common() -> Tensors:
    return {
        "FacTu.weight": drawn(R, D),
        "FacTv.weight": drawn(D, R),
        "head.weight": drawn(5, D),
        "head.bias": drawn(5),
    }


def train() -> Tensors:
    """Return tensors in the format that fact_tt.py saves."""
    tensors = common()
    for i in range(L):
        for part in ("q", "k", "v", "proj"):
            tensors[f"blocks.{i}.attn.{part}_FacTs.weight"] = drawn(R, R)
        tensors[f"blocks.{i}.mlp.fc1_FacTs.weight"] = drawn(4 * R, R)
        tensors[f"blocks.{i}.mlp.fc2_FacTs.weight"] = drawn(R, 4 * R)
    return tensors


def tucker() -> Tensors:
    """Return tensors in the format that fact_tk.py saves."""
    return {**common(), "FacTp": drawn(R, 12 * L), "FacTc": drawn(R, R, R)}


def of_train(p: Tensors, i: int) -> Tensors:
    """Return ΔW [d_in, d_out] of each layer in block i for FacT-TT, where ΔW = FacTuᵀ FacTsᵀ FacTvᵀ.

    The update of fc1 consists of four such matrices side by side. The update of fc2 consists of four such matrices, one
    for each quarter of the inputs.
    """
    U, V = p["FacTu.weight"], p["FacTv.weight"]
    each = {
        part: torch.einsum("ri,tr,ot->io", U, p[f"blocks.{i}.attn.{part}_FacTs.weight"], V)
        for part in ("q", "k", "v", "proj")
    }
    up, down = (p[f"blocks.{i}.mlp.fc{n}_FacTs.weight"] for n in (1, 2))
    return {
        "attn.qkv": torch.cat([each["q"], each["k"], each["v"]], dim=1),
        "attn.proj": each["proj"],
        "mlp.fc1": torch.einsum("ri,jtr,ot->ijo", U, up.reshape(4, R, R), V).flatten(1),
        "mlp.fc2": torch.einsum("ri,tjr,ot->jio", U, down.reshape(R, 4, R), V).flatten(0, 1),
    }


def of_tucker(p: Tensors, i: int) -> Tensors:
    """Return ΔW [d_in, d_out] of each layer in block i for FacT-TK, whose cores are FacTc ×₃ FacTp.

    The cores of fc1 and fc2 have shape [r, 4 r], and the update of fc2 is transposed.
    """
    U, V = p["FacTu.weight"], p["FacTv.weight"]
    cores = torch.einsum("abp,pm->abm", p["FacTc"], p["FacTp"][:, 12 * i : 12 * (i + 1)])
    q, k, v, o = (torch.einsum("ai,ab,ob->io", U, cores[:, :, m], V) for m in range(4))
    up, down = (torch.stack([core.flatten() for core in cores[:, :, m : m + 4]]) for m in (4, 8))  # [r, 4 r]
    return {
        "attn.qkv": torch.cat([q, k, v], dim=1),
        "attn.proj": o,
        "mlp.fc1": torch.einsum("ai,ajt,ot->ijo", U, up.reshape(R, 4, R), V).flatten(1),
        "mlp.fc2": torch.einsum("ti,ajt,oa->jio", U, down.reshape(R, 4, R), V).flatten(0, 1),
    }


FORMS: dict[str, tuple[Callable[[], Tensors], Callable[[Tensors, int], Tensors]]] = {
    "FacT-TT": (train, of_train),
    "FacT-TK": (tucker, of_tucker),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_updates_of_the_formula(
    form: str, tiny_vit: Make, images: Tensor, tmp_path: Path, show: Callable[..., None]
) -> None:
    make, dense = FORMS[form]
    tensors = make()
    model = efft.import_fact(tiny_vit().eval(), tensors, scale=S)
    plain = tiny_vit().eval()
    with torch.no_grad():
        plain.head.weight.copy_(tensors["head.weight"])
        plain.head.bias.copy_(tensors["head.bias"])
        before = plain(images)
        for i in range(L):
            for name, update in dense(tensors, i).items():
                layer = adapted_layers(model)[f"blocks.{i}.{name}"]
                torch.testing.assert_close(layer.delta_weight().t(), S * update, msg=f"{i} {name}")
                plain.get_submodule(f"blocks.{i}.{name}").weight.add_(S * update.t())
        expected = plain(images)
    assert (expected - before).abs().max() > 0.1 * expected.abs().max(), "the update is too small to compare"
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    error = ((model(images) - expected).abs().max() / expected.abs().max()).item()
    show("Imported checkpoints, relative to the largest logit", form, "difference", error)
    again = efft.load_adapter(tiny_vit().eval(), efft.save_adapter(model, tmp_path))
    assert torch.equal(again(images), model(images))


def test_the_number_of_parameters_is_that_of_the_checkpoint(tiny_vit: Make) -> None:
    tensors = train()
    count = efft.count_parameters(efft.import_fact(tiny_vit(), tensors, scale=S))
    assert count.factors + count.head == sum(tensor.numel() for tensor in tensors.values())


Edit = Callable[[Tensors], Any]
REFUSED: dict[str, tuple[Callable[[], Tensors], Edit, str]] = {
    "nothing": (train, lambda t: t.clear(), r"among them 'FacTu\.weight' \[r, d\], got \[\]"),
    "a core less": (
        train,
        lambda t: t.pop("blocks.1.attn.k_FacTs.weight"),
        r"missing tensors: blocks\.1\.attn\.k_FacTs\.weight",
    ),
    "a deeper model": (
        train,
        lambda t: t.update({"blocks.2.attn.q_FacTs.weight": drawn(R, R)}),
        r"unexpected tensors: blocks\.2\.attn\.q_FacTs\.weight",
    ),
    "another depth": (
        tucker,
        lambda t: t.update(FacTp=drawn(R, 144)),
        r"FacTp: expected \[3, 24\], adapter has \[3, 14",
    ),
    "another width": (
        train,
        lambda t: t.update({"FacTu.weight": drawn(R, 8)}),
        r"expected \[3, 16\], adapter has \[3, 8",
    ),
    "other classes": (
        tucker,
        lambda t: t.update({"head.bias": drawn(7)}),
        r"head\.bias: expected \[5\], adapter has \[7\] \(create the model with the adapter's num_classes\)",
    ),
    "both forms": (tucker, lambda t: t.update(train()), "unexpected tensors: .*q_FacTs"),
    "no numbers": (tucker, lambda t: t["FacTc"].fill_(float("inf")), "FacTc has NaN or infinite entries"),
    "integers": (train, lambda t: t.update({"FacTv.weight": torch.ones(D, R, dtype=torch.int8)}), r"is torch\.int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tiny_vit: Make, unchanged: Unchanged) -> None:
    make, edit, message = REFUSED[case]
    tensors = make()
    edit(tensors)
    model = tiny_vit()
    with unchanged(model), pytest.raises(ValueError, match=message):
        efft.import_fact(model, tensors, scale=S)


def test_other_models_and_arguments_are_refused(tiny_vit: Make, tiny_swin: Make, unchanged: Unchanged) -> None:
    for model in (tiny_swin(), tiny_vit(mlp_ratio=2.0)):
        with (
            unchanged(model),
            pytest.raises(ValueError, match="q, k, v, o and an MLP four times as wide in every block"),
        ):
            efft.import_fact(model, train(), scale=S)
    model = tiny_vit()
    with unchanged(model), pytest.raises(ValueError, match="scale must be a number from -1000000"):
        efft.import_fact(model, train(), scale=float("nan"))
    for other in ("models/tt/cifar.pt", {"state": train()}):
        with unchanged(model), pytest.raises(TypeError, match=r"by name: torch\.load\(path, weights_only=True\)"):
            efft.import_fact(model, other, scale=S)
    efft.import_fact(model, train(), scale=S)
    with pytest.raises(ValueError, match="is adapted already"):
        efft.import_fact(model, train(), scale=S)
