"""Compare adapted attention with torch's attention whose weights include the dense updates.

The tests cover ``EfftMultiheadAttention``, torch's encoder and decoder layers with adapted weights, and an
``EfftLinear`` that a user inserts as ``out_proj``.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from efft_kernels import EfftLinear, FactorBank, Site, TTFactors
from efft_kernels.nn import EfftMultiheadAttention
from efft_kernels.nn.adapt import adapt, mark_readers

D, HEADS, TARGETS, SOURCES, BATCH = 6, 2, 3, 4, 2
PACKED = ("in_proj_weight", "out_proj")
APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")


def factors_of(d_in: int, d_out: int, n_cores: int = 1) -> TTFactors:
    factors = TTFactors(d_in, d_out // n_cores, (2, 3), n_cores=n_cores, scale=0.7, dtype=torch.float64)
    for factor in factors.parameters():
        nn.init.normal_(factor, std=0.5)
    return factors


class Pair:
    """Hold an adapted attention layer (``ours``) and a plain copy of it.

    ``reference`` calls the plain copy with the dense sums of weights and updates.
    """

    def __init__(self, names: tuple[str, ...] | None = None, **settings: Any) -> None:
        torch.manual_seed(0)
        self.plain = nn.MultiheadAttention(D, HEADS, dtype=torch.float64, **settings)
        for name, parameter in self.plain.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
        self.ours = copy.deepcopy(self.plain)
        names = names or (PACKED if self.plain._qkv_same_embed_dim else APART)
        self.sums: dict[str, tuple[FactorBank, int]] = {}
        sites = {}
        for name in names:
            key = "out_proj.weight" if name == "out_proj" else name
            d_out, d_in = self.plain.get_parameter(key).shape
            n_cores = d_out // D
            sites[name] = (factors_of(d_in, d_out, n_cores), Site(cores=tuple(range(n_cores))))
            self.sums[key] = (sites[name][0], n_cores)
        self.weights = adapt(self.ours, sites)
        self.leaves = [leaf for bank, _ in sites.values() for leaf in bank.parameters()]

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        sums = {}
        for name, (f, n_cores) in self.sums.items():
            blocks = [f.scale * f.U @ f.C[0, core] @ f.V for core in range(n_cores)]  # type: ignore[operator, index]
            sums[name] = self.plain.get_parameter(name).detach() + torch.cat(blocks, 1).t()
        return functional_call(self.plain, sums, args, kwargs)


def inputs(kind: str, batch_first: bool, kdim: int = D, vdim: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value. ``kind`` states which of them are one tensor and whether there is a batch."""
    lead = () if "unbatched" in kind else (BATCH,)

    def one(n: int, width: int) -> Tensor:
        shape = (*lead, n, width) if batch_first or not lead else (n, *lead, width)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    if "self" in kind:
        x = one(SOURCES, D)
        return x, x, x
    if "cross" in kind:
        k = one(SOURCES, D)
        return one(TARGETS, D), k, k
    return one(TARGETS, D), one(SOURCES, kdim), one(SOURCES, vdim)


def masks(kind: str, batched: bool, targets: int) -> dict[str, Any]:
    torch.manual_seed(1)
    shape: tuple[int, ...] = (targets, SOURCES)
    if "3-D" in kind:
        shape = ((BATCH if batched else 1) * HEADS, *shape)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    padding = torch.zeros(*((BATCH,) if batched else ()), SOURCES, dtype=torch.bool)
    padding[..., -1] = True
    found: dict[str, Any] = {}
    if "bool" in kind:
        found["attn_mask"] = hidden
    if "float" in kind:
        found["attn_mask"] = torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    if "padding" in kind:
        found["key_padding_mask"] = padding
    if "causal" in kind:
        found["attn_mask"] = torch.ones(targets, SOURCES, dtype=torch.bool).triu(1)
        found["is_causal"] = True
    return found


def check(pair: Pair, qkv: tuple[Tensor, Tensor, Tensor], **kwargs: Any) -> None:
    (y, weights), (expected, expected_weights) = pair.ours(*qkv, **kwargs), pair.reference(*qkv, **kwargs)
    torch.testing.assert_close(y, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)
    wanted = [*pair.leaves, *dict.fromkeys(qkv)]
    gy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, gy), torch.autograd.grad(expected, wanted, gy), strict=True):
        torch.testing.assert_close(ours, theirs)


KINDS = ["self", "cross", "three", "unbatched cross"]
MASKS = ["none", "bool", "float", "bool 3-D", "float 3-D", "padding", "bool padding", "float 3-D padding", "causal"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_and_inputs(kind: str, mask: str) -> None:
    for batch_first, need_weights in itertools.product((True, False), (True, False)):
        pair = Pair(batch_first=batch_first, bias=batch_first is need_weights)
        qkv = inputs(kind, batch_first)
        targets = SOURCES if "self" in kind else TARGETS
        check(pair, qkv, need_weights=need_weights, **masks(mask, "unbatched" not in kind, targets))


@pytest.mark.parametrize("mask", ["none", "float 3-D", "bool padding", "causal"])
@pytest.mark.parametrize("kind", ["self", "three", "unbatched cross"])
@pytest.mark.parametrize(
    "settings",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=lambda settings: " ".join(settings),
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_what_is_added_to_keys_and_values(settings: dict[str, bool], kind: str, mask: str) -> None:
    targets = SOURCES if "self" in kind else TARGETS
    for need_weights in (True, False):
        given = masks(mask, "unbatched" not in kind, targets)
        check(Pair(batch_first=True, **settings), inputs(kind, True), need_weights=need_weights, **given)


@pytest.mark.parametrize("kind", ["three", "unbatched three"])
def test_projections_of_their_own(kind: str) -> None:
    for bias in (True, False):
        pair = Pair(batch_first=True, kdim=4, vdim=5, bias=bias)
        check(pair, inputs(kind, True, 4, 5))


@pytest.mark.parametrize("name", PACKED)
def test_one_of_its_weights_alone(name: str) -> None:
    for kind in ("self", "cross"):
        pair = Pair((name,), batch_first=True)
        assert isinstance(pair.ours, EfftMultiheadAttention)
        check(pair, inputs(kind, True), average_attn_weights=False)


def test_dropout_is_torchs_own() -> None:
    pair, qkv = Pair(batch_first=True, dropout=0.4), inputs("self", True)
    results = []
    for run in (pair.ours, pair.reference):
        torch.manual_seed(3)
        results.append(run(*qkv))
    torch.testing.assert_close(*results)
    assert not torch.allclose(pair.ours(*qkv)[0], results[0][0])
    pair.ours.eval()
    pair.plain.eval()
    torch.testing.assert_close(pair.ours(*qkv), pair.reference(*qkv))


def test_switched_off_it_is_torchs_own() -> None:
    """With disabled updates, the output exactly equals torch's. With merged updates, it equals the dense sums' output.

    In eval mode without gradients, torch's attention may run a fused kernel.
    """
    pair, (x, _, _) = Pair(batch_first=True), inputs("self", True)
    pair.ours.eval()
    pair.plain.eval()
    for weight in pair.weights.values():
        weight.enabled = False
    with torch.no_grad():
        torch.testing.assert_close(pair.ours(x, x, x), pair.plain(x, x, x), rtol=0, atol=0)
    for weight in pair.weights.values():
        weight.enabled = True
        weight.merge()
    with torch.no_grad():
        torch.testing.assert_close(pair.ours(x, x, x), pair.reference(x, x, x))


def test_what_it_refuses() -> None:
    pair, (x, _, _) = Pair(batch_first=True), inputs("self", True)
    nested = torch.nested.nested_tensor([torch.randn(n, D, dtype=torch.float64) for n in (2, 3)])
    with pytest.raises(NotImplementedError, match="does not accept nested tensors: pad the inputs"):
        pair.ours(nested, nested, nested)
    with pytest.raises(RuntimeError, match="expected attn_mask with is_causal=True"):
        pair.ours(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn_mask: expected shape \[4, 4\], got \[4, 3\]"):
        pair.ours(x, x, x, attn_mask=torch.zeros(4, 3))
    with pytest.raises(RuntimeError, match=r"key_padding_mask: expected shape \[2, 4\], got \[2, 3\]"):
        pair.ours(x, x, x, key_padding_mask=torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"a mask of booleans or floating-point numbers, got torch\.int64"):
        pair.ours(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="of 3 dimensions, or of 2 without a batch, got shapes"):
        pair.ours(x, x[0], x[0])


# The fast paths of torch's transformer blocks

PARTS = ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")


def adapted_encoder(names: tuple[str, ...], n_layers: int = 2, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Return an encoder with updates and a plain encoder with the updates merged, both in eval mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, HEADS, 8, batch_first=True, dtype=torch.float64, **settings)
    ours = nn.TransformerEncoder(layer, n_layers).eval()
    merged = copy.deepcopy(ours)
    sites = {}
    for name in names:
        key = name if name.endswith("_weight") else f"{name}.weight"
        d_out, d_in = ours.get_parameter(key).shape
        sites[name] = (factors_of(d_in, d_out), Site())
    for name, weight in adapt(ours, sites).items():
        key = name if name.endswith("_weight") else f"{name}.weight"
        with torch.no_grad():
            merged.get_parameter(key).add_(weight.delta_weight())
    return ours, merged


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("names", [PARTS, *((part,) for part in PARTS)], ids=" ".join)
@pytest.mark.parametrize("which", ["every layer", "the second layer"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoders_in_eval_mode(names: tuple[str, ...], norm_first: bool, which: str) -> None:
    layers = (0, 1) if which == "every layer" else (1,)
    ours, merged = adapted_encoder(tuple(f"layers.{i}.{n}" for i in layers for n in names), norm_first=norm_first)
    x = torch.randn(BATCH, SOURCES, D, dtype=torch.float64)
    padding = torch.tensor([[False] * SOURCES, [False, False, True, True]])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x), merged(x))
            torch.testing.assert_close(ours.layers[1](x), merged.layers[1](x))  # type: ignore[index, operator]
            y, expected = (m(x, src_key_padding_mask=padding)[~padding] for m in (ours, merged))
            torch.testing.assert_close(y, expected)
    assert ours.use_nested_tensor == merged.use_nested_tensor


def test_decoders_in_eval_mode() -> None:
    torch.manual_seed(0)
    ours = nn.TransformerDecoderLayer(D, HEADS, 8, batch_first=True, dtype=torch.float64).eval()
    merged = copy.deepcopy(ours)
    names = {"self_attn.in_proj_weight": (D, 3 * D), "multihead_attn.in_proj_weight": (D, 3 * D)}
    names |= {"multihead_attn.out_proj": (D, D), "linear1": (D, 8)}
    for name, weight in adapt(ours, {name: (factors_of(*sizes), Site()) for name, sizes in names.items()}).items():
        key = name if name.endswith("_weight") else f"{name}.weight"
        with torch.no_grad():
            merged.get_parameter(key).add_(weight.delta_weight())
    x, memory = torch.randn(2, BATCH, SOURCES, D, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x, memory), merged(x, memory))


def test_the_output_layer_alone_in_torchs_own_forward() -> None:
    """If a user inserts the adapted layer by hand, the attention reads the layer's weight including the update."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64).eval()
    ours = copy.deepcopy(plain)
    ours.out_proj = EfftLinear(ours.out_proj, factors_of(D, D), Site())  # type: ignore[assignment]
    with torch.no_grad():
        plain.out_proj.weight.add_(ours.out_proj.delta_weight())
    x = torch.randn(BATCH, SOURCES, D, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x, x, x), plain(x, x, x))
    assert ours.out_proj.binding.dense
    assert mark_readers(ours) == {"out_proj": "MultiheadAttention"}
    ours.out_proj.binding.dense = False
    torch.testing.assert_close(ours(x, x, x), plain(x, x, x))
    assert not ours.out_proj.binding.dense
