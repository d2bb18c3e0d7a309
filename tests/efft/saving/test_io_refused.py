"""Test errors for damaged files and unsuitable models. Each error states the reason, and the model does not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from tests.adapter_files import CONFIG, WEIGHTS, edit_config, edit_weights, write_weights

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]
Edit = Callable[[dict[str, Any]], Any]


def refuse(model: nn.Module, folder: Path, message: str, unchanged: Unchanged, **options: Any) -> None:
    """Check that loading raises ValueError with ``message`` (a regular expression) and changes nothing."""
    with unchanged(model), pytest.raises(ValueError, match=message):
        efft.load_adapter(model, folder, **options)


def test_no_adapter(tiny_vit: Make, tmp_path: Path, unchanged: Unchanged) -> None:
    model = tiny_vit()
    with (
        unchanged(model),
        pytest.raises(FileNotFoundError, match=r"expected adapter_config.json and .*, found no such folder"),
    ):
        efft.load_adapter(model, tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with unchanged(model), pytest.raises(FileNotFoundError, match=r"found \['config.json'\]"):
        efft.load_adapter(model, tmp_path)


@pytest.mark.parametrize("length", [0, 4, 8, 60, 400, -1])
def test_truncated_weights(length: int, saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged) -> None:
    _, folder = saved
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:length])
    refuse(tiny_vit(), folder, r"adapter_model\.safetensors is damaged or of another save: ", unchanged)
    write_weights(folder, content[:length])
    refuse(tiny_vit(), folder, r"adapter_model\.safetensors is damaged or not a safetensors file: ", unchanged)


def test_flipped_bits_in_the_header(
    saved: tuple[nn.Module, Path], tiny_vit: Make, images: Tensor, unchanged: Unchanged
) -> None:
    """Flip one bit of each byte. The file must be rejected, unless the bit is in metadata or white space."""
    model, folder = saved
    expected = model(images)
    content = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    harmless = 0
    fresh = tiny_vit().eval()
    for i in range(header):
        flipped = bytearray(content)
        flipped[i] ^= 1 << (i % 8)
        write_weights(folder, flipped)
        try:
            efft.load_adapter(fresh, folder)
        except ValueError:
            assert not hasattr(fresh, "efft"), f"bit {i % 8} of byte {i}: refused, but applied"
        else:
            assert torch.equal(fresh(images), expected), f"bit {i % 8} of byte {i}"
            harmless += 1
            fresh = tiny_vit().eval()
    assert harmless < 60
    with unchanged(fresh):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"config": {}, "base": {}}', "\x00\xff", '{"r": 8}'])
def test_damaged_configuration(text: str, saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged) -> None:
    _, folder = saved
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    refuse(tiny_vit(), folder, r"adapter_config\.json is not (JSON|an EFFT adapter configuration): ", unchanged)


DAMAGE: dict[str, tuple[Edit, str]] = {
    "value": (lambda d: d["config"].update(rank="big"), r"EfftConfig\.rank must be .*, got 'big'"),
    "method": (
        lambda d: d["config"].update(method="prefix"),
        r"unknown method 'prefix'; this version knows efft, lora, ",
    ),
    "a layer that is not there": (
        lambda d: d["plan"][0]["weights"].update(nowhere="layer=0 cores=0:3"),
        "does not fit this VisionTransformer: it has no layer 'nowhere'",
    ),
    "a plan without names": (lambda d: d["plan"][0].pop("name"), "every group of 'plan' must be an object with a name"),
    "a group that no module can be": (lambda d: d["plan"][0].update(name="a.b"), "which a module cannot have"),
    "a group that is called as what the model has": (
        lambda d: d["plan"][0].update(name="forward"),
        "which a module cannot",
    ),
    "a group twice": (lambda d: d["plan"].append(d["plan"][0]), "'plan' has '.*' 2 times"),
    "a dtype that is no name": (lambda d: d["base"].update(dtype=None), "'base.dtype' must be a string"),
    "a plan without weights": (lambda d: d["plan"][0].update(weights={}), "must name its weights"),
    "a site that is none": (
        lambda d: d["plan"][0]["weights"].update({"blocks.0.attn.qkv": "layer=-1"}),
        "'plan' has no valid place in its tensor train for a weight: 'layer=-1'",
    ),
    "a site outside its train": (
        lambda d: d["plan"][0]["weights"].update({"blocks.0.attn.qkv": "layer=7 cores=0:3"}),
        "does not fit a bank of 2 layers",
    ),
    "a site of other sizes": (
        lambda d: d["plan"][0]["weights"].update({"blocks.0.attn.qkv": "layer=0 cores=0:2"}),
        r"blocks.0.attn.qkv' is of size \(16, 48\), but its update in the adapter is of size \(16, 32\)",
    ),
    "sizes of a train": (
        lambda d: d["plan"][0].update(sizes=[16, 16, 2, 2**40]),
        "the plan of group 'mhsa' is damaged",
    ),
    "a rank": (lambda d: d["plan"][0].update(rank=[4, "4"]), "the plan of group 'mhsa' is damaged"),
    "two heads": (
        lambda d: (d["config"].update(head=["head"]), d.update(head=[])),
        r"its 'head' \[\] is not the one in its 'config', \['head'\]",
    ),
    "head": (
        lambda d: d.update(head=["nowhere"]),
        "does not fit this VisionTransformer: head: no module named 'nowhere'",
    ),
}
WRONG_ERROR: dict[str, Edit] = {
    "no layers": lambda d: d["base"].pop("layers"),
    "no fingerprint": lambda d: d["base"].pop("fingerprint"),
    "base a list": lambda d: d.update(base=[]),
    "config a number": lambda d: d.update(config=5),
    "head a number": lambda d: d.update(head=3),
    "version a string": lambda d: d["config"].update(format_version="2"),
    "dropout a string": lambda d: d["config"].update(dropout="x"),
    "exclude null": lambda d: d["config"].update(exclude=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_values_in_the_configuration(
    damage: str, saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    edit, message = DAMAGE[damage]
    edit_config(folder, edit)
    refuse(tiny_vit(), folder, message, unchanged)


@pytest.mark.parametrize("damage", WRONG_ERROR)
def test_damaged_types_in_the_configuration(
    damage: str, saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    edit_config(folder, WRONG_ERROR[damage])
    refuse(tiny_vit(), folder, r"adapter_config\.json|EfftConfig\.", unchanged)


@pytest.mark.parametrize(
    "values",
    [{"method": []}, {"rank": 10**9}, {"rank": 10**30}, {"scale": 10**400}, {"method": "tenslora", "ranks": 5}],
    ids=str,
)
def test_values_beyond_all_bounds(
    values: dict[str, Any], saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    edit_config(folder, lambda d: d["config"].update(values))
    refuse(tiny_vit(), folder, r"is not an EFFT adapter configuration|does not fit this|must be", unchanged)


def test_a_configuration_that_is_nested_too_deeply(
    saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    (folder / CONFIG).write_text("[" * 200_000)
    refuse(tiny_vit(), folder, r"is not usable JSON: it is nested too deeply", unchanged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("adapted", [False, True])
def test_nonfinite_tensors(
    value: float, adapted: bool, saved: tuple[nn.Module, Path], tiny_vit: Make, adapted_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    edit_weights(folder, lambda tensors: tensors["efft.ffn.C"].view(-1)[3:4].fill_(value))
    model = adapted_vit(scale=0.7) if adapted else tiny_vit()
    refuse(model, folder, r"is damaged: efft\.ffn\.C has NaN or infinite entries", unchanged)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64], ids=str)
def test_factors_that_are_no_floating_point_numbers(
    dtype: torch.dtype, saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    edit_weights(folder, lambda tensors: tensors.update({"efft.mhsa.U": tensors["efft.mhsa.U"].to(dtype)}))
    refuse(tiny_vit(), folder, f"is damaged: efft.mhsa.U is {dtype}, expected floating-point numbers", unchanged)


def test_missing_and_unexpected_tensors(
    saved: tuple[nn.Module, Path], tiny_vit: Make, adapted_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["efft.extra.U"] = tensors.pop("efft.mhsa.U")
        del tensors["head.bias"]

    edit_weights(folder, edit)
    message = (
        r"does not fit this VisionTransformer:\n- missing tensors: efft\.mhsa\.U, head\.bias\n"
        r"- unexpected tensors: efft\.extra\.U$"
    )
    for model in (tiny_vit(), adapted_vit(scale=0.7)):
        refuse(model, folder, message, unchanged)


def test_strict_false_warns_and_loads_the_rest(saved: tuple[nn.Module, Path], adapted_vit: Make) -> None:
    source, folder = saved
    edit_weights(folder, lambda tensors: (tensors.pop("head.bias"), tensors.update(extra=torch.zeros(1))))
    model = adapted_vit(scale=0.7, std=0.1)
    bias = model.head.bias.detach().clone()
    with pytest.warns(UserWarning, match=r"missing tensors: head.bias\n- unexpected tensors: extra"):
        efft.load_adapter(model, folder, strict=False)
    assert torch.equal(model.head.bias, bias)
    assert torch.equal(model.head.weight, source.head.weight)
    assert all(torch.equal(p, source.get_parameter(n)) for n, p in efft.named_factors(model))


def test_wrong_shapes_are_refused_without_strict_too(
    saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    for strict in (True, False):
        message = (
            r"- wrong shapes: head\.bias: expected \[7\], adapter has \[5\]; head\.weight: expected \[7, 16\], "
            r"adapter has \[5, 16\] \(create the model with the adapter's num_classes\)"
        )
        refuse(tiny_vit(num_classes=7), folder, message, unchanged, strict=strict)
    edit_weights(folder, lambda tensors: tensors.update({"efft.ffn.U": torch.zeros(16, 5)}))
    refuse(tiny_vit(), folder, r"- wrong shapes: efft\.ffn\.U: expected \[16, 4\], adapter has \[16, 5\]$", unchanged)


def test_a_head_of_another_width_is_no_matter_of_classes(
    saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    edit_weights(folder, lambda tensors: tensors.update({"head.weight": torch.zeros(5, 24)}))
    refuse(tiny_vit(), folder, r"- wrong shapes: head\.weight: expected \[5, 16\], adapter has \[5, 24\]$", unchanged)


def test_other_weights_of_the_same_architecture(
    saved: tuple[nn.Module, Path], tiny_vit: Make, unchanged: Unchanged
) -> None:
    source, folder = saved
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.add_(1e-3)
    message = (
        r"- the base weights are not those it was trained on \(fingerprints differ\); load the same pretrained weigh"
    )
    refuse(model, folder, message, unchanged)
    with pytest.warns(UserWarning, match=message):
        efft.load_adapter(model, folder, strict=False)
    assert torch.equal(model.efft["mhsa"].U, source.efft["mhsa"].U)


def test_other_depth_width_and_architecture(
    saved: tuple[nn.Module, Path], tiny_vit: Make, tiny_swin: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    refuse(
        tiny_vit(depth=3),
        folder,
        r"- the base weights are not those it was trained on \(fingerprints differ\)",
        unchanged,
    )
    refuse(
        tiny_vit(depth=1),
        folder,
        r"it has no layer 'blocks\.1\.attn\.qkv', which the adapter changes \(it was trained on a VisionTransformer\)",
        unchanged,
    )
    refuse(
        tiny_vit(embed_dim=32),
        folder,
        r"with other layers: blocks\.0\.attn\.qkv is \[96, 32\], adapter's base had \[48, 16\]; ",
        unchanged,
    )
    refuse(tiny_swin(), folder, r"does not fit this SwinTransformer: it has no layer 'blocks\.0\.attn\.qkv'", unchanged)
    message = r"the adapter in .* does not fit this Sequential: head: no module named 'head'"
    refuse(nn.Sequential(nn.Linear(4, 4)), folder, message, unchanged)


def test_other_configuration_on_an_adapted_model(
    saved: tuple[nn.Module, Path], adapted_vit: Make, unchanged: Unchanged
) -> None:
    _, folder = saved
    message = (
        r"was trained with another configuration \(rank: model 2, adapter 4; scale: model 1\.0, adapter 0\.7\); call "
        r"efft\.remove\(model\) first and let load_adapter apply the saved configuration"
    )
    refuse(adapted_vit(rank=2), folder, message, unchanged)
    refuse(
        adapted_vit(scale=0.7, core_sharing="shared"), folder, "core_sharing: model 'shared', adapter 'per", unchanged
    )
    refuse(adapted_vit(scale=0.7, head=[]), folder, r"head: model \[\], adapter \['head'\]", unchanged)


@pytest.mark.parametrize(("part", "key"), [("config", "scale"), ("base", "fingerprint")])
def test_descriptions_with_a_gap(
    part: str, key: str, adapted_vit: Make, tiny_vit: Make, tmp_path: Path, unchanged: Unchanged
) -> None:
    """A missing value must not be replaced by its default, which may differ from the value of the training."""
    folder = efft.save_adapter(adapted_vit(), tmp_path)
    description = json.loads((folder / CONFIG).read_text())
    del description[part][key]
    (folder / CONFIG).write_text(json.dumps(description))
    refuse(tiny_vit(), folder, rf"adapter_config\.json is not .*: its '{part}' lacks {key}", unchanged)


def test_lora_folders_are_refused(tiny_vit: Make, tmp_path: Path, unchanged: Unchanged) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    lora = peft.get_peft_model(tiny_vit(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    lora.save_pretrained(tmp_path)
    assert {WEIGHTS, CONFIG} <= {p.name for p in tmp_path.iterdir()}
    message = r"adapter_config\.json is not an EFFT adapter configuration: it needs the keys config, base, head"
    refuse(tiny_vit(), tmp_path, message, unchanged)
