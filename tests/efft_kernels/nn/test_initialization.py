"""Compare initial cores with torch's Xavier initialization of a parameter in the layout of the paper's code.

Other tests check that U or V starts at zero and that wrong names are rejected.
"""

from __future__ import annotations

import math

import pytest
import torch

from efft_kernels import TTFactors
from efft_kernels.nn.initialization import CORE_LAYOUTS, core_bound

PAPER_SHAPES = {
    "last": lambda n, r1, r2: (r1, r2, n),
    "first": lambda n, r1, r2: (n, r1, r2),
    "matrix": lambda n, r1, r2: (r1, r2),
}


@pytest.mark.parametrize("layout", CORE_LAYOUTS)
@pytest.mark.parametrize(("n", "r1", "r2"), [(1, 1, 1), (4, 32, 32), (48, 16, 32), (18, 64, 8)])
def test_core_bound_is_xavier_of_the_papers_parameter(layout: str, n: int, r1: int, r2: int) -> None:
    parameter = torch.empty(PAPER_SHAPES[layout](n, r1, r2))
    fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(parameter)
    bound = core_bound(layout, n, r1, r2)
    assert bound == pytest.approx(math.sqrt(6 / (fan_in + fan_out)), rel=1e-12)
    if n * r1 * r2 < 1000:
        return
    largest = torch.nn.init.xavier_uniform_(parameter).abs().max().item()
    bank = TTFactors(8, 8, (r1, r2), n_layers=n, core_init=layout)
    for drawn in (largest, bank.C.abs().max().item()):
        assert 0.98 * bound < drawn <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("n", "bound"), [(4, 0.1531), (48, 0.0442), (2, 0.2165), (24, 0.0625)], ids=["4", "48", "2", "24"]
)
def test_core_bounds_of_the_paper_at_rank_32(n: int, bound: float) -> None:
    assert core_bound("last", n, 32, 32) == pytest.approx(bound, abs=5e-5)
    assert core_bound("matrix", n, 32, 32) == pytest.approx(0.3062, abs=5e-5)


@pytest.mark.parametrize(("sharing", "n"), [("per_layer", 48), ("shared", 4)])
def test_the_bound_counts_the_cores_there_are(sharing: str, n: int) -> None:
    bank = TTFactors(64, 64, 32, n_layers=12, n_cores=4, core_sharing=sharing)
    C, bound = bank.C.detach(), core_bound("last", n, 32, 32)
    assert 0.98 * bound < C.abs().max() <= bound
    assert C.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert C.mean().abs() < 4 * C.std() / math.sqrt(C.numel())


@pytest.mark.parametrize(("init", "zero", "drawn"), [("v", "V", "U"), ("u", "U", "V")])
def test_one_side_starts_at_zero(init: str, zero: str, drawn: str) -> None:
    bank = TTFactors(768, 512, (16, 32), init=init)
    assert not getattr(bank, zero).any()
    value = getattr(bank, drawn)
    bound = math.sqrt(6 / sum(value.shape))
    assert 0.98 * bound < value.abs().max() <= bound
    bank.U.data.fill_(1)
    bank.V.data.fill_(1)
    bank.reset_parameters()
    assert not getattr(bank, zero).any()


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match=r"init must be 'u' .* or 'v' .*, got 'w'"):
        TTFactors(4, 4, 2, init="w")
    with pytest.raises(ValueError, match="core_init must be one of 'last', 'first', 'matrix', got 'middle'"):
        TTFactors(4, 4, 2, core_init="middle")
