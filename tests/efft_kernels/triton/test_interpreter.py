"""The session that ``make check-triton`` runs in Triton's interpreter contains the tests that it is meant for.

Triton decides once per process whether it interprets or compiles, so these tests need a separate pytest session:
``TRITON_INTERPRET=1 pytest tests/efft_kernels/ops tests/efft_kernels/triton``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs the triton extra")
ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="make check-triton runs it, with TRITON_INTERPRET=1")
@pytest.mark.parametrize("path", ["tests/efft_kernels/ops", "tests/efft_kernels/triton/kernels"])
def test_in_the_interpreter(path: str, request: pytest.FixtureRequest) -> None:
    """Conditions on the environment leave the tests of every op, and those of single kernels, in the session."""
    chosen = [item for item in request.session.items if item.path.is_relative_to(ROOT / path)]
    skipped = [item for item in chosen if item.get_closest_marker("skip") is not None]
    assert len(chosen) - len(skipped) > 40, f"{len(chosen)} tests of {path}, {len(skipped)} of them skipped"
