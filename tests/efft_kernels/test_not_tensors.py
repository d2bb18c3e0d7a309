"""Test that the ops reject a NumPy array in place of a tensor, and scalar arguments that are not numbers.

The error must name the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import efft_kernels

SHAPES: dict[Callable[..., Any], dict[str, tuple[int, ...]]] = {
    efft_kernels.tt_contract: {"C": (2, 1, 3, 3), "V": (3, 5), "keep_C": (2, 1, 3, 3), "keep_V": (2, 3, 5)},
    efft_kernels.tt_linear: {"x": (2, 4), "W": (5, 4), "b": (5,), "D": (4, 3), "G": (3, 5)},
    efft_kernels.tt_gelu_linear: {"z": (2, 4), "W": (5, 4), "b": (5,), "D": (4, 3), "G": (3, 5)},
    efft_kernels.tt_norm_linear: {
        **{"x": (2, 4), "gamma": (4,), "beta": (4,), "W": (5, 4), "b": (5,), "D": (4, 3), "G": (3, 5)}
    },
    efft_kernels.tt_mlp: {
        **{"x": (2, 4), "W1": (6, 4), "b1": (6,), "D1": (4, 3), "G1": (3, 6)},
        **{"W2": (5, 6), "b2": (5,), "D2": (6, 3), "G2": (3, 5)},
    },
    efft_kernels.tt_linear_grouped: {
        **{"x": (2, 1, 4), "W": (5, 4), "b": (5,), "D": (2, 4, 3), "G": (2, 3, 5), "adapter": (2,)}
    },
    efft_kernels.tt_merge_: {"W": (5, 4), "D": (4, 3), "G": (3, 5)},
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, shapes in SHAPES.items() for name in shapes])
def test_an_array_is_refused(op: Callable[..., Any], name: str) -> None:
    arguments = {of: torch.ones(shape) for of, shape in SHAPES[op].items()}
    for of in {"keep_C", "keep_V"} & set(arguments):
        arguments[of] = arguments[of].bool()
    if "adapter" in arguments:
        arguments["adapter"] = arguments["adapter"].long()
    op(**arguments)
    expected = f"^{op.__name__}: {name} must be a torch.Tensor, got ndarray; convert a NumPy array .* torch.as_tensor"
    with pytest.raises(TypeError, match=expected):
        op(**{**arguments, name: arguments[name].numpy()})


@pytest.mark.parametrize("wrong", [None, "1", [2.0]])
@pytest.mark.parametrize(
    ("op", "name"),
    [(efft_kernels.tt_contract, "scale"), (efft_kernels.tt_norm_linear, "eps"), (efft_kernels.tt_merge_, "sign")],
)
def test_what_is_no_number_is_refused(op: Callable[..., Any], name: str, wrong: object) -> None:
    arguments = {of: torch.ones(shape) for of, shape in SHAPES[op].items() if not of.startswith("keep")}
    op(**arguments, **{name: np.float32(0.5)})
    with pytest.raises(TypeError, match=f"^{op.__name__}: {name} must be a number, got {type(wrong).__name__}"):
        op(**arguments, **{name: wrong})
