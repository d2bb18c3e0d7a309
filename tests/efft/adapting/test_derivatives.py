"""Test second derivatives of an adapted model, and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import efft
from efft_kernels import Backend, can_run, tt_linear_grouped, use_backend

Make = Callable[..., nn.Module]
Parameters = dict[str, Tensor]

METHODS = {
    "efft2": efft.EfftConfig(rank=4),
    "efft1": efft.EfftConfig(rank=4, variant="efft1", trainable_scale="group"),
    "lora": efft.methods.LoRAConfig(rank=4),
    "lora_xs": efft.methods.LoRAXSConfig(rank=4),  # its factor A is frozen, so no layer must save its input
    "loretta_adp": efft.methods.LoRETTAAdpConfig(rank=4, bottleneck=5),
}


@pytest.fixture(autouse=True)
def attention() -> Iterator[None]:
    """Disable torch's fused attention, which raises an error for a second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest, tiny_vit: Make, randomize: Callable[..., nn.Module]) -> nn.Module:
    return randomize(efft.apply(tiny_vit().double().eval(), METHODS[request.param]))


@pytest.fixture
def one_model(tiny_vit: Make, randomize: Callable[..., nn.Module]) -> nn.Module:
    return randomize(efft.apply(tiny_vit().double().eval(), METHODS["efft2"]))


def factors(model: nn.Module) -> Parameters:
    return {f"efft.{name}": p.detach() for name, p in model.efft.named_parameters()}


def penalty(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the gradients of a gradient penalty with respect to all parameters of the adapter.

    The penalty is the squared norm of a gradient with respect to the images.
    """
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    return list(torch.autograd.grad(g.square().sum(), list(model.efft.parameters())))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_gradient_penalty(model: nn.Module, images: Tensor, fused: bool) -> None:
    """Compare all gradients with those of the reference backend, which uses only torch's operations, and one entry of a
    gradient with finite differences."""
    if fused:
        efft.fuse(model)
    x = images.double()
    with use_backend("eager"):
        got = penalty(model, x)
    with use_backend("reference"):
        right = penalty(model, x)
    for value, expected in zip(got, right, strict=True):
        torch.testing.assert_close(value, expected)

    def first() -> float:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(leaf).sin().sum(), leaf)
        return g.square().sum().item()

    parameter, value = max(zip(model.efft.parameters(), got, strict=True), key=lambda pair: pair[1].abs().max())
    at, step = value.abs().argmax(), 1e-5
    with torch.no_grad(), use_backend("eager"):
        parameter.view(-1)[at] += step
        with torch.enable_grad():
            above = first()
        parameter.view(-1)[at] -= 2 * step
        with torch.enable_grad():
            below = first()
    assert (above - below) / (2 * step) == pytest.approx(value.view(-1)[at].item(), rel=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_a_gradient_penalty_of_a_compiled_backend(
    tiny_vit: Make, randomize: Callable[..., nn.Module], images: Tensor, backend: str
) -> None:
    if (reason := can_run(backend if backend != "auto" else "reference", images)) is not None:
        pytest.skip(reason)
    model = randomize(efft.apply(tiny_vit().eval(), METHODS["efft2"]))
    with use_backend(backend):
        got = penalty(model, images)
    with use_backend("reference"):
        right = penalty(model, images)
    for value, expected in zip(got, right, strict=True):
        assert (value - expected).norm() < 1e-4 * expected.norm()


def loss(model: nn.Module, parameters: Parameters, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(model, parameters, (images,)), labels)


def of_autograd(model: nn.Module, images: Tensor, labels: Tensor) -> Parameters:
    named = {f"efft.{name}": p for name, p in model.efft.named_parameters()}
    return dict(
        zip(named, torch.autograd.grad(F.cross_entropy(model(images), labels), list(named.values())), strict=True)
    )


LABELS = torch.tensor([0, 1, 2])


def test_grad_and_vjp(model: nn.Module, images: Tensor) -> None:
    x, p = images.double(), factors(model)
    expected = of_autograd(model, x, LABELS)
    torch.testing.assert_close(grad(lambda p: loss(model, p, x, LABELS))(p), expected)
    _, back = vjp(lambda p: loss(model, p, x, LABELS), p)
    torch.testing.assert_close(back(torch.ones((), dtype=torch.float64))[0], expected)


def test_a_gradient_for_every_sample(model: nn.Module, images: Tensor) -> None:
    x, p = images.double(), factors(model)

    def of_one(p: Parameters, image: Tensor, label: Tensor) -> Tensor:
        return loss(model, p, image[None], label[None])

    got = vmap(grad(of_one), (None, 0, 0))(p, x, LABELS)
    for i in range(3):
        expected = of_autograd(model, x[i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close({name: g[i] for name, g in got.items()}, expected)


def test_forward_mode_and_hessians(one_model: nn.Module, images: Tensor) -> None:
    model, x, p = one_model, images.double(), factors(one_model)
    tangents = {name: torch.randn_like(t) for name, t in p.items()}
    _, slope = jvp(lambda p: loss(model, p, x, LABELS), (p,), (tangents,))
    g = of_autograd(model, x, LABELS)
    torch.testing.assert_close(slope, sum((g[name] * tangents[name]).sum() for name in g))
    name = "efft.mhsa.C"
    core = p[name].flatten()[:4]

    def of_four(core: Tensor) -> Tensor:
        C = torch.cat([core, p[name].flatten()[4:]]).view_as(p[name])
        return loss(model, p | {name: C}, x, LABELS)

    H = hessian(of_four)(core)
    torch.testing.assert_close(H, H.T)
    step = torch.tensor([1e-5, 0, 0, 0], dtype=torch.float64)
    differences = (grad(of_four)(core + step) - grad(of_four)(core - step)) / 2e-5
    torch.testing.assert_close(H[0], differences, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_backend_by_name_is_refused_in_transforms(one_model: nn.Module, images: Tensor, backend: str) -> None:
    with (
        use_backend(backend),
        pytest.raises(
            RuntimeError, match=r"cannot run: torch\.func transforms only torch.s own operations, .*; leave the choice"
        ),
    ):
        grad(lambda p: loss(one_model, p, images.double(), LABELS))(factors(one_model))


def test_forward_mode_outside_of_the_transforms_is_refused(one_model: nn.Module, images: Tensor) -> None:
    """If an op cannot compute the tangent of its output, it must raise an error rather than drop the tangent."""
    with forward_ad.dual_level(), use_backend("eager"):
        x = forward_ad.make_dual(images.double(), torch.ones_like(images.double()))
        with pytest.raises(NotImplementedError, match="jvp"):
            one_model(x)
    factors: Any = (torch.ones(1, 4, 2), torch.ones(1, 2, 5), torch.zeros(2, dtype=torch.int64))
    for backend in (b for b in (Backend.EAGER, Backend.CPU) if can_run(b, images) is None):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
            with pytest.raises(NotImplementedError, match="jvp"):
                tt_linear_grouped(x, torch.ones(5, 4), None, *factors, backend=backend)
