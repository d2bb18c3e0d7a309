"""Check the results of a row, which is one way to adapt a model. A row with wrong results is not timed."""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor, nn

import efft
from benchmarks.model.rows import FLOOR, NAIVE, PAPER, ModelRow
from benchmarks.model.step import Setting
from efft_kernels.testing import assert_close_budget


class Gate:
    """Compare a row with the same model in fp64, on a few images before any training.

    The check of a row that computes the EFFT update covers its logits and the gradient of every factor. Each error may
    be at most twice the error of the row ``naive`` in the same precision; ``naive`` builds the dense weights W + dW.
    The row ``naive`` itself is compared with the row ``paper``, which multiplies the activations by dense dW.

    All other rows have zero updates before training. Their logits must therefore be those of the plain model. The check
    covers only these logits. Their error may be at most twice the plain model's error in the same precision.

    Rounding errors accumulate over the layers. In bf16 this check therefore finds only errors of several percent. The
    command ``ops`` finds smaller errors.
    """

    def __init__(self, setting: Setting, images: int = 2) -> None:
        self.setting = replace(setting, batch=min(images, setting.batch))
        self._rounded = {row: probe(row, self.setting.build(row), self.setting) for row in (FLOOR, NAIVE, PAPER)}

    def verdict(self, row: ModelRow, model: nn.Module) -> str | None:
        """Return None if the results of ``model`` are accurate, or a description of the error.

        ``model`` must be the result of ``setting.build(row)``.
        """
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
    """Return the logits of a batch and, if the row computes the EFFT update, the gradient of every factor."""
    with row.running():
        logits, loss = setting.loss(model, *setting.examples(model))
    loss.backward()
    found = {"logits": logits.detach()}
    if row.is_efft:
        for name, factor in efft.named_factors(model):
            assert factor.grad is not None, f"{name} has no gradient"
            found[f"gradient of {name}"] = factor.grad
    model.zero_grad()  # sets the gradients to None and leaves the tensors in found unchanged
    return found


@functools.cache
def in_fp64(row: ModelRow, setting: Setting) -> dict[str, Tensor]:
    """Return :func:`probe` of ``row`` in ``setting``, whose dtype must be float64.

    The result is cached, because several rows and dtypes are compared with it.
    """
    return probe(row, setting.build(row), setting)
