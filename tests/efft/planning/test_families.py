"""Test adapting, gradients, saving, merging and exporting, for the many families of models in ``families.FAMILIES``.

Models are in float64. Differences are compared with the effect of rounding, which is the change of the output if every
weight changes by a few hundred units in its last place (:func:`noise_of`). Many models compute norms or a softmax in
float32 for weights of any dtype, and this measure includes that effect.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels import ExpertWeight
from tests.efft.planning.families import FAMILIES, Inputs, make, output_of

#: A pattern of the names of blocks in these families.
BLOCKS = re.compile(r"(blocks?|layers?|stages|features|network|groups|\bh)\.\d+\.|layer_?\d+\.|\bs\d\.b\d+\.")

#: Layers before or between the blocks, which do not belong to a block.
BETWEEN = {
    "swin": r"downsample\.reduction",
    "swin-of-torchvision": r"features\.2\.reduction",
    "volo": r"network\.1\.proj",
    "wav2vec2": r"conv_layers\.0\.",
}

#: Parameters that are not adapted although they exceed 1 % of the weights in blocks. The warning must name them. They
#: are tables of positions and segments, whose rows are looked up, and decays of state space models.
LEFT_OUT = {
    "beit": "relative_position_bias_table",
    "swin": "relative_position_bias_table",
    "mvitv2": r"rel_pos_[hw]",
    "xlnet": "seg_embed",
    "funnel": "seg_embed",
    "mamba": "A_log",
    "jamba": "A_log",
    "zamba": r"A_log|D$",
}

#: Parameters that correctly have no gradient. The first self-attention of DETR's decoder reads only zeros.
NO_GRADIENT = {"detr": r"decoder\.layers\.0\.self_attn\.v_proj"}

#: For each error text, the families whose update peft cannot represent exactly for this reason.
_NO_LORA = {
    "is a grouped convolution, for which peft has no such update": "pit gcvit xcit twins coatnet maxvit edgenext davit "
    "focalnet convnext convnextv2 mambaout regnet efficientnet mobilenetv3 mobilenetv4 repvit segformer "
    "mvitv2",
    "reads its weight, and would miss an update in a layer of peft": "beit eva02 swinv2 swin-of-torchvision fastvit "
    "mamba jamba",
    "dimensions, and peft can adapt only matrices and experts": "resnetv2 nfnet xlnet",
    "is a parameter of a ZambaMambaMixer": "zamba",
    "is a parameter of a FunnelRelMultiheadAttention": "funnel",
    "is a parameter of a MultiheadAttention": "vit-of-torchvision torch's-encoder torch's-decoder torch's-transformer",
    "where transformers 4 had layers of that name": "deepseek-v3 llama4",
}
NO_LORA = {family: text for text, own in _NO_LORA.items() for family in own.split()}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    model, inputs = make(family)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        base = output_of(model, inputs)
    before = look(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        efft.apply(model, efft.EfftConfig(rank=2))
    check_what_is_left_out(family, model, [str(w.message) for w in said])

    with torch.no_grad():
        torch.testing.assert_close(output_of(model, inputs), base, rtol=0, atol=noise_of(plain, inputs), msg="step 0")

    randomize(model)
    live = check_gradients(family, model, inputs)
    merged = copy.deepcopy(plain)
    merged.load_state_dict(efft.merged_state_dict(model))
    noise, effect = noise_of(merged, inputs), (live - base).abs().max().item()
    assert effect > 1e3 * noise, (
        f"the update changes the output by {effect:.1e}, rounding by {noise:.1e}: it is too small to test"
    )
    efft.save_adapter(model, tmp_path / "adapter")
    again = efft.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    outputs = {"merged_state_dict": merged, "reloaded": again}
    if family in NO_LORA:
        with pytest.raises(ValueError, match=NO_LORA[family]):
            efft.export_lora(model, tmp_path / "lora")
    else:
        outputs["exported"] = in_peft(model, copy.deepcopy(plain), tmp_path / "lora")
    with torch.no_grad():
        errors = {name: (output_of(other, inputs) - live).abs().max().item() for name, other in outputs.items()}
        efft.merge(model)
        errors["merged"] = (output_of(model, inputs) - live).abs().max().item()
        efft.unmerge(model)
        errors["unmerged"] = (output_of(model, inputs) - live).abs().max().item()
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= noise}
    assert not wrong, f"errors {wrong}, where rounding changes {noise:.1e} and the update {effect:.1e}"

    efft.remove(model)
    after = look(model)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []
    with torch.no_grad():
        assert torch.equal(output_of(model, inputs), base)


def noise_of(model: nn.Module, inputs: Inputs) -> float:
    """Return the change of the output if every weight changes randomly by a relative 1e-13."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.mul_(1 + 1e-13 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        return (output_of(moved, inputs) - output_of(model, inputs)).abs().max().item()


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, factor in efft.named_factors(model):
            factor.copy_(0.4 * torch.randn(factor.shape, generator=generator, dtype=torch.float64))


def look(model: nn.Module) -> dict[str, object]:
    """Return the tensors of the state dict as bytes, the class of every module, and which tensors require gradients."""
    seen: dict[str, object] = {f"{name} is a": (id(m), type(m)) for name, m in model.named_modules()}
    seen |= {f"{name} requires": p.requires_grad for name, p in model.named_parameters()}
    state = model.state_dict().items()
    return seen | {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in state}


def check_what_is_left_out(family: str, model: nn.Module, said: list[str]) -> None:
    """Check that 99 % of the matrices in blocks are adapted, or that ``LEFT_OUT`` and the warning name the others."""
    names = efft.adapted_layers(model).keys()
    head = tuple(f"{name}." for name in model.efft.head)
    inside = {n: p for n, p in model.named_parameters() if BLOCKS.search(n) and not n.startswith(head)}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    outside = re.compile(BETWEEN.get(family, "$^"))
    sizes = {
        name: p.numel()
        for name, p in inside.items()
        if p.dim() > 1
        and len(p) < p.numel() > p[0].numel()  # a matrix, or a stack of matrices
        and not name.endswith("bias")
        and name not in tables
        and not outside.search(name)
    }
    assert sizes
    left = {name: size for name, size in sizes.items() if not {name, name.removesuffix(".weight")} & names}
    share = sum(left.values()) / sum(sizes.values())
    untouched = [text for text in said if "stay untouched" in text]
    if family not in LEFT_OUT:
        assert share <= 0.01, f"{share:.1%} is left out: {list(left)}"
        return
    assert untouched, f"{share:.1%} is left out without a warning: {list(left)}"
    unnamed = [name for name in left if not re.search(LEFT_OUT[family], name)]
    assert not unnamed, f"LEFT_OUT does not name {unnamed}"
    assert re.search(LEFT_OUT[family], untouched[0])


def check_gradients(family: str, model: nn.Module, inputs: Inputs) -> Tensor:
    """Check that a backward pass reaches every factor, and every core of the factors; return the output."""
    output = output_of(model, inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=output.dtype)
    (output * weights).sum().backward()
    without = [name for name, p in efft.named_factors(model) if p.grad is None or not p.grad.any()]
    assert not without, f"no gradient: {without}"
    for name, update in efft.adapted_layers(model).items():
        gradient = update.factors.C.grad[update.site.layer, list(update.site.cores)]
        reached = gradient.flatten(1).any(1)
        assert torch.isfinite(gradient).all()
        if re.search(NO_GRADIENT.get(family, "$^"), name):
            assert not reached.any()
        else:  # an expert without a token has no gradient
            assert reached.any() if isinstance(update, ExpertWeight) else reached.all(), f"no gradient: {name}"
    return output.detach()


def in_peft(model: nn.Module, plain: nn.Module, folder: Path) -> nn.Module:
    """Export the adapter to ``folder``, load it with peft into ``plain``, and return that model."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    efft.export_lora(model, folder)
    wrapped: nn.Module = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
    return wrapped.base_model.model
