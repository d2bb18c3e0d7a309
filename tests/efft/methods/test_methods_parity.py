"""Compare the updates of every method other than EFFT with dense formulas, which compute one matrix after the other.

LoRA and VeRA are also compared with ``peft``. Other tests cover initial values, counts and refused settings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft import methods
from efft.adapting.inject import adapted_layers
from efft.config import AdapterConfig

Make = Callable[..., nn.Module]
Factors = dict[str, Tensor]
Dense = Callable[[Factors], dict[str, Tensor]]

R, S = 3, 0.7
L, H = 2, 2  # numbers of blocks and heads of the tiny ViT
ROLES = {"qkv": "attn.qkv", "o": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def by_layer(matrix: Callable[[str, int], Tensor]) -> dict[str, Tensor]:
    """Return ΔW [d_in, d_out] of every layer; ``matrix`` computes ΔW for a role, such as "qkv", in block l."""
    return {f"blocks.{l}.{ending}": S * matrix(role, l) for role, ending in ROLES.items() for l in range(L)}


def of_blocks(matrix: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
    """Return ΔW of every layer; ``matrix`` computes the d x d matrix m of block l.

    The matrices of a block are q, k, v, o, four for fc1 and four for fc2.
    """

    def assemble(role: str, l: int) -> Tensor:
        first, last = {"qkv": (0, 3), "o": (3, 4), "fc1": (4, 8), "fc2": (8, 12)}[role]
        return torch.cat([matrix(l, m) for m in range(first, last)], dim=0 if role == "fc2" else 1)

    return by_layer(assemble)


def lora(p: Factors) -> dict[str, Tensor]:
    return by_layer(lambda role, l: p[f"{role}.A"][l] @ p[f"{role}.B"][l])


def fact_tt(p: Factors) -> dict[str, Tensor]:
    return of_blocks(lambda l, m: p["joint.U"] @ p["joint.C"][l, m] @ p["joint.V"])


def fact_tk(p: Factors) -> dict[str, Tensor]:
    def matrix(l: int, m: int) -> Tensor:
        core = sum(p["joint.K"][:, :, k] * p["joint.P"][k, l, m] for k in range(R))
        return p["joint.U"] @ core @ p["joint.V"]

    return of_blocks(matrix)


def lotr(p: Factors) -> dict[str, Tensor]:
    return by_layer(lambda role, l: p[f"{role}.U"] @ p[f"{role}.C"][l] @ p[f"{role}.V"])


def metatt_4d(p: Factors) -> dict[str, Tensor]:
    G1, G2, G3, G4 = (p[f"joint.G{k}"] for k in range(1, 5))
    return of_blocks(lambda l, m: G1 @ G2[l] @ G3[m] @ G4)


def metatt_5d(p: Factors) -> dict[str, Tensor]:
    G1, G2, G3, G4, G5 = (p[f"joint.G{k}"] for k in range(1, 6))
    return of_blocks(lambda l, m: torch.cat([G1 @ G2[l] @ G3[m] @ G4[h] @ G5 for h in range(H)], dim=1))


def lorta(p: Factors, heads_on: str = "input") -> dict[str, Tensor]:
    """Return the updates. With ``heads_on="input"``, they are transposed, as in the authors' code (``x @ dW.T``)."""

    def matrix(l: int, m: int) -> Tensor:
        c = p["joint.C_l"][l] * p["joint.C_m"][m]
        heads = [p["joint.A"] @ torch.diag(c * p["joint.C_h"][h]) @ p["joint.B"] for h in range(H)]
        dW = torch.cat(heads, dim=1)
        return dW.T if heads_on == "input" else dW

    return of_blocks(matrix)


def tenslora(tensor: str, p: Factors) -> dict[str, Tensor]:
    """Return the updates, which are slices of dense tensors [in, d / heads, heads, matrices, blocks]."""
    modes = tensor.split("_")

    def whole(x: int, y: int) -> Tensor:
        one = torch.ones(1, 1, dtype=torch.float64)
        heads, matrices, blocks = (p[f"joint.modes.{m}"][x, y] if m in modes else one for m in ("att", "qkv", "depth"))
        U, V, core = (p[f"joint.{name}"][x, y] for name in ("U", "V", "core"))
        return torch.einsum("abhml,ia,bo,nh,jm,kl->ionjk", core, U, V, heads, matrices, blocks)

    def matrix(l: int, m: int) -> Tensor:
        x, k = (0, l) if "depth" in modes else (l, 0)
        y, j = (0, m) if "qkv" in modes else (m, 0)
        dense = whole(x, y)[..., j, k]
        return torch.cat([dense[:, :, h] for h in range(dense.shape[2])], dim=1)

    return of_blocks(matrix)


def tt_lora(p: Factors) -> dict[str, Tensor]:
    def matrix(role: str, l: int) -> Tensor:
        a, b, c, d, e, f = (p[f"{role}.cores.{k}"][l] for k in range(6))
        dense = torch.einsum("oiq,qjr,rks,sxt,tyu,uzv->kjixyz", a, b, c, d, e, f)  # input indices in reverse order
        return dense.reshape(dense[..., 0, 0, 0].numel(), -1)

    return by_layer(matrix)


def loretta_rep(p: Factors) -> dict[str, Tensor]:
    def matrix(role: str, l: int) -> Tensor:
        down, up = ([p[f"{role}.{side}.{k}"][l] for k in range(4)] for side in ("down", "up"))
        A = torch.einsum("oiq,qjr,rks,sbt->ijkb", *down)
        B = torch.einsum("obq,qir,rjs,skt->bijk", *up)
        return A.reshape(-1, A.shape[-1]) @ B.reshape(B.shape[0], -1)

    return by_layer(matrix)


def vera(p: Factors) -> dict[str, Tensor]:
    def matrix(role: str, l: int) -> Tensor:
        d, b = (torch.diag(p[f"{role}.lambda_{letter}"][l]) for letter in "db")
        return p[f"{role}.A"] @ d @ p[f"{role}.B"] @ b

    return by_layer(matrix)


TENSORS = {
    "att": [4, 3, 2],
    "qkv": [4, 3, 2],
    "depth": [4, 3, 2],
    "att_qkv": [4, 3, 2, 5],
    "att_depth": [4, 3, 2, 1],
    "qkv_depth": [4, 3, 5, 2],
    "att_qkv_depth": [4, 3, 2, 5, 2],
}

CASES: dict[str, tuple[AdapterConfig, Dense]] = {
    "lora": (methods.LoRAConfig(rank=R, scale=S), lora),
    "fact_tt": (methods.FacTTTConfig(rank=R, scale=S), fact_tt),
    "fact_tk": (methods.FacTTKConfig(rank=R, scale=S), fact_tk),
    "lotr": (methods.LoTRConfig(rank=R, scale=S), lotr),
    "metatt_4d": (methods.MetaTT4DConfig(rank=R, scale=S), metatt_4d),
    "metatt_5d": (methods.MetaTT5DConfig(rank=R, scale=S), metatt_5d),
    "lorta": (methods.LoRTAConfig(rank=R, scale=S), lorta),
    "lorta output": (
        methods.LoRTAConfig(rank=R, scale=S, heads_on="output"),
        functools.partial(lorta, heads_on="output"),
    ),
    "tt_lora": (methods.TTLoRAConfig(rank=R, scale=S), tt_lora),
    "loretta_rep": (methods.LoRETTARepConfig(rank=R, bottleneck=5, scale=S), loretta_rep),
    "vera": (methods.VeRAConfig(rank=R, scale=S), vera),
}

for tensor, ranks in TENSORS.items():
    tenslora_config = methods.TensLoRAConfig(tensor=tensor, ranks=ranks, targets="all", scale=S)
    CASES[f"tenslora {tensor}"] = (tenslora_config, functools.partial(tenslora, tensor))


@pytest.fixture
def parity(show: Callable[..., None]) -> Callable[..., None]:
    """Return a function that records the largest relative difference between fp64 updates and the formula."""

    def note(method: str, *pairs: tuple[Tensor, Tensor]) -> None:
        error = max(((got - expected).abs().max() / expected.abs().max()).item() for got, expected in pairs)
        show("Methods", method, "update - formula", error)

    return note


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_the_formula(
    case: str, tiny_vit: Make, randomize: Callable[..., nn.Module], parity: Callable[..., None]
) -> None:
    config, dense = CASES[case]
    model = randomize(efft.apply(tiny_vit().double(), config))
    expected = dense(model.efft.state_dict())
    layers = adapted_layers(model)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta_weight().t(), expected[name], rtol=1e-10, atol=1e-12)
    default = case.removesuffix(f" {methods.TensLoRAConfig.tensor}").removesuffix(" output")
    parity(default, *((layer.delta_weight().t(), expected[name]) for name, layer in layers.items()))


@pytest.mark.parametrize("bias", [True, False])
def test_loretta_adp_is_an_adapter_behind_the_layer(
    bias: bool, tiny_vit: Make, randomize: Callable[..., nn.Module], parity: Callable[..., None]
) -> None:
    config = methods.LoRETTAAdpConfig(rank=R, bottleneck=5, scale=S, bias=bias)
    model = randomize(efft.apply(tiny_vit().double(), config))
    assert set(model.efft.layers) == {f"blocks.{l}.{ending}" for l in range(L) for ending in ("attn.proj", "mlp.fc2")}
    p, layer = model.efft.state_dict(), model.blocks[1].mlp.fc2
    A = torch.einsum("oiq,qjr,rks,sbt->ijkb", *(p[f"fc2.down.{k}"][1] for k in range(4))).reshape(16, 5)
    B = torch.einsum("obq,qir,rjs,skt->bijk", *(p[f"fc2.up.{k}"][1] for k in range(4))).reshape(5, 16)
    x = torch.randn(7, 64, dtype=torch.float64)
    z = x @ layer.weight.t() + layer.bias
    b_A, b_B = (p[f"fc2.{side}_bias"][1] for side in ("down", "up")) if bias else (0, 0)
    expected = z + S * ((z @ A + b_A).clamp(min=0) @ B + b_B)
    torch.testing.assert_close(layer(x), expected)
    parity("loretta_adp", (layer(x), expected))


def test_lora_xs_works_between_singular_vectors(
    tiny_vit: Make, randomize: Callable[..., nn.Module], parity: Callable[..., None]
) -> None:
    model = randomize(efft.apply(tiny_vit().double(), methods.LoRAXSConfig(rank=R, scale=S)))
    for name, layer in adapted_layers(model).items():
        bank, i = layer.factors, layer.site
        expected = S * bank.A[i] @ bank.R[i] @ bank.B[i]
        torch.testing.assert_close(layer.delta_weight().t(), expected)
        parity("lora_xs", (layer.delta_weight().t(), expected))
        # (A B)ᵀ is the best approximation of W at rank R (Eckart-Young theorem).
        lost = (layer.weight - (bank.A[i] @ bank.B[i]).t()).norm()
        torch.testing.assert_close(lost, torch.linalg.svdvals(layer.weight)[R:].norm(), msg=name)
        torch.testing.assert_close(bank.B[i] @ bank.B[i].t(), torch.eye(R, dtype=torch.float64))
        # As in the authors' code, the encoder is TruncatedSVD's transform of Wᵀ, which includes the singular values.
        torch.testing.assert_close(bank.A[i], layer.weight.t() @ bank.B[i].t())
        torch.testing.assert_close(bank.A[i].norm(dim=0), torch.linalg.svdvals(layer.weight)[:R])


def with_peft(model: nn.Module, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return ``model`` with an adapter of ``peft`` on every qkv layer, and these layers by name."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    config = getattr(peft, settings.pop("config"))(target_modules=["qkv"], **settings)
    adapted = peft.get_peft_model(model, config).base_model.model
    return adapted, {n: m for n, m in adapted.named_modules() if n.endswith("attn.qkv")}


def gradients(model: nn.Module, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), parameters))


def test_lora_of_peft(tiny_vit: Make, randomize: Callable[..., nn.Module], images: Tensor) -> None:
    ours = randomize(
        efft.apply(tiny_vit().double().eval(), methods.LoRAConfig(rank=R, scale=2.0, targets=["attn.qkv"]))
    )
    theirs, layers = with_peft(tiny_vit().double().eval(), config="LoraConfig", r=R, lora_alpha=2 * R)
    A, B = ours.efft["qkv"].A, ours.efft["qkv"].B
    pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers.values()]
    with torch.no_grad():
        for i, (theirs_A, theirs_B) in enumerate(pairs):
            theirs_A.copy_(A[i].t())
            theirs_B.copy_(B[i].t())
    x = images.double()
    torch.testing.assert_close(ours(x), theirs(x))
    dA, dB = gradients(ours, x, [A, B])
    reference = gradients(theirs, x, [p for pair in pairs for p in pair])
    torch.testing.assert_close(dA, torch.stack([g.t() for g in reference[::2]]))
    torch.testing.assert_close(dB, torch.stack([g.t() for g in reference[1::2]]))


def test_vera_of_peft(tiny_vit: Make, randomize: Callable[..., nn.Module], images: Tensor) -> None:
    ours = randomize(efft.apply(tiny_vit().double().eval(), methods.VeRAConfig(rank=R, targets=["attn.qkv"])))
    theirs, layers = with_peft(tiny_vit().double().eval(), config="VeraConfig", r=R)
    bank = ours.efft["qkv"]
    pairs = [(layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]) for layer in layers.values()]
    with torch.no_grad():
        for i, (layer, (lambda_d, lambda_b)) in enumerate(zip(layers.values(), pairs, strict=True)):
            layer.vera_A["default"], layer.vera_B["default"] = bank.A.t().contiguous(), bank.B.t().contiguous()
            lambda_d.copy_(bank.lambda_d[i])
            lambda_b.copy_(bank.lambda_b[i])
    x = images.double()
    torch.testing.assert_close(ours(x), theirs(x))
    dd, db = gradients(ours, x, [bank.lambda_d, bank.lambda_b])
    reference = gradients(theirs, x, [p for pair in pairs for p in pair])
    torch.testing.assert_close(dd, torch.stack(reference[::2]))
    torch.testing.assert_close(db, torch.stack(reference[1::2]))


@pytest.mark.parametrize("tensor", TENSORS)
def test_number_of_parameters_of_tenslora(tensor: str, tiny_vit: Make) -> None:
    ranks, modes = TENSORS[tensor], tensor.split("_")
    sizes = {"att": H, "qkv": 12, "depth": L}
    model = efft.apply(tiny_vit(), methods.TensLoRAConfig(tensor=tensor, ranks=ranks, targets="all"))
    tensors = math.prod(sizes[mode] for mode in ("qkv", "depth") if mode not in modes)
    lengths = [16, 16 // H if "att" in modes else 16, *(sizes[mode] for mode in modes)]
    each = math.prod(ranks) + sum(n * r for n, r in zip(lengths, ranks, strict=True))
    assert efft.count_parameters(model).factors == tensors * each


def bank_of(config: AdapterConfig, make: Make, group: str) -> nn.Module:
    return efft.apply(make(embed_dim=64, depth=4), config).efft[group]


UNIFORM = {  # factors with a uniform initial distribution, and the bound for width 64
    "lora A": (methods.LoRAConfig(rank=8), "fc2", lambda bank: bank.A, 256**-0.5),
    "fact_tt U": (methods.FacTTTConfig(rank=8), "joint", lambda bank: bank.U, 64**-0.5),
    "fact_tt C of fc1": (methods.FacTTTConfig(rank=8), "joint", lambda bank: bank.C[:, 4:8], 8**-0.5),
    "fact_tt C of fc2": (methods.FacTTTConfig(rank=8), "joint", lambda bank: bank.C[:, 8:], 32**-0.5),
    "fact_tk K": (methods.FacTTKConfig(rank=8), "joint", lambda bank: bank.K, (3 / 64) ** 0.5),
    "fact_tk P": (methods.FacTTKConfig(rank=8), "joint", lambda bank: bank.P, (6 / (8 + 48)) ** 0.5),
    "lorta A": (methods.LoRTAConfig(rank=8), "joint", lambda bank: bank.A, 8**-0.5),
    "vera A": (methods.VeRAConfig(rank=8), "fc1", lambda bank: bank.A, (6 / 64) ** 0.5),
    "vera B": (methods.VeRAConfig(rank=8), "fc1", lambda bank: bank.B, (6 / 8) ** 0.5),
}


@pytest.mark.parametrize("factor", UNIFORM)
def test_factors_that_start_uniform(factor: str, tiny_vit: Make) -> None:
    config, group, select, bound = UNIFORM[factor]
    values = select(bank_of(config, tiny_vit, group)).detach()
    assert 0.97 * bound < values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_factors_that_start_otherwise(tiny_vit: Make) -> None:
    lotr = bank_of(methods.LoTRConfig(rank=8), tiny_vit, "fc1")
    assert lotr.U.std().item() == pytest.approx(1, rel=0.1)
    assert lotr.V.std().item() == pytest.approx(1, rel=0.1)
    metatt = bank_of(methods.MetaTT5DConfig(rank=8), tiny_vit, "joint")
    for cores in (metatt.G2, metatt.G3, metatt.G4):
        assert torch.equal(cores.detach(), torch.eye(8).expand_as(cores))
    assert torch.equal(metatt.G5.detach(), torch.eye(8, 32))
    tenslora = bank_of(methods.TensLoRAConfig(rank=3), tiny_vit, "joint")
    for factor in (tenslora.U[0, 0], tenslora.V[0, 0].t(), tenslora.modes["depth"][0, 0]):
        torch.testing.assert_close(factor.t() @ factor, torch.eye(3))
    vera = bank_of(methods.VeRAConfig(rank=8), tiny_vit, "fc1")
    assert torch.equal(vera.lambda_d.detach(), torch.full((4, 8), 0.1))


#: For each case, the configuration, the width of the MLP divided by the width of the model, and the error.
REFUSED: dict[str, tuple[AdapterConfig, float, str]] = {
    "no heads": (
        methods.LoRTAConfig(targets="ffn"),
        4,
        r"config, found none; set heads=\.\.\. in the method's configuration",
    ),
    "heads": (
        methods.MetaTT5DConfig(heads=3),
        4,
        "the number of heads must divide the layers' width 16, got 3; set heads=",
    ),
    "rank": (
        methods.LoRAXSConfig(rank=17),
        4,
        "LoRAXSConfig.rank must be at most .*, got 17, but 'blocks.0.attn.qkv' is",
    ),
    "later": (methods.LoRAXSConfig(rank=16), 0.5, "got 16, but 'blocks.0.mlp.fc1' is 16x8"),
    "width": (
        methods.FacTTTConfig(),
        2.5,
        "'joint': layers that share U and V must have the sizes d -> d, .* is 16x40",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tiny_vit: Make, unchanged: Callable[..., Any]) -> None:
    config, ratio, message = REFUSED[case]
    model = tiny_vit(mlp_ratio=ratio)
    with unchanged(model), pytest.raises(ValueError, match=message):
        efft.apply(model, config)


def test_ranks_are_one_for_each_mode() -> None:
    with pytest.raises(
        ValueError, match=r"ranks must be None or 4 integers, each a rank, for tensor 'att_qkv', got \[4, 3\]"
    ):
        methods.TensLoRAConfig(tensor="att_qkv", ranks=[4, 3])
