"""Check the numerical accuracy of a row before it is timed.

A row is one implementation of an adapted linear layer. The check and the timing use the same inputs. The check compares
y and every gradient with the results of the dense formula in fp64. The plain formula, x Wᵀ + b + (x D) G computed by
autograd in the precision of the row, has errors as well. The budget allows each error of the row to be at most twice
the error of the plain formula. A row that exceeds the budget is not timed. In the inputs, the update D G is as large as
the frozen weight W. An error in the update is therefore visible in y. A second function, :func:`small_update_error`,
measures the error for an update that is much smaller than W.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.cases import Inputs
from benchmarks.ops.rows import LayerRow

#: The largest error allowed, as a multiple of the error of the plain formula.
FACTOR = 2.0
#: The norm of the update divided by that of the frozen weight in :meth:`Budget.small_update_error`.
SMALL = 1e-2


class Budget:
    """Hold the exact results of one case and the errors of the plain formula."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._exact = {adapts: exact(inputs, adapts) for adapts in (True, False)}
        peer = plain(inputs)
        self._yardstick = {name: _error(value, self._exact[True][name]) for name, value in peer.items()}
        self._dtypes = {name: value.dtype for name, value in peer.items()}

    def errors(self, row: LayerRow, results: dict[str, Tensor]) -> dict[str, float]:
        """Return the error (Frobenius norm) of each result, divided by the error of the plain formula.

        If rounding the exact result to its dtype can cause a larger error than the plain formula has, the divisor is
        this rounding error.

        Raises:
            ValueError: a result is missing, unexpected, or has a wrong shape or dtype.
        """
        expected = self._exact[row.adapts]
        owed = {"y", "dx", *(("dD", "dG") if row.trains else ())}
        if set(results) != owed:
            raise ValueError(f"the row returns {', '.join(sorted(results))} instead of {', '.join(sorted(owed))}")
        found = {}
        for name, got in results.items():
            if got.shape != expected[name].shape or got.dtype != self._dtypes[name]:
                raise ValueError(
                    f"{name} is {got.dtype} {list(got.shape)} instead of "
                    f"{self._dtypes[name]} {list(expected[name].shape)}"
                )
            rounding = torch.finfo(got.dtype).eps / 2 * expected[name].norm().item()
            found[name] = _error(got, expected[name]) / max(self._yardstick[name], rounding)
        return found

    def verdict(self, row: LayerRow, results: dict[str, Tensor]) -> str | None:
        """Return None if ``results`` of ``row`` are within the budget, or a description of the violation."""
        try:
            errors = self.errors(row, results)
        except ValueError as error:
            return str(error)
        over = [f"{name} {error:.3g}" for name, error in errors.items() if not error <= FACTOR]  # NaN is not <= 2
        if not over:
            return None
        return f"error over {FACTOR:g} times that of the plain formula in the same precision: {', '.join(over)}"


def verdict(row: LayerRow, inputs: Inputs) -> str | None:
    """Return None if the results of ``row`` on ``inputs`` are within the budget, or a description of the violation."""
    return Budget(inputs).verdict(row, row.build(inputs).results())


def small_update_error(row: LayerRow, inputs: Inputs) -> float:
    """Return the error of y for a small update, divided by the error of the plain formula.

    As in early training, |D G| is only a hundredth of |W|. The inputs are x = [u, u] and W = [M, -M]. The frozen
    product x Wᵀ is then zero, and y consists only of the update. A row that rounds W + dW to the dtype of W has a large
    error here. With other inputs the frozen product would hide this error.
    """
    half = inputs.W.shape[1] // 2
    u, M = inputs.x[:, :half], inputs.W[:, :half]
    b = None if inputs.b is None else torch.zeros_like(inputs.b)
    x, W, G = torch.cat([u, u], 1), torch.cat([M, -M], 1), inputs.G * SMALL
    got = row.build(dataclasses.replace(inputs, x=x, W=W, b=b, G=G)).forward()
    peer = F.linear(x, W) + (x @ inputs.D.to(x.dtype)) @ G.to(x.dtype)
    expected = (x.double() @ inputs.D.double()) @ G.double()
    return _error(got, expected) / _error(peer, expected)


def exact(inputs: Inputs, adapts: bool = True) -> dict[str, Tensor]:
    """Return y, dx, dD and dG in fp64, computed from the dense weight W + (D G)ᵀ.

    If ``adapts`` is False, the weight is W, and only y and dx are returned.
    """
    x, W, D, G, gy = (t.double() for t in (inputs.x, inputs.W, inputs.D, inputs.G, inputs.gy))
    weight = W + (D @ G).t() if adapts else W
    found = {"y": F.linear(x, weight, None if inputs.b is None else inputs.b.double()), "dx": gy @ weight}
    if adapts:
        gradient = x.t() @ gy  # [d_in, d_out], of the transposed weight
        found |= {"dD": gradient @ G.t(), "dG": D.t() @ gradient}
    return found


def plain(inputs: Inputs) -> dict[str, Tensor]:
    """Return the results of the plain formula under autograd, computed in the dtype of the inputs."""
    x, D, G = leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.D, inputs.G)]
    y = F.linear(x, inputs.W, inputs.b) + (x @ D.to(x.dtype)) @ G.to(x.dtype)
    gradients = torch.autograd.grad(y, leaves, inputs.gy)
    return {"y": y.detach(), **dict(zip(("dx", "dD", "dG"), gradients, strict=True))}


def _error(got: Tensor, expected: Tensor) -> float:
    return (got.detach().double() - expected).norm().item()
