"""Test that the session of ``make check-triton``, which uses Triton's interpreter, contains the intended tests.

Triton decides once per process whether to interpret or compile. These tests therefore need a separate pytest session:
``TRITON_INTERPRET=1 pytest tests/efft_kernels/ops tests/efft_kernels/triton``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs the triton extra")
ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1, as in make check-triton")
@pytest.mark.parametrize("path", ["tests/efft_kernels/ops", "tests/efft_kernels/triton/kernels"])
def test_in_the_interpreter(path: str, request: pytest.FixtureRequest) -> None:
    """More than 40 tests of each folder must run. Conditions such as a missing GPU must not exclude them."""
    chosen = [item for item in request.session.items if item.path.is_relative_to(ROOT / path)]
    skipped = [item for item in chosen if item.get_closest_marker("skip") is not None]
    assert len(chosen) - len(skipped) > 40, f"{len(chosen)} tests of {path}, {len(skipped)} of them skipped"
