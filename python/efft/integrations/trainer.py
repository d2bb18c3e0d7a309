"""Make transformers' Trainer use the learning rates of an adapter, and save only the adapter in its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from efft.adapting.inject import Adapter
from efft.adapting.optimizing import set_rates
from efft.adapting.sharding import is_sharded
from efft.adapting.wrappers import unwrap
from efft.saving.files import CONFIG
from efft.saving.io import load_adapter, save_adapter

if TYPE_CHECKING:  # the class is mixed into a Trainer, which provides the methods that the class calls
    from transformers import Trainer
else:
    Trainer = object


class AdapterCheckpoints(Trainer):
    """Mix this class into a Trainer to save only the adapter (a few MiB) in its checkpoints, as ``peft`` does::

        class AdapterTrainer(AdapterCheckpoints, transformers.Trainer): ...

        trainer = AdapterTrainer(efft.apply(model, efft.EfftConfig()), arguments, ...)

    ``save_model``, ``load_best_model_at_end`` and ``resume_from_checkpoint`` then write and read the files of
    :func:`efft.save_adapter`, in addition to the usual states of the optimizer, the scheduler and the random number
    generators. Checkpoints with all weights of a model can still be read. Models that are not adapted are saved as
    usual.

    The optimizer that the Trainer creates uses the learning rates of the adapter's configuration
    (:attr:`efft.EfftConfig.rates`), as multiples of ``learning_rate``. Without this class, the Trainer uses one
    learning rate for all parameters, unless it gets an optimizer with the groups of :func:`efft.parameter_groups`.

    The Trainer also accepts an adapted quantized model. Without this class, the Trainer would reject the model as
    "purely quantized", because it does not know the adapters of this library.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        with _mark_as_adapted(model):
            super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if not given:
            set_rates(optimizer, self.model)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.model
        if not isinstance(getattr(unwrap(model), "efft", None), Adapter):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save and not is_sharded(model):
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        save_adapter(model, folder)  # every process of a sharded model must call this
        if not self.args.should_save:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_adapter_of(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_adapter_of(self.state.best_model_checkpoint, None):
            super()._load_best_model()

    def _load_adapter_of(self, folder: str | os.PathLike[str], model: nn.Module | None) -> bool:
        """Load the adapter in ``folder``, if it holds one, and return whether an adapter was loaded."""
        target = unwrap(self.model if model is None else model)
        if not isinstance(getattr(target, "efft", None), Adapter) or not (Path(folder) / CONFIG).is_file():
            return False
        load_adapter(target, folder)
        return True


@contextmanager
def _mark_as_adapted(model: Any) -> Iterator[None]:
    """Mark an adapted quantized model within the ``with`` block with the attribute that transformers checks."""
    adapted = isinstance(model, nn.Module) and isinstance(getattr(unwrap(model), "efft", None), Adapter)
    if not adapted or not getattr(model, "is_quantized", False) or "_hf_peft_config_loaded" in model.__dict__:
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded
