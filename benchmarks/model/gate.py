"""Check that a row computes what it should; a row that does not gets no time."""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor, nn

import efft
from benchmarks.model.rows import FLOOR, NAIVE, PAPER, ModelRow
from benchmarks.model.step import Setting
from efft_kernels.testing import assert_close_budget


class Gate:
    """Compares rows with the same model in fp64, on a few images before any training.

    An EFFT row is judged by its logits and by the gradient of every factor. Each error may be at most twice that of
    another formulation in the row's own precision: ``naive``, or ``paper`` for ``naive`` itself. The other rows start
    as the plain model does and are judged by their logits; the plain model's error is the yardstick. Layers add up
    their rounding errors, so in bf16 this check finds errors of some percent and more; ``ops`` finds smaller ones.
    """

    def __init__(self, setting: Setting, images: int = 2) -> None:
        self.setting = replace(setting, batch=min(images, setting.batch))
        self._rounded = {row: probe(row, self.setting.build(row), self.setting) for row in (FLOOR, NAIVE, PAPER)}

    def verdict(self, row: ModelRow, model: nn.Module) -> str | None:
        """Return None if ``model``, as ``setting.build(row)`` made it, computes what it should, else what is wrong."""
        yardstick = FLOOR if not row.is_efft else PAPER if row.name == NAIVE.name else NAIVE
        exact = in_fp64(NAIVE if row.is_efft else FLOOR, replace(self.setting, dtype="float64"))
        rounded = self._rounded[yardstick]
        for name, got in probe(row, model, self.setting).items():
            try:
                assert_close_budget(got, exact[name], rounded[name], name=name)
            except AssertionError as error:
                return str(error)
        return None


def probe(row: ModelRow, model: nn.Module, setting: Setting) -> dict[str, Tensor]:
    """Return the logits of a batch and, for an EFFT row, the gradient of every factor."""
    with row.running():
        logits, loss = setting.loss(model, *setting.examples(model))
    loss.backward()
    found = {"logits": logits.detach()}
    if row.is_efft:
        for name, factor in efft.named_factors(model):
            assert factor.grad is not None, f"{name} got no gradient"
            found[f"gradient of {name}"] = factor.grad
    model.zero_grad()  # sets the gradients to None, so that those in found remain
    return found


@functools.cache
def in_fp64(row: ModelRow, setting: Setting) -> dict[str, Tensor]:
    """Return :func:`probe` of ``row`` in fp64. It is cached, as the runs in fp32 and bf16 are both compared with it."""
    return probe(row, setting.build(row), setting)
