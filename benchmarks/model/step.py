"""Build models and training steps for the command ``model``, in which each row is one way to adapt a timm model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.model.rows import ModelRow
from efft.adapting.heads import find_head
from efft_kernels import can_run

N_CLASSES = 100


@dataclass(frozen=True)
class Setting:
    """Describe a timm model (random weights, no stochastic depth), its batch size, and its numeric precision.

    ``dtype`` is the dtype of autocast; the weights are in fp32. "float32" disables autocast. "float64" also disables
    autocast, and the weights are in fp64. ``cuda_graphs`` says whether the step is to be captured in a CUDA graph.
    """

    model: str = "vit_base_patch16_224"
    batch: int = 8
    rank: int = 32
    dtype: str = "float32"
    device: str = "cpu"
    cuda_graphs: bool = False

    def build(self, row: ModelRow) -> nn.Module:
        """Return the model of ``row`` in training mode; all rows and dtypes have equal weights and factors."""
        model = row.adapt(self.plain(), self.rank).train()
        return model.to(self.device, torch.float64 if self.dtype == "float64" else torch.float32)

    def plain(self) -> nn.Module:
        """Return the timm model that the rows adapt."""
        import timm

        torch.manual_seed(0)
        return timm.create_model(self.model, num_classes=N_CLASSES, drop_path_rate=0.0)

    def examples(self, model: nn.Module, n: int | None = None) -> tuple[Tensor, Tensor]:
        """Return random images [n, channels, height, width] for ``model``, and labels [n].

        The default of ``n`` is the batch size. The images are fp32, or fp64 if ``dtype`` is "float64".
        """
        size: tuple[int, int, int] = model.default_cfg["input_size"]  # type: ignore[assignment,index]
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(n or self.batch, *size, generator=generator)
        labels = torch.randint(N_CLASSES, (n or self.batch,), generator=generator)
        return images.to(self.device, torch.float64 if self.dtype == "float64" else None), labels.to(self.device)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Run a forward pass and return (logits [n, classes], loss)."""
        dtype = getattr(torch, self.dtype)
        with torch.autocast(images.device.type, dtype, enabled=dtype.itemsize < 4):
            logits = model(images)
            return logits, F.cross_entropy(logits, labels)


def unavailable(row: ModelRow, setting: Setting) -> str | None:
    """Return None if ``row`` can run in ``setting``, else the reason why it cannot."""
    if row.backend is None:
        return None
    return can_run(row.backend, torch.empty(1, dtype=getattr(torch, setting.dtype), device=setting.device))


def training_step(row: ModelRow, model: nn.Module, setting: Setting) -> Callable[[], None]:
    """Return a function that runs the forward pass, the backward pass and AdamW, always on the same batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=setting.cuda_graphs)
    images, labels = setting.examples(model)

    def step() -> None:
        with row.running():
            _, loss = setting.loss(model, images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def trainable(model: nn.Module) -> int:
    """Return the number of trainable parameters, including the head (the classifier)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_bytes(model: nn.Module, plain: nn.Module) -> int:
    """Return the number of bytes of all trained tensors except the head, which is found in ``plain``.

    An adapter file without a head contains this number of bytes of data.
    """
    head = sum(
        p.numel() * p.element_size() for n in find_head(plain, None) for p in plain.get_submodule(n).parameters()
    )
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) - head
