"""Test each kind of layer under peft, and layers that peft cannot adapt.

The oracle is a plain layer whose weight is the sum of the weight and the dense update.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from efft_kernels import Site, TTFactors

peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")

from efft.integrations.peft import EfftLayer, EfftPeftConfig  # noqa: E402  # it needs peft

IMAGE, IDS = torch.randn(3, 4, 6, 6), torch.tensor([[1, 0, 5], [2, 2, 1], [6, 3, 0]])

#: For each name, the layer, an input, and (d_in, d_out) of its weight as a matrix.
KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[int, int]]] = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(3, 7, 6), (6, 5)),
    "Conv1D": (lambda: transformers.pytorch_utils.Conv1D(5, 6), torch.randn(3, 7, 6), (6, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), IDS, (7, 5)),
    "embedding with padding": (lambda: nn.Embedding(7, 5, padding_idx=0), IDS, (7, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, padding=1), IMAGE[..., 0], (12, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1, padding_mode="reflect"), IMAGE, (36, 5)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2), IMAGE, (18, 8)),
    "conv2d, channels last": (
        lambda: nn.Conv2d(4, 5, (2, 3)).to(memory_format=torch.channels_last),
        IMAGE.to(memory_format=torch.channels_last),
        (24, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 5, (2, 1, 2)), IMAGE[..., None].expand(-1, -1, -1, -1, 3), (16, 5)),
}


def dense_update(kind: str, layer: nn.Module, U: Tensor, C: Tensor, V: Tensor) -> Tensor:
    """Return the update by its formula, in the layout of the layer's weight."""
    update = 1.7 * U @ C[0, 0] @ V  # [d_in, d_out]
    if kind == "embedding with padding":
        update = update * (torch.arange(7) > 0)[:, None]
    return update if kind.startswith(("Conv1D", "embedding")) else update.t().reshape(layer.weight.shape)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def adapted(kind: str) -> tuple[EfftLayer, nn.Module, TTFactors]:
    """Return the adapted layer, a plain fp64 copy of the layer with the update in its weight, and the factors."""
    torch.manual_seed(0)
    layer = KINDS[kind][0]().requires_grad_(False)
    factors = TTFactors(*KINDS[kind][2], rank=(2, 3), scale=1.7)
    nn.init.normal_(factors.V)
    expected = copy.deepcopy(layer).double()
    expected.weight.data += dense_update(kind, layer, *doubles(factors))
    wrapped = EfftLayer(layer)
    wrapped.update_layer("a", factors, Site())
    wrapped.set_adapter("a")
    return wrapped, expected, factors


def doubles(factors: TTFactors) -> list[Tensor]:
    return [p.detach().double().requires_grad_() for p in (factors.U, factors.C, factors.V)]


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def test_forward_merge_and_delta(kind: str) -> None:
    layer, expected, factors = adapted(kind)
    x = KINDS[kind][1]
    plain = layer.base_layer(x)
    wanted = expected(double(x)).float()
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    update = dense_update(kind, layer.base_layer, *doubles(factors))
    torch.testing.assert_close(layer.get_delta_weight("a"), update.float(), rtol=1e-5, atol=1e-5)
    before = layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), plain)
    layer.enable_adapters(True)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_gradients_of_the_factors(kind: str) -> None:
    layer, _, factors = adapted(kind)
    x = KINDS[kind][1]
    layer(x).square().sum().backward()
    wide, wanted = copy.deepcopy(layer.base_layer).double(), doubles(factors)
    weight = wide.weight + dense_update(kind, wide, *wanted)
    torch.func.functional_call(wide, {"weight": weight}, (double(x),)).square().sum().backward()
    for factor, leaf in zip((factors.U, factors.C, factors.V), wanted, strict=True):
        torch.testing.assert_close(factor.grad, leaf.grad.float(), rtol=1e-4, atol=1e-4)


def test_an_adapter_per_sample(kind: str) -> None:
    layer, expected, _ = adapted(kind)
    x = KINDS[kind][1]
    mixed = layer(x, adapter_names=["a", "__base__", "a"])
    torch.testing.assert_close(mixed[1], layer.base_layer(x)[1])
    torch.testing.assert_close(mixed[::2], expected(double(x)).float()[::2], rtol=1e-4, atol=1e-5)


def test_what_the_output_of_an_embedding_is_scaled_by() -> None:
    embedding = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(7, 5, 0, embed_scale=3.0)
    factors = TTFactors(7, 5, rank=2)
    nn.init.normal_(factors.V)
    layer = EfftLayer(embedding)
    layer.update_layer("a", factors, Site())
    layer.set_adapter("a")
    live = layer(IDS)
    layer.merge()
    torch.testing.assert_close(layer(IDS), live)


def test_a_convolution_of_a_model() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3), nn.GELU(), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(96, 3)).eval()
    plain = copy.deepcopy(base)
    config = EfftPeftConfig(r=2, target_modules=["0", "2"], modules_to_save=["4"], init_weights=False)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        live = model(IMAGE)
        assert (live - plain(IMAGE)).abs().max() > 0.1
        torch.testing.assert_close(model.merge_and_unload()(IMAGE), live, rtol=1e-4, atol=1e-5)


def test_layers_that_are_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)

    for name in ("attention.out_proj", "norm", "attention"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            peft.get_peft_model(Attention(), EfftPeftConfig(r=2, target_modules=[name]))


def test_weights_that_are_read_and_layers_that_are_not_called() -> None:
    """torchvision's Swin reads the weights of its attention layers without calling these layers.

    Under peft, updates of these layers would have no effect, so the forward pass must raise an error.
    """
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install 'efft-kernels[vision]'")

    def base() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5)
        return model.eval()

    x = torch.randn(2, 3, 64, 64)
    model = peft.get_peft_model(base(), EfftPeftConfig(r=2, target_modules=["attn.qkv", "mlp.0"], init_weights=False))
    with pytest.raises(
        RuntimeError, match=r"the update of 'features\.1\.0\.attn\.qkv' had no effect: ShiftedWindowAtt"
    ):
        model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base()(x))
    model = peft.get_peft_model(base(), EfftPeftConfig(r=2, target_modules=["mlp.0", "mlp.3"], init_weights=False))
    with torch.no_grad():
        live = model.eval()(x)
        assert (live - base()(x)).abs().max() > 1e-3
        torch.testing.assert_close(model.merge_and_unload()(x), live, rtol=1e-4, atol=1e-5)


def test_what_a_pass_leaves_out_is_no_error() -> None:
    """T5 only reads the dtype of one weight, and does not run its encoder in every pass. Neither may be an error."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=50, **sizes)).eval()
    model = peft.get_peft_model(t5, EfftPeftConfig(r=2, target_modules=["wo", "q"], init_weights=False)).eval()
    assert model.generate(input_ids=IDS, max_new_tokens=3).shape[0] == len(IDS)


class Held(nn.Module):
    """Call the modules in a plain list instead of the registered modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_modules_held_in_plain_lists() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Held(), Held()).double(), torch.randn(3, 6, dtype=torch.float64)
    expected, originals = copy.deepcopy(model), list(model[0].layers)
    tuned = peft.get_peft_model(model, EfftPeftConfig(rank=2, target_modules=r"\d\.[02]")).eval()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    for name in ("0.0", "0.2", "1.0", "1.2"):
        layer = tuned.base_model.model.get_submodule(name)
        expected.get_submodule(name).weight.data.add_(layer.get_delta_weight("default"))
    assert (tuned(x) - tuned.get_base_model()(x)).abs().max() == 0
    torch.testing.assert_close(tuned(x), expected(x))
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(x), expected(x))
    assert merged[0].layers == originals
