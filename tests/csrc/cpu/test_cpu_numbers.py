"""Test the backend ``cpu`` on unusual inputs.

The inputs contain very large and very small numbers, constant rows, NaN or infinity. Factors have unusual strides,
sizes are zero or very large, and operands are missing. ``make check-native`` runs the tests that are not slow under the
sanitizers, with every instruction set that the processor supports.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efft_kernels import (
    Backend,
    build,
    native,
    tt_gelu_linear,
    tt_linear,
    tt_linear_grouped,
    tt_norm_linear,
    use_backend,
)
from efft_kernels.testing import make_inputs

pytestmark = pytest.mark.skipif(native.MISSING["cpu"] is not None, reason=native.MISSING["cpu"] or "")

Pair = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _backend() -> object:
    with use_backend(Backend.CPU):
        yield


def bare(op: object, x: Tensor, **options: object) -> Pair:
    """Return the output of the op's GELU or norm, and the gradient of its input.

    W is the identity and the update is zero, so the linear layer after the GELU or norm changes nothing.
    """
    d = x.shape[-1]
    x = x.detach().requires_grad_()
    identity = torch.eye(d, dtype=x.dtype)
    y = op(x, W=identity, b=None, D=torch.zeros(d, 1), G=torch.zeros(1, d), **options)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


def gelu(z: Tensor, approximate: str) -> Pair:
    z = z.detach().requires_grad_()
    y = F.gelu(z, approximate=approximate)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_and_its_slope_are_as_exact_as_torchs(dtype: torch.dtype, approximate: str) -> None:
    z = torch.linspace(-40, 40, 100_000).view(-1, 50).to(dtype)
    ours, torchs = bare(tt_gelu_linear, z, approximate=approximate), gelu(z, approximate)
    exact = gelu(z.double(), approximate)
    for got, peer, wanted in zip(ours, torchs, exact, strict=True):
        error, yardstick = got.double() - wanted, peer.double() - wanted
        assert error.norm() <= 2 * yardstick.norm()
        assert error.abs().max() <= 2 * yardstick.abs().max()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_far_out_is_zero_or_its_argument(approximate: str) -> None:
    z = torch.tensor([[40.0, 1e3, 1e9, 1e12, 1e15, 1e18, 1e19, *([1e30, 3e38] if approximate == "none" else [])]]).t()
    for sign in (1, -1):
        y, slope = bare(tt_gelu_linear, sign * z, approximate=approximate)
        assert torch.equal(y, z if sign > 0 else torch.zeros_like(z))
        assert torch.equal(slope, torch.full_like(z, sign > 0))


def test_gelu_of_numbers_too_small_to_be_normal() -> None:
    z = torch.tensor([[0.0, 1e-40, -1e-40, 1e-38, -1e-30]]).t()
    y, slope = bare(tt_gelu_linear, z, approximate="none")
    assert torch.equal(y, z / 2)
    assert torch.equal(slope, torch.full_like(z, 0.5))


@pytest.mark.parametrize("d", [7, 24, 768, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -1e6])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_the_norm_of_a_constant_row_is_zero(d: int, value: float, eps: float) -> None:
    y, _ = bare(lambda x, **rest: tt_norm_linear(x, None, None, **rest), torch.full((3, d), value), eps=eps)
    assert not y.any()


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("outlier", [1.0, 1e4])
def test_norm_of_rows_far_from_zero(mean: float, eps: float, outlier: float) -> None:
    x = torch.randn(64, 768)
    x[:, 0] *= outlier
    x += mean
    gy = torch.randn(64, 768)

    def norm(x: Tensor, ours: bool) -> Pair:
        x = x.detach().requires_grad_()
        identity, zeros = torch.eye(768), torch.zeros(768, 1)
        y = (
            tt_norm_linear(x, None, None, identity, None, zeros, zeros.t(), eps=eps)
            if ours
            else F.layer_norm(x, (768,), eps=eps)
        )
        return y.detach(), torch.autograd.grad(y, x, gy.to(x.dtype))[0]

    exact, eps32 = norm(x.double(), False), torch.finfo(torch.float32).eps
    for got, peer, wanted in zip(norm(x, True), norm(x, False), exact, strict=True):
        assert (got - wanted).norm() <= 2 * (peer - wanted).norm() + 4 * eps32 * wanted.norm()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_stays_in_its_row(value: float) -> None:
    """A NaN or infinity in one row of x or gy affects only this row of y or dx. dD and dG are sums over all rows."""
    inputs = make_inputs("tt_linear", tokens=70, d_in=50, d_out=70, r1=17)
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "D", "G")}
    with torch.no_grad():
        leaves["x"][33, 49] = value
    y = tt_linear(**inputs)
    gy = torch.randn_like(y)
    gy[12, 69] = value
    dx, dD, dG = torch.autograd.grad(y, list(leaves.values()), gy)
    for rows, broken in ((y, 33), (dx, 12)):
        finite = rows.isfinite().all(1)
        assert not finite[broken]
        assert finite.sum() == 69
    assert not dD.isfinite().any()
    assert not dG[:, 69].isfinite().any()
    assert not dG.isfinite().any()


@pytest.mark.parametrize("rank", [1, 5, 16, 21])
@pytest.mark.parametrize("d_in", [1, 24])
def test_factors_cut_from_the_end_of_a_wider_matrix(rank: int, d_in: int) -> None:
    """Kernels read 16 columns at a time if the row stride is a multiple of 16, but must not use later columns."""
    inputs = make_inputs("tt_linear", d_in=d_in, r1=rank)
    expected = tt_linear(**inputs)
    for name in ("D", "G"):
        factor = inputs[name]
        rows, columns = factor.shape
        wide = torch.full((rows, -(-columns // 16) * 16), math.nan)
        wide[:, wide.shape[1] - columns :] = factor
        inputs[name] = wide[:, wide.shape[1] - columns :]
    assert torch.equal(tt_linear(**inputs), expected)


def test_factors_that_are_one_row() -> None:
    """Torch may use any stride for a dimension of one element, but kernels treat a row stride of zero specially."""
    x, W = torch.randn(9, 1), torch.randn(70, 1)
    D, G = torch.randn(1).expand(1, 5), torch.randn(70).expand(5, 70)
    for factors in ((D, G), (D.as_strided((1, 5), (0, 0)), G), (D[:, :1].as_strided((1, 1), (16, 16)), G[:1])):
        y = tt_linear(x, W, None, *factors)
        torch.testing.assert_close(y, x @ W.t() + x @ factors[0] @ factors[1])


@pytest.mark.parametrize("sizes", [(5, 0, 3), (5, 7, 0), (5, 0, 0)], ids=str)
@pytest.mark.parametrize("tokens", [0, 9])
def test_sizes_of_zero(sizes: tuple[int, int, int], tokens: int) -> None:
    d_in, d_out, rank = sizes
    x, W = torch.randn(tokens, d_in, requires_grad=True), torch.randn(d_out, d_in)
    D, G = (torch.randn(shape, requires_grad=True) for shape in ((d_in, rank), (rank, d_out)))
    b = torch.randn(d_out, requires_grad=True)
    y = tt_linear(x, W, b, D, G)
    torch.testing.assert_close(y, x @ W.t() + b + x @ D @ G)
    gy = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(out, (x, b, D, G), gy) for out in (y, x @ W.t() + b + x @ D @ G))
    torch.testing.assert_close(got, wanted)
    a = F.gelu(x)
    torch.testing.assert_close(tt_gelu_linear(x, W, b, D, G), a @ W.t() + b + a @ D @ G)
    a = F.layer_norm(x, (d_in,))
    torch.testing.assert_close(tt_norm_linear(x, None, None, W, b, D, G), a @ W.t() + b + a @ D @ G)
    y = tt_linear_grouped(x.expand(3, tokens, d_in), W, b, D[None], G[None], torch.tensor([0, -1, 0]))
    torch.testing.assert_close(y[0], x @ W.t() + b + x @ D @ G)
    torch.testing.assert_close(y[1], x @ W.t() + b)


@pytest.mark.parametrize("need", ["dx", "dD", "dG"])
def test_a_gradient_whose_operand_is_missing_is_refused(need: str) -> None:
    """The test calls the registered operator directly, because the public functions save the required tensors."""
    inputs = make_inputs("tt_linear")
    needs = [name == need for name in ("dx", "dD", "dG", "db")]
    operand = {"dx": "W", "dD": "x", "dG": "h"}[need]
    expected = f"expected {operand} because {need} is needed, got None; pass {operand} or do not request {need}"
    with pytest.raises(RuntimeError, match=expected):
        torch.ops.efft.tt_linear_bwd.cpu(torch.ones(29, 40), None, None, None, inputs["D"], inputs["G"], *needs)


@pytest.mark.parametrize("need", ["dgamma", "dbeta"])
def test_gradients_of_a_norm_without_the_weight_are_refused(need: str) -> None:
    inputs = make_inputs("tt_norm_linear")
    x, gamma, beta, D, G = (inputs[name] for name in ("x", "gamma", "beta", "D", "G"))
    needs = [name == need for name in ("dx", "dD", "dG", "db", "dgamma", "dbeta")]
    statistics = torch.zeros(29), torch.ones(29)
    with pytest.raises(
        RuntimeError, match=f"expected W because {need} is needed, got None; pass W or do not request {need}"
    ):
        torch.ops.efft.tt_norm_linear_bwd.cpu(
            torch.ones(29, 40), x, gamma, beta, 1e-5, *statistics, None, None, D, G, *needs
        )


@pytest.mark.slow
@pytest.mark.parametrize("op", [tt_linear, tt_gelu_linear], ids=["wide output", "wide input"])
def test_more_elements_than_32_bits_count(op: object) -> None:
    """With more than 2^31 elements in an input or output, the last rows and the sums over all rows are correct."""
    # The check runs in the test rather than at collection: the test uses 9 GiB, and other programs need memory too.
    if build.available_memory() < 16 << 30:
        pytest.skip("needs 16 GiB of available memory")
    tokens, d, narrow, rank = 1_100_000, 2000, 8, 3
    assert tokens * d > 2**31
    d_in, d_out = (narrow, d) if op is tt_linear else (d, narrow)
    few = torch.randn(50, d_in).bfloat16()
    x = few.repeat(tokens // 50, 1).requires_grad_()
    W, D, G = torch.randn(d_out, d_in).bfloat16(), torch.randn(d_in, rank) / d_in, torch.randn(rank, d_out)
    D, G = D.requires_grad_(), G.requires_grad_()
    gy = torch.randn(d_out).bfloat16()
    y = op(x, W, None, D, G)
    got = torch.autograd.grad(y, (x, D, G), gy.expand(tokens, d_out))

    z = few.double().requires_grad_()
    D, G = (factor.detach().double().requires_grad_() for factor in (D, G))
    a = z if op is tt_linear else F.gelu(z)
    exact = a @ (W.double().t() + D @ G)
    dz, dD, dG = torch.autograd.grad(exact, (z, D, G), gy.double().expand(50, d_out))
    for name, value, wanted in (
        ("y", y[-50:], exact.detach()),
        ("dx", got[0][-50:], dz),
        ("dD", got[1], dD * (tokens // 50)),
        ("dG", got[2], dG * (tokens // 50)),
    ):
        assert (value.double() - wanted).norm() <= 0.01 * wanted.norm(), name
