"""Judge results against a numeric budget: a row that computes something else, or is less exact, gets no time.

A row is judged on the inputs on which it is timed. Its y and every gradient are compared with the dense formula in
fp64. The update is as large as the base there, so that an error in the update cannot hide in y. The yardstick is the
error that the plain formula makes in the row's own precision.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.cases import Inputs
from benchmarks.ops.rows import LayerRow

#: The largest error allowed, as a multiple of the yardstick.
FACTOR = 2.0
#: Size of the update relative to the base in :meth:`Budget.small_update_error`.
SMALL = 1e-2


class Budget:
    """Hold the exact results of one case, and the errors that a plain computation makes."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._exact = {adapts: exact(inputs, adapts) for adapts in (True, False)}
        peer = plain(inputs)
        self._yardstick = {name: _error(value, self._exact[True][name]) for name, value in peer.items()}
        self._dtypes = {name: value.dtype for name, value in peer.items()}

    def errors(self, row: LayerRow, results: dict[str, Tensor]) -> dict[str, float]:
        """Return the error (Frobenius norm) of each result as a multiple of the yardstick.

        The yardstick is at least the rounding of an exact result.

        Raises:
            ValueError: the results are not those that the row must give, or their shape or dtype is another one.
        """
        expected = self._exact[row.adapts]
        owed = {"y", "dx", *(("dD", "dG") if row.trains else ())}
        if set(results) != owed:
            raise ValueError(f"gives {', '.join(sorted(results))} instead of {', '.join(sorted(owed))}")
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
        """Return None if ``results`` of ``row`` are within the budget, else what is wrong."""
        try:
            errors = self.errors(row, results)
        except ValueError as error:
            return str(error)
        over = [f"{name} {error:.3g}" for name, error in errors.items() if not error <= FACTOR]  # NaN is not <= 2
        if not over:
            return None
        return f"error over {FACTOR:g} times that of the plain formula in the same precision: {', '.join(over)}"


def verdict(row: LayerRow, inputs: Inputs) -> str | None:
    """Return None if ``row`` computes what it should on ``inputs``, else what is wrong."""
    return Budget(inputs).verdict(row, row.build(inputs).results())


def small_update_error(row: LayerRow, inputs: Inputs) -> float:
    """Return the error of the update where |D G| is a hundredth of |W|, as early in training.

    It is a multiple of the plain formula's error. The inputs are such that the base cancels, x = [u, u] and W = [M,
    -M], so that y is the update alone. If a row rounds W + dW, its cost shows here; it does not show in y as a whole.
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
    """Return y, dx, dD and dG in fp64 from the dense weight and its gradient; without ``adapts`` only y and dx."""
    x, W, D, G, gy = (t.double() for t in (inputs.x, inputs.W, inputs.D, inputs.G, inputs.gy))
    weight = W + (D @ G).t() if adapts else W
    found = {"y": F.linear(x, weight, None if inputs.b is None else inputs.b.double()), "dx": gy @ weight}
    if adapts:
        gradient = x.t() @ gy  # [d_in, d_out], of the transposed weight
        found |= {"dD": gradient @ G.t(), "dG": D.t() @ gradient}
    return found


def plain(inputs: Inputs) -> dict[str, Tensor]:
    """Return the results of the plain formula under autograd, in the inputs' own precision."""
    x, D, G = leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.D, inputs.G)]
    y = F.linear(x, inputs.W, inputs.b) + (x @ D.to(x.dtype)) @ G.to(x.dtype)
    gradients = torch.autograd.grad(y, leaves, inputs.gy)
    return {"y": y.detach(), **dict(zip(("dx", "dD", "dG"), gradients, strict=True))}


def _error(got: Tensor, expected: Tensor) -> float:
    return (got.detach().double() - expected).norm().item()
