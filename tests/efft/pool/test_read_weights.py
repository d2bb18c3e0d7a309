"""Test models whose modules read the weight of a linear layer instead of calling the layer.

Attention modules of BEiT, EVA and Swin V2 do this, because they compute the bias of ``qkv`` themselves. An adapter must
have the same effect on such a model in a pool and in a shared backbone as alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efft

pytestmark = pytest.mark.filterwarnings("ignore:.*are read directly by AsAMatrix")

WIDTH = 12


class WithOtherBias(nn.Module):
    """Multiplies by the weight and adds its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH, bias=False)
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.fc.weight, bias=2 * self.shift)


class WithItsBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        return F.linear(x.to(weight.dtype), weight, self.fc.bias)


class AsAMatrix(WithItsBias):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight.t() + self.fc.bias


class ReadsTheDtype(WithItsBias):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        assert list(weight.shape) == [WIDTH, WIDTH]
        return self.fc(x.to(weight.dtype))


class Model(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(x.mean(1))


KINDS = [WithOtherBias, WithItsBias, AsAMatrix, ReadsTheDtype]


def base(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = Model(kind).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def adapted(kind: Callable[[], nn.Module], seed: int, **config: object) -> nn.Module:
    model = efft.apply(base(kind), efft.EfftConfig(rank=2 + seed, dropout=0.0, targets=[r"blocks\.\d\.fc"], **config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool(kind: Callable[[], nn.Module], x: Tensor) -> None:
    model = base(kind)
    models: dict[str | None, nn.Module] = {None: base(kind), "a": adapted(kind, 0), "b": adapted(kind, 1)}
    pool = efft.AdapterPool(model)
    for name in ("a", "b"):
        pool.add(name, models[name])
    with torch.no_grad():
        expected = {name: alone(x) for name, alone in models.items()}
    for name in models:
        with pool.use(name):
            torch.testing.assert_close(model(x), expected[name])
    if kind is not AsAMatrix:
        names = ["b", None, "a", "b"]
        with pool.use(names):
            torch.testing.assert_close(model(x), torch.stack([expected[name][i] for i, name in enumerate(names)]))
    assert torch.equal(pool.detach()(x), expected[None])


def test_samples_cannot_have_matrices_of_their_own(x: Tensor) -> None:
    model = base(AsAMatrix)
    pool = efft.AdapterPool(model)
    pool.add("a", adapted(AsAMatrix, 0))
    with (
        pool.use(["a", None, "a", "a"]),
        pytest.raises(ValueError, match="weight of a PooledDelta is read directly by the module around it"),
    ):
        model(x)


def test_a_compiled_pool(x: Tensor) -> None:
    model, alone = base(WithOtherBias), adapted(WithOtherBias, 0)
    pool = efft.AdapterPool(model)
    pool.add("a", alone)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), pool.use("a"):
        torch.testing.assert_close(compiled(x), alone(x))
    with pool.use(["a"] * 4), pytest.raises(Exception, match="is read directly by the module around it"):
        compiled(x)


@pytest.mark.parametrize(
    ("kind", "bias"),
    [(WithOtherBias, "none"), (WithItsBias, "none"), (WithItsBias, "adapted"), (ReadsTheDtype, "adapted")],
)
def test_a_shared_backbone(kind: Callable[[], nn.Module], bias: str, x: Tensor) -> None:
    def step(models: dict[str, nn.Module], outputs: dict[str, Tensor]) -> list[Tensor]:
        trained = [p for model in models.values() for p in model.parameters() if p.requires_grad]
        return [*outputs.values(), *torch.autograd.grad(sum(y.square().sum() for y in outputs.values()), trained)]

    alone, together = ({f"{i}": adapted(kind, i, bias=bias) for i in range(2)} for _ in range(2))
    batches = {"0": x[:3], "1": x[3:]}
    expected = step(alone, {name: model(batches[name]) for name, model in alone.items()})
    torch.testing.assert_close(step(together, efft.SharedBackbone(together)(batches)), expected)


def test_a_shared_backbone_has_no_common_matrix(x: Tensor) -> None:
    shared = efft.SharedBackbone({f"{i}": adapted(AsAMatrix, i) for i in range(2)})
    with pytest.raises(ValueError, match="weight of a JointDelta is read directly by the module around it"):
        shared({"0": x[:3], "1": x[3:]})
