"""Every operator's schema and fake (shape-only) kernel, declared once for all compiled-in backends.

An operator has one overload per backend, ``efft::<op>.<backend>``, all with the same arguments, so that one name is one
op in every layer, a profile shows which backend ran, and C++ can register its overload without declaring anything.
Symbols: tokens, d_in, d_out, r1, r2, n_layers, n_cores as everywhere in the project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efft_kernels.backends import Backend

_library = torch.library.Library("efft", "DEF")

#: Backends that run behind a registered operator. ``reference`` is plain torch and needs none.
REGISTERED = (Backend.EAGER, Backend.CPU, Backend.TRITON, Backend.CUDA)

SCHEMAS = {
    # x [tokens, d_in], W [d_out, d_in], b [d_out], D [d_in, r1], G [r1, d_out] -> y [tokens, d_out], h [tokens, r1]
    "tt_linear_fwd": "(Tensor x, Tensor W, Tensor? b, Tensor D, Tensor G) -> (Tensor y, Tensor h)",
    # gy [tokens, d_out]; x is read for dD, W for dx, h for dG. A gradient that is not needed comes back with 0
    # elements.
    "tt_linear_bwd": "(Tensor gy, Tensor? x, Tensor? W, Tensor? h, Tensor D, Tensor G, "
    "bool need_dx, bool need_dD, bool need_dG) -> (Tensor dx, Tensor dD, Tensor dG)",
    # The same on gelu(z), which neither direction keeps; z [tokens, d_in] in its own dtype, the product in W's.
    "tt_gelu_linear_fwd": "(Tensor z, Tensor W, Tensor? b, Tensor D, Tensor G, str approximate) "
    "-> (Tensor y, Tensor h)",
    "tt_gelu_linear_bwd": "(Tensor gy, Tensor z, Tensor? W, Tensor? h, Tensor D, Tensor G, str approximate, "
    "bool need_dz, bool need_dD, bool need_dG) -> (Tensor dz, Tensor dD, Tensor dG)",
    # The same on the layer norm of x over d_in; gamma, beta [d_in], mean and rstd [tokens] in fp32 (fp64 for fp64).
    "tt_norm_linear_fwd": "(Tensor x, Tensor? gamma, Tensor? beta, float eps, Tensor W, Tensor? b, Tensor D, Tensor G) "
    "-> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    "tt_norm_linear_bwd": "(Tensor gy, Tensor x, Tensor? gamma, Tensor? beta, float eps, Tensor mean, Tensor rstd, "
    "Tensor? W, Tensor? h, Tensor D, Tensor G, bool need_dx, bool need_dD, bool need_dG) "
    "-> (Tensor dx, Tensor dD, Tensor dG)",
    # x [samples, tokens, d_in], D [n_adapters, d_in, r1], G [n_adapters, r1, d_out], adapter [samples] (int64,
    # negative: none) -> [samples, tokens, d_out]
    "tt_linear_grouped": "(Tensor x, Tensor W, Tensor? b, Tensor D, Tensor G, Tensor adapter) -> Tensor",
    # C [n_layers, n_cores, r1, r2], V [r2, d_out], keep_C like C, keep_V [n_layers, r2, d_out] (bool)
    # -> G [n_layers, r1, n_cores * d_out]
    "tt_contract_fwd": "(Tensor C, Tensor V, Tensor? keep_C, Tensor? keep_V, float scale) -> Tensor",
    "tt_contract_bwd": "(Tensor dG, Tensor C, Tensor V, Tensor? keep_C, Tensor? keep_V, float scale, "
    "bool need_dC, bool need_dV) -> (Tensor dC, Tensor dV)",
    # W [d_out, d_in], D [d_in, r1], G [r1, d_out]
    "tt_merge_": "(Tensor(a!) W, Tensor D, Tensor G, float sign) -> ()",
}


def _tt_linear_fwd(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], W.shape[0]), x.new_empty(x.shape[0], D.shape[1])


def _tt_linear_bwd(
    gy: Tensor,
    x: Tensor | None,
    W: Tensor | None,
    h: Tensor | None,
    D: Tensor,
    G: Tensor,
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = gy.new_empty(gy.shape[0], D.shape[0]) if need_dx else gy.new_empty(0)
    dD = D.new_empty(D.shape) if need_dD else D.new_empty(0)
    dG = G.new_empty(G.shape) if need_dG else G.new_empty(0)
    return dx, dD, dG


def _tt_gelu_linear_fwd(
    z: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    return _tt_linear_fwd(W.new_empty(z.shape), W, b, D, G)


def _tt_gelu_linear_bwd(
    gy: Tensor,
    z: Tensor,
    W: Tensor | None,
    h: Tensor | None,
    D: Tensor,
    G: Tensor,
    approximate: str,
    need_dz: bool,
    need_dD: bool,
    need_dG: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, dD, dG = _tt_linear_bwd(gy, z, W, h, D, G, False, need_dD, need_dG)
    return z.new_empty(z.shape if need_dz else 0), dD, dG


def _tt_norm_linear_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    W: Tensor,
    b: Tensor | None,
    D: Tensor,
    G: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return *_tt_linear_fwd(W.new_empty(x.shape), W, b, D, G), mean, rstd


def _tt_norm_linear_bwd(
    gy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    W: Tensor | None,
    h: Tensor | None,
    D: Tensor,
    G: Tensor,
    need_dx: bool,
    need_dD: bool,
    need_dG: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _tt_gelu_linear_bwd(gy, x, W, h, D, G, "none", need_dx, need_dD, need_dG)


def _tt_linear_grouped(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, adapter: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], W.shape[0])


def _tt_contract_fwd(C: Tensor, V: Tensor, keep_C: Tensor | None, keep_V: Tensor | None, scale: float) -> Tensor:
    n_layers, n_cores, r1, _ = C.shape
    return C.new_empty(n_layers, r1, n_cores * V.shape[1])


def _tt_contract_bwd(
    dG: Tensor,
    C: Tensor,
    V: Tensor,
    keep_C: Tensor | None,
    keep_V: Tensor | None,
    scale: float,
    need_dC: bool,
    need_dV: bool,
) -> tuple[Tensor, Tensor]:
    dC = C.new_empty(C.shape) if need_dC else C.new_empty(0)
    dV = V.new_empty(V.shape) if need_dV else V.new_empty(0)
    return dC, dV


def _tt_merge_(W: Tensor, D: Tensor, G: Tensor, sign: float) -> None:
    return None


_FAKES: dict[str, Callable[..., object]] = {
    "tt_linear_fwd": _tt_linear_fwd,
    "tt_linear_bwd": _tt_linear_bwd,
    "tt_gelu_linear_fwd": _tt_gelu_linear_fwd,
    "tt_gelu_linear_bwd": _tt_gelu_linear_bwd,
    "tt_norm_linear_fwd": _tt_norm_linear_fwd,
    "tt_norm_linear_bwd": _tt_norm_linear_bwd,
    "tt_linear_grouped": _tt_linear_grouped,
    "tt_contract_fwd": _tt_contract_fwd,
    "tt_contract_bwd": _tt_contract_bwd,
    "tt_merge_": _tt_merge_,
}

for _op, _arguments in SCHEMAS.items():
    for _backend in REGISTERED:
        _library.define(f"{_op}.{_backend.value}{_arguments}")
        torch.library.register_fake(f"efft::{_op}.{_backend.value}", _FAKES[_op], lib=_library)


def _tell_autograd(op: str, backend: Backend) -> None:
    """Raise the versions of the tensors that ``op`` changes in place, which torch does for its own operators alone:
    autograd notices by it that what was saved for backward is no longer what it was."""
    overload = getattr(getattr(torch.ops.efft, op), backend.value)
    changed = [i for i, argument in enumerate(overload._schema.arguments) if argument.is_write]

    def kernel(keys: Any, *arguments: Any) -> Any:
        for i in changed:
            torch.autograd.graph.increment_version(arguments[i])
        return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    if changed:
        _library.impl(f"{op}.{backend.value}", kernel, "ADInplaceOrView", with_keyset=True)


for _op in SCHEMAS:
    for _backend in REGISTERED:
        _tell_autograd(_op, _backend)


def implement(op: str, backend: Backend, kernel: Callable[..., object]) -> None:
    """Register ``kernel`` as ``backend``'s implementation of ``op`` on every device."""
    _library.impl(f"{op}.{backend.value}", kernel, "CompositeExplicitAutograd")


def overloads(op: str) -> dict[Backend, Callable[..., Any]]:
    """The registered operators of ``op``, one a backend."""
    return {backend: getattr(getattr(torch.ops.efft, op), backend.value) for backend in REGISTERED}
