"""Provide fixtures for all tests of efft: tiny models, adapted models with random factors, and checks of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import efft
from efft.adapting.inject import adapter_of
from efft.config import AdapterConfig

Make = Callable[..., nn.Module]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread: models this small do not run faster with two, and two can be much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_vit() -> Make:
    """Return a function that creates a timm ViT (16-pixel images, width 16, 2 blocks), always with the same weights."""
    models = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'").models

    def make(**changes: Any) -> nn.Module:
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
        torch.manual_seed(0)
        return models.VisionTransformer(**{**sizes, **changes})

    return make


@pytest.fixture
def tiny_swin() -> Make:
    """Return a function that creates a timm Swin with 2 blocks in each of 4 stages for 32-pixel images.

    The widths are 8 to 64. The model has no drop path, and every call creates equal weights.
    """
    models = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'").models

    def make(**changes: Any) -> nn.Module:
        sizes = {"img_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (2, 2, 2, 2)}
        fixed = {"num_heads": (1, 2, 2, 4), "num_classes": 5, "drop_path_rate": 0.0}
        torch.manual_seed(0)
        return models.SwinTransformer(**{**sizes, **fixed, **changes})

    return make


@pytest.fixture
def images() -> Tensor:
    """Return three images for the tiny ViT."""
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def randomize() -> Callable[..., nn.Module]:
    """Return a function that makes every factor random. By default, updates and frozen products are of similar size."""

    def fill(model: nn.Module, std: float = 0.5, seed: int = 2) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, factor in efft.named_factors(model):
                factor.copy_(std * torch.randn(factor.shape, generator=generator, dtype=torch.float64))
        return model

    return fill


@pytest.fixture
def adapted_vit(tiny_vit: Make, randomize: Callable[..., nn.Module]) -> Make:
    """Return a function that creates the tiny ViT in eval mode, adapted with random factors (by default of rank 4)."""

    def make(std: float = 0.5, **changes: Any) -> nn.Module:
        model = tiny_vit().eval()
        return randomize(efft.apply(model, efft.EfftConfig(**{"rank": 4, **changes})), std)

    return make


@pytest.fixture
def adapter(tiny_vit: Make, randomize: Make) -> Make:
    """Return a function that creates an adapted tiny ViT in eval mode. ``seed`` determines its factors and head."""

    def make(seed: int, config: AdapterConfig | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = efft.apply(tiny_vit().to(dtype).eval(), config or efft.EfftConfig(rank=4, scale=0.7))
        randomize(model, 0.2, seed)
        with torch.no_grad():
            for name in adapter_of(model).head:
                weight = model.get_submodule(name).weight
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        return model

    return make


@pytest.fixture
def pool(tiny_vit: Make) -> efft.AdapterPool:
    """Return a pool for the tiny ViT. A pool holds several adapters of one model, and this one has no adapter yet."""
    return efft.AdapterPool(tiny_vit().eval())


@pytest.fixture
def saved(adapted_vit: Make, tmp_path: Path) -> tuple[nn.Module, Path]:
    """Return an adapted tiny ViT whose head differs from the initial one, and the folder of its adapter."""
    model = adapted_vit(scale=0.7, init="vu")
    with torch.no_grad():
        model.head.weight.mul_(2)
        model.head.bias.add_(1)
    return model, efft.save_adapter(model, tmp_path / "adapter")


@pytest.fixture
def graph_breaks() -> Callable[..., int]:
    """Return a function that runs a model under torch.compile and counts the graph breaks."""

    def count(model: nn.Module, *args: Tensor, **inputs: Tensor) -> int:
        torch.compiler.reset()
        counters["graph_break"].clear()
        torch.compile(model, backend="eager")(*args, **inputs)
        return sum(counters["graph_break"].values())

    return count


@pytest.fixture
def unchanged() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """Return a function for ``with unchanged(model):``, which fails if the block changes the state of the model."""

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before = _snapshot(model)
        yield
        after = _snapshot(model)
        assert after.keys() == before.keys()
        assert [key for key in before if after[key] != before[key]] == []

    return check


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Return the visible state of a model as values that can be compared with ==."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
        attributes = sorted(k for k in vars(module) if not k.startswith("_"))
        seen[f"module {name}"] = (id(module), type(module), module.training, hooks, attributes)
    for name, parameter in model.named_parameters():
        seen[f"parameter {name}"] = (id(parameter), parameter.requires_grad)
    for name, tensor in model.state_dict().items():
        seen[f"state {name}"] = (tensor.dtype, tensor.shape, _bits(tensor))
    return seen


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
