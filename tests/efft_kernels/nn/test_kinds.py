"""Test every kind of adapted weight against the plain module that computes with the dense sum in fp64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from efft_kernels import Site, TTFactors
from efft_kernels.nn.adapt import adapt, named_adapted_weights, restore, state_name
from efft_kernels.nn.adapted import AdaptedWeight, matrix_sizes


class Conv1D(nn.Module):
    """Compute the same function as the Conv1D in transformers' GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def __repr__(self) -> str:
        return "Conv1D"

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Standardized(nn.Conv2d):
    """Compute a convolution with a custom forward method, like timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight
        W = (W - W.mean((1, 2, 3), keepdim=True)) / W.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, W, self.bias)


class Reads(nn.Module):
    """Multiply by the module's own parameters in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(6, 5))
        self.stored = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.packed, self.bias) * self.packed.shape[0]
        return F.linear(y, self.packed.t()) @ self.packed[:4].t() + y @ self.stored


class ReadsHeads(nn.Module):
    """Multiply by one matrix per head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(2, 3, 5))

    def forward(self, x: Tensor) -> Tensor:  # [..., 5] -> [..., 2, 3]
        return torch.einsum("...i,hoi->...ho", x, self.heads)


class ReadsChild(nn.Module):
    """Multiply by the weight of a child layer without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.qkv.weight, bias=self.qkv.bias)


class Attends(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **settings)
        nn.init.normal_(self.attention.out_proj.bias)
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        k, v = (x[..., : self.settings.get(name, 6)] for name in ("kdim", "vdim"))
        return self.attention(x, k if "kdim" in self.settings else x, v if "vdim" in self.settings else x)[0]


@dataclass
class Case:
    make: Callable[[], nn.Module]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    views: dict[str, str] = field(default_factory=dict)
    integers: bool = False


def conv(kind: type[nn.Module], shape: tuple[int, ...], **settings: Any) -> Case:
    return Case(lambda: nn.Sequential(kind(6, 12, **settings)), ("0",), (2, 6, *shape))


CASES = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(5, 7)), ("0",), (3, 2, 5)),
    "Conv1D": Case(lambda: nn.Sequential(Conv1D(7, 5), Conv1D(3, 7)), ("0", "1"), (3, 2, 5)),
    "conv1d": conv(nn.Conv1d, (9,), kernel_size=3, stride=2, padding=1, padding_mode="reflect"),
    "conv1d of one position": conv(nn.Conv1d, (9,), kernel_size=1, bias=False),
    "conv2d in groups": conv(nn.Conv2d, (5, 7), kernel_size=3, groups=3, padding="same", padding_mode="circular"),
    "conv2d depthwise": conv(nn.Conv2d, (5, 7), kernel_size=3, groups=6, stride=2),
    "conv3d": conv(nn.Conv3d, (3, 5, 4), kernel_size=(2, 3, 1), dilation=(1, 2, 1), padding=(0, 1, 0)),
    "conv3d in groups": conv(nn.Conv3d, (3, 5, 4), kernel_size=2, groups=2, bias=False),
    "embedding": Case(lambda: nn.Sequential(nn.Embedding(5, 7)), ("0",), (3, 4), integers=True),
    "forward of its own": Case(
        lambda: nn.Sequential(Standardized(3, 4, 3)), ("0.weight",), (2, 3, 6, 5), {"0.weight": "convolution"}
    ),
    "parameters": Case(Reads, ("packed", "stored"), (3, 5), {"stored": "transposed"}),
    "parameter of several heads": Case(ReadsHeads, ("heads",), (4, 5), {"heads": "stacked"}),
    "read by the parent": Case(ReadsChild, ("qkv",), (3, 5)),
    "attention": Case(Attends, ("attention.in_proj_weight", "attention.out_proj"), (2, 4, 6)),
    "attention's output": Case(Attends, ("attention.out_proj",), (2, 4, 6)),
    "attention of other widths": Case(
        lambda: Attends(kdim=4, vdim=5, add_zero_attn=True),
        tuple(f"attention.{part}" for part in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")),
        (2, 4, 6),
    ),
    "encoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, dropout=0, batch_first=True), 2).eval(),
        tuple(f"layers.1.{name}" for name in ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")),
        (2, 4, 6),
    ),
}


class Adapted:
    """Hold an adapted module (``model``) and a plain copy of it.

    ``reference`` calls the plain copy with the dense sums of weights and updates.
    """

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.case, self.plain = case, case.make().to(dtype)
        self.model = copy.deepcopy(self.plain)
        modules = dict(self.model.named_modules())
        sites = {}
        for name in case.names:
            weight = modules[name] if name in modules else self.model.get_parameter(name)
            sizes = matrix_sizes(weight, case.views.get(name, "linear"))
            factors = TTFactors(*sizes, (2, 3), scale=0.7, dtype=torch.promote_types(dtype, torch.float32))
            for factor in factors.parameters():
                nn.init.normal_(factor, std=0.5)
            sites[name] = (factors, Site())
        self.originals = {name: modules[name] for name in case.names if name in modules}
        self.weights = adapt(self.model, sites, views=case.views)
        self.leaves = [factor for bank, _ in sites.values() for factor in bank.parameters()]

    def input(self) -> Tensor:
        if self.case.integers:
            return torch.randint(0, 5, self.case.shape)
        return torch.randn(self.case.shape, dtype=next(self.plain.parameters()).dtype)

    def dense(self, weight: AdaptedWeight) -> Tensor:
        """Return the update [d_in, d_out] by the formula of the tensor train, laid out like the parameter."""
        f: Any = weight.factors
        delta = f.scale * f.U @ f.C[0, 0] @ f.V
        name = next(name for name, other in self.weights.items() if other is weight)
        shape = self.plain.get_parameter(state_name(name, weight)).shape
        kind = type(weight).__mro__[0].__name__
        as_it_is = self.case.views.get(name) == "transposed" or "Conv1D" in kind or "Embedding" in kind
        return delta.reshape(shape) if as_it_is else delta.t().reshape(shape)

    def reference(self, x: Tensor) -> Tensor:
        """Return the output of the plain module with its parameters replaced by the dense sums."""
        parameters = {state_name(name, weight): weight for name, weight in self.weights.items()}
        sums = {n: self.plain.get_parameter(n).detach() + self.dense(w) for n, w in parameters.items()}
        with torch.enable_grad():
            result: Tensor = functional_call(self.plain, sums, x)
        return result


@pytest.fixture(params=CASES)
def adapted(request: pytest.FixtureRequest) -> Adapted:
    return Adapted(CASES[request.param])


def test_output_and_gradients(adapted: Adapted) -> None:
    x = adapted.input()
    wanted = [*adapted.leaves, *([] if adapted.case.integers else [x.requires_grad_()])]
    y, expected = adapted.model(x), adapted.reference(x)
    torch.testing.assert_close(y, expected)
    gy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, gy), torch.autograd.grad(expected, wanted, gy), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(adapted.model(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(adapted.model(x), expected)
    assert not any(p.requires_grad and p.grad is not None for p in adapted.model.parameters())


def test_in_a_pass_every_weight_is_used(adapted: Adapted) -> None:
    x, banks = adapted.input(), [weight.factors for weight in adapted.weights.values()]
    for bank in banks:
        bank.prepare()
    y = adapted.model(x)
    assert [bank.release() for bank in banks] == [[]] * len(banks)
    torch.testing.assert_close(y, adapted.reference(x))


def test_merging_and_switching_off(adapted: Adapted) -> None:
    x = adapted.input()
    plain, expected = adapted.plain(x), adapted.reference(x)
    memory = {name: weight.stored.data_ptr() for name, weight in adapted.weights.items()}
    for weight in adapted.weights.values():
        weight.enabled = False
    torch.testing.assert_close(adapted.model(x), plain)
    for name, weight in adapted.weights.items():
        weight.enabled = True
        torch.testing.assert_close(weight.delta_weight(), adapted.dense(weight))
        loss = weight.merge()
        assert loss is not None
        assert loss.relative_error < 1e-10
        assert weight.merge() is None
        assert weight.stored.data_ptr() == memory[name]
        before = adapted.plain.get_parameter(state_name(name, weight))
        torch.testing.assert_close(weight.stored - before, adapted.dense(weight))
    torch.testing.assert_close(adapted.model(x), expected)
    assert adapted.model.state_dict().keys() == adapted.plain.state_dict().keys()
    for weight in adapted.weights.values():
        weight.unmerge()
    torch.testing.assert_close(adapted.model(x), expected)
    for name, value in adapted.plain.state_dict().items():
        assert torch.equal(adapted.model.state_dict()[name], value)


def test_names_stay_and_everything_can_be_undone() -> None:
    for case in CASES.values():
        adapted = Adapted(case)
        parameters = dict(adapted.model.named_parameters())
        assert parameters.keys() == dict(adapted.plain.named_parameters()).keys()
        assert adapted.model.state_dict().keys() == adapted.plain.state_dict().keys()
        assert dict(named_adapted_weights(adapted.model)) == adapted.weights
        for module in adapted.model.modules():
            assert all(module._parameters[name] is p for name, p in module.named_parameters(recurse=False))
        next(iter(adapted.weights.values())).merge()
        restore(adapted.model, {adapted.weights[name]: layer for name, layer in adapted.originals.items()})
        assert [type(m) for m in adapted.model.modules()] == [type(m) for m in adapted.plain.modules()]
        assert all(adapted.model.get_parameter(name) is p for name, p in parameters.items())
        assert all(torch.equal(p, adapted.plain.get_parameter(name)) for name, p in parameters.items())
        assert repr(adapted.model) == repr(adapted.plain)
        x = adapted.input()
        torch.testing.assert_close(adapted.model(x), adapted.plain(x))


def test_copies_and_pickles(adapted: Adapted) -> None:
    x = adapted.input()
    expected = adapted.model(x)
    for other in (copy.deepcopy(adapted.model), pickle.loads(pickle.dumps(adapted.model))):
        assert [type(module) for module in other.modules()] == [type(module) for module in adapted.model.modules()]
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        copied = dict(named_adapted_weights(other))
        with torch.no_grad():
            for weight in copied.values():
                next(weight.factors.parameters()).zero_()
        torch.testing.assert_close(other(x), adapted.plain(x))
        torch.testing.assert_close(adapted.model(x), expected, rtol=0, atol=0)


def test_what_is_loaded_and_cast_is_the_stored_weight(adapted: Adapted) -> None:
    x = adapted.input()
    other = adapted.case.make().double()
    adapted.model.load_state_dict(other.state_dict())
    adapted.plain.load_state_dict(other.state_dict())
    torch.testing.assert_close(adapted.model(x), adapted.reference(x))
    for weight in adapted.weights.values():
        weight.factors.float()
    single = adapted.model.float()
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    expected = adapted.reference(x.double() if not adapted.case.integers else x).float()
    torch.testing.assert_close(single(x if adapted.case.integers else x.float()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_low_precision(adapted: Adapted, autocast: bool) -> None:
    """The output has the plain module's dtype and an error below 5 %, which is less than the size of the update."""
    x = adapted.input()
    expected, plain = adapted.reference(x), adapted.plain(x)
    model = adapted.model.float() if autocast else adapted.model.bfloat16()
    x = x if adapted.case.integers else x.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        y = model(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        assert y.dtype == copy.deepcopy(adapted.plain).to(next(model.parameters()).dtype)(x).dtype
    assert (y.double() - expected).norm() < 0.05 * expected.norm()
    assert (plain - expected).norm() > 0.1 * expected.norm(), "the update has no effect"


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [
        (lambda: nn.Sequential(Conv1D(7, 6)), "0", (3, 6)),
        (lambda: nn.Sequential(nn.Conv2d(6, 12, 3)), "0", (2, 6, 3, 3)),
        (lambda: nn.Sequential(nn.Conv2d(6, 12, 3, groups=3)), "0", (2, 6, 3, 3)),
        (lambda: nn.Sequential(nn.Conv1d(6, 12, 2, groups=6)), "0", (2, 6, 2)),
        (ReadsChild, "qkv", (3, 5)),
    ],
    ids=["Conv1D", "conv2d", "conv2d in groups", "conv1d depthwise", "read by the parent"],
)
def test_a_small_update_survives_low_precision(
    make: Callable[[], nn.Module], name: str, shape: tuple[int, ...], autocast: bool
) -> None:
    """An update of a thousandth of the weight would be lost if it were added to the weight in bfloat16.

    All entries of the weight are equal, and the entries of the input cancel, so the output consists of the update only.
    """
    adapted = Adapted(Case(make, (name,), shape))
    x = torch.randn(shape, dtype=torch.float64).bfloat16().double()
    x[..., 1] = -x[..., 0]
    x[..., 2:] = 0
    with torch.no_grad():
        for model in (adapted.plain, adapted.model):
            for parameter in model.parameters():
                parameter.fill_(0.0 if parameter.dim() == 1 else 1.0)
        next(iter(adapted.weights[name].factors.parameters())).mul_(1e-3)
    exact = adapted.reference(x)
    model = adapted.model.float() if autocast else adapted.model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        y = model(x.float() if autocast else x.bfloat16())
    assert (y.double() - exact).norm() < 0.02 * exact.norm()


def test_one_graph_under_compile(adapted: Adapted) -> None:
    torch._dynamo.reset()
    x = adapted.input()
    compiled = torch.compile(adapted.model, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), adapted.reference(x)
    torch.testing.assert_close(y, expected)
    gy = torch.randn_like(y)
    pairs = zip(*(torch.autograd.grad(t, adapted.leaves, gy) for t in (y, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_an_empty_batch(adapted: Adapted) -> None:
    x = adapted.input()[:0]
    y = adapted.model(x)
    assert y.shape == adapted.plain(x).shape
    for gradient in torch.autograd.grad(y.sum(), adapted.leaves):
        assert not gradient.any()
