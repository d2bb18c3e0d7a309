"""Provide tools for tests of backends.

The functions list the backends and devices, create inputs for every op, change memory layouts, compare results within
an error budget, and fill uninitialized buffers with NaN. A check compares a backend with the dense formula of the op in
fp64, and never with another backend. The tolerance comes from data: it is derived from the error of the plain formula
in the precision of the backend (:func:`assert_close_budget`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from efft_kernels.backends import Backend

#: The memory layouts that :func:`with_layout` can create.
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


def backends() -> list[Backend]:
    """Return every backend except ``auto``. ``can_run`` returns the reason if one of them cannot run here."""
    return [backend for backend in Backend if backend is not Backend.AUTO]


def devices() -> list[str]:
    """Return ``cpu``, and also ``cuda`` if a GPU is available."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def make_inputs(
    op: str,
    *,
    tokens: int = 29,
    d_in: int = 24,
    d_out: int = 40,
    d_hidden: int = 56,
    r1: int = 5,
    r2: int = 7,
    n_layers: int = 3,
    n_cores: int = 2,
    samples: int = 5,
    n_adapters: int = 3,
    update: float = 1.0,
    base_cancels: bool = False,
    masks: bool = False,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Return random arguments of ``op`` by name, as in ``tt_linear(**make_inputs("tt_linear"))``.

    The values are the same on every device.

    Args:
        op: the name of a public op.
        tokens, d_in, d_out, d_hidden, r1, r2, n_layers, n_cores, samples, n_adapters: sizes; an op uses those that it
            has.
        update: the size of the update relative to that of the base product.
        base_cancels: for ``tt_linear`` and ``tt_gelu_linear``, choose ``W`` and ``x`` so that ``x Wᵀ = 0``, without a
            bias. For ``gy = [g, -g]``, also ``gy W = 0``. ``y`` and ``dx`` then consist of only the update, so the
            rounding error of the update is visible. ``d_in`` and ``d_out`` must be even.
        masks: for ``tt_contract``, add dropout masks that drop a quarter of the factors' elements on average.
        dtype: the dtype of activations, weights and (by default) factors.
        factor_dtype: the dtype of the factors.
        device: the device of the tensors.
        seed: the seed of the random numbers.

    Raises:
        ValueError: ``op`` does not exist, or a size that must be even is odd.
    """
    generator = torch.Generator().manual_seed(seed)
    factor_dtype = factor_dtype or dtype

    def normal(*shape: int, std: float = 1.0, of: torch.dtype) -> Tensor:
        return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, of)

    def keep(*shape: int) -> Tensor | None:
        return (torch.rand(shape, generator=generator) >= 0.25).to(device) if masks else None

    def delta() -> dict[str, Any]:
        return {
            "D": normal(d_in, r1, std=d_in**-0.5, of=factor_dtype),
            "G": normal(r1, d_out, std=update * r1**-0.5, of=factor_dtype),
        }

    def tt_linear() -> dict[str, Any]:
        if not base_cancels:
            return {
                "x": normal(tokens, d_in, of=dtype),
                "W": normal(d_out, d_in, std=d_in**-0.5, of=dtype),
                "b": normal(d_out, of=dtype),
                **delta(),
            }
        if d_in % 2 or d_out % 2:
            raise ValueError(f"make_inputs: base_cancels needs even d_in and d_out, got {d_in} and {d_out}")
        x, W = normal(tokens, d_in // 2, of=dtype), normal(d_out // 2, d_in // 2, std=d_in**-0.5, of=dtype)
        return {"x": torch.cat([x, x], 1), "W": torch.cat([W, -W], 1).repeat(2, 1), "b": None, **delta()}

    def tt_gelu_linear() -> dict[str, Any]:
        inputs = tt_linear()
        return {"z": inputs.pop("x"), **inputs}

    def tt_norm_linear() -> dict[str, Any]:
        inputs = tt_linear()
        x = 3 * inputs.pop("x") + 1
        return {"x": x, "gamma": 1 + normal(d_in, std=0.3, of=dtype), "beta": normal(d_in, of=dtype), **inputs}

    def tt_mlp() -> dict[str, Any]:
        x = 3 * normal(tokens, d_in, of=dtype) + 1
        inputs = {"x": x, "gamma": 1 + normal(d_in, std=0.3, of=dtype), "beta": normal(d_in, of=dtype), "eps": 1e-3}
        for layer, (columns, rows) in enumerate(((d_in, d_hidden), (d_hidden, d_out)), 1):
            inputs |= {
                f"W{layer}": normal(rows, columns, std=columns**-0.5, of=dtype),
                f"b{layer}": normal(rows, of=dtype),
                f"D{layer}": normal(columns, r1, std=columns**-0.5, of=factor_dtype),
                f"G{layer}": normal(r1, rows, std=update * r1**-0.5, of=factor_dtype),
            }
        return {**inputs, "approximate": "none"}

    def tt_linear_grouped() -> dict[str, Any]:
        inputs = tt_linear()
        factors = [delta() for _ in range(n_adapters)]
        return {
            **inputs,
            "x": normal(samples, tokens, d_in, of=dtype),
            **{name: torch.stack([f[name] for f in factors]) for name in ("D", "G")},
            "adapter": torch.randint(-1, n_adapters, (samples,), generator=generator).to(device),
        }

    def tt_contract() -> dict[str, Any]:
        return {
            "C": normal(n_layers, n_cores, r1, r2, of=factor_dtype),
            "V": normal(r2, d_out, std=r2**-0.5, of=factor_dtype),
            "scale": 0.75,
            "keep_C": keep(n_layers, n_cores, r1, r2),
            "keep_V": keep(n_layers, r2, d_out),
        }

    def tt_merge_() -> dict[str, Any]:
        return {"W": normal(d_out, d_in, std=d_in**-0.5, of=dtype), **delta(), "sign": 1.0}

    functions = (tt_linear, tt_gelu_linear, tt_norm_linear, tt_mlp, tt_linear_grouped, tt_contract, tt_merge_)
    ops: dict[str, Callable[[], dict[str, Any]]] = {f.__name__: f for f in functions}
    if op not in ops:
        raise ValueError(f"make_inputs: unknown op {op!r}: expected one of {', '.join(map(repr, ops))}")
    return ops[op]()


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """Return ``tensor`` in another memory layout, one of :data:`LAYOUTS`, as a leaf without gradient.

    The values stay the same, except with ``expanded``. ``transposed`` swaps the strides of the last two dimensions.
    ``sliced`` uses every other element of a buffer whose other elements are NaN (True for masks). ``expanded`` repeats
    the first entry of the first dimension with stride 0. If a layout needs more dimensions than the tensor has, the
    result is contiguous.
    """
    tensor = tensor.detach()
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "sliced" and tensor.dim() > 0:
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "expanded" and tensor.dim() > 0:
        return tensor[:1].expand_as(tensor)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}")
    return tensor.contiguous()


def assert_close_budget(
    got: Tensor, reference_fp64: Tensor, same_precision_reference: Tensor, factor: float = 2.0, name: str = "result"
) -> None:
    """Raise AssertionError unless the error of ``got`` is at most ``factor`` times that of a plain computation.

    The error is the Frobenius norm of the difference from ``reference_fp64``. It is compared with the error of
    ``same_precision_reference``, the result of an independent formula in the precision under test. If rounding the
    exact result to the dtype of ``got`` can cause a larger error, that error is used instead, because a small reference
    tensor may be exact by chance. If both errors are zero, ``got`` must be exact.

    Apply this check to each gradient and, with ``base_cancels`` of :func:`make_inputs`, to the update alone. If the
    update is small, its error is invisible next to the rounding error of ``x Wᵀ``. In fp64, for which no more exact
    reference exists, use ``torch.testing.assert_close``.
    """
    for what, other in (("reference_fp64", reference_fp64), ("same_precision_reference", same_precision_reference)):
        if got.shape != other.shape:
            raise AssertionError(f"{name}: shape {list(got.shape)}, but {what} has {list(other.shape)}")
    if got.dtype != same_precision_reference.dtype:
        raise AssertionError(f"{name}: dtype {got.dtype}, expected {same_precision_reference.dtype}")
    error, peer, rounding = errors(got, reference_fp64, same_precision_reference)
    if not error <= factor * max(peer, rounding):  # NaN is not <= anything
        raise AssertionError(
            f"{name}: error {error:.2e} against fp64, more than {factor:g} times {max(peer, rounding):.2e} "
            f"(same-precision reference {peer:.2e}, rounding {rounding:.2e}, "
            f"size of the result {reference_fp64.double().norm():.2e})"
        )


def errors(got: Tensor, reference_fp64: Tensor, same_precision_reference: Tensor) -> tuple[float, float, float]:
    """Return the three norms that :func:`assert_close_budget` compares.

    They are the error of ``got``, the error of the plain computation, and the largest error that rounding the exact
    result to the dtype of ``got`` can cause.
    """
    exact = reference_fp64.detach().double().cpu()
    error, peer = ((t.detach().double().cpu() - exact).norm().item() for t in (got, same_precision_reference))
    return error, peer, torch.finfo(got.dtype).eps / 2 * exact.norm().item()


def chained_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Compute ``left @ right`` in fp32 with every sum in one chain, like a GPU kernel that does not split sums.

    In fp32, terms are added one by one and rounded to nearest. In half precision, sixteen terms at a time are added and
    truncated, as tensor cores do (Fasi et al., doi.org/10.7717/peerj-cs.330). Products of libraries often
    sum in several chains, which is more exact than a kernel with one chain can be. For such a kernel, use this result,
    in the dtype of the kernel's result, as ``same_precision_reference`` of :func:`assert_close_budget`.
    """
    step, truncates = (1, False) if left.dtype == torch.float32 else (16, True)
    total = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    for k in range(0, left.shape[1], step):
        exact = total.double() + left[:, k : k + step].double() @ right[k : k + step].double()
        total = exact.float()
        if truncates:
            total = torch.where(total.abs() > exact.abs(), total.nextafter(torch.zeros_like(total)), total)
    return total


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill every uninitialized buffer inside the ``with`` block with NaN, or with the largest value of an integer type.

    This affects ``torch.empty`` and similar functions in Python and C++. A kernel that reads an element of such a
    tensor before writing it then returns NaN. Memory that a kernel allocates in another way is not filled. The function
    uses torch's deterministic mode.
    """
    settings: Any = torch.utils.deterministic
    before = (
        settings.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
