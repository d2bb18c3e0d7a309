"""Test goals: classification, segmentation and regression, each with its loss, predictions and scores.

The scores are compared with scikit-learn. The segmentation model is compared with timm's own feature maps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from efft_lab.train import TrainConfig
from efft_lab.train.goals import Classification, Regression, Segmentation, last_layer, make_goal, score_text
from efft_lab.train.segmentation import Segmenter

timm = pytest.importorskip("timm", reason="needs the dev extra")
metrics = pytest.importorskip("sklearn.metrics", reason="needs the dev extra")


def summed(goal: Any, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the goal's statistics, summed over three batches of different sizes."""
    parts = zip(predictions.split([2, 1, len(labels) - 3]), labels.split([2, 1, len(labels) - 3]), strict=True)
    return torch.stack([goal.statistics(*part).double() for part in parts]).sum(0)


def test_classification_scores() -> None:
    outputs, labels = torch.randn(20, 4), torch.randint(4, (20,))
    goal = Classification()
    predictions = goal.predict(outputs)
    assert goal.scores(summed(goal, predictions, labels)) == {"accuracy": metrics.accuracy_score(labels, predictions)}
    torch.testing.assert_close(goal.loss(outputs, labels), functional.cross_entropy(outputs, labels))


def test_segmentation_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 5, 7, 8, generator=generator)
    labels = torch.randint(4, (6, 7, 8), generator=generator)  # class 4 does not occur, but is predicted
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    goal = Segmentation(5)
    predictions = goal.predict(outputs)
    sums = summed(goal, predictions, labels)
    known = labels != 255
    each = metrics.jaccard_score(labels[known], predictions[known], labels=range(5), average=None, zero_division=0)
    expected = {"miou": each.mean(), "pixel_accuracy": metrics.accuracy_score(labels[known], predictions[known])}
    assert goal.scores(sums) == pytest.approx(expected)
    assert goal.details(sums) == pytest.approx(each.tolist())
    by_pixel = outputs.log_softmax(1).permute(0, 2, 3, 1)[known].gather(1, labels[known][:, None])
    torch.testing.assert_close(goal.loss(outputs, labels), -by_pixel.mean())


def test_segmentation_of_what_does_not_count() -> None:
    goal, nothing = Segmentation(3), torch.full((4, 2, 2), 255)
    assert goal.loss(torch.randn(4, 3, 2, 2), nothing) == 0
    sums = goal.statistics(torch.zeros(4, 2, 2, dtype=torch.long), nothing)
    assert goal.scores(sums) == {"miou": 0.0, "pixel_accuracy": 0.0}
    one = goal.statistics(torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2, dtype=torch.long))
    assert goal.scores(one) == {"miou": 1.0, "pixel_accuracy": 1.0}  # for the only class that occurs
    assert np.isnan(goal.details(one)[1])


@pytest.mark.parametrize("norm", ["mse", "l1"])
def test_regression_scores(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([1000.0, -2.0]), torch.tensor([50.0, 0.5])
    outputs = torch.randn(20, 2, generator=generator)
    labels = mean + std * torch.randn(20, 2, generator=generator)
    goal = Regression(mean, std, norm)
    predictions = goal.predict(outputs)
    torch.testing.assert_close(predictions, mean + std * outputs)
    sums = summed(goal, predictions, labels)
    y, p = labels.double().numpy(), predictions.double().numpy()
    expected = {
        "r2": metrics.r2_score(y, p),
        "mae": metrics.mean_absolute_error(y, p),
        "rmse": np.mean(np.sqrt(metrics.mean_squared_error(y, p, multioutput="raw_values"))),
    }
    assert goal.scores(sums) == pytest.approx(expected, rel=1e-5)
    assert goal.details(sums) == pytest.approx(np.abs(y - p).mean(0).tolist(), rel=1e-5)
    error = outputs - (labels - mean) / std
    torch.testing.assert_close(goal.loss(outputs, labels), (error**2 if norm == "mse" else error.abs()).mean())


def test_regression_of_equal_values() -> None:
    goal = Regression(torch.tensor([3.0]), torch.ones(1), "mse")
    sums = goal.statistics(torch.tensor([[2.0], [4.0]]), torch.tensor([[3.1], [3.1]]))
    assert goal.scores(sums)["r2"] == 0


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_settling_gives_values_as_they_are(name: str) -> None:
    model = (
        timm.create_model(name, num_classes=2, depths=(1, 1, 1, 1))
        if "swin" in name
        else timm.create_model(name, num_classes=2)
    )
    images = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    goal = Regression(torch.tensor([100.0, -7.0]), torch.tensor([20.0, 0.1]), "mse")
    with torch.no_grad():
        expected = goal.predict(model.eval()(images))
        goal.finish(model)
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(goal.predict(model(images)), expected)  # the second time, nothing must be added


def test_heads_that_do_not_suit_regression() -> None:
    with pytest.raises(ValueError, match="regression of 3 values needs a head that ends in a linear layer with a bias"):
        last_layer(timm.create_model("test_vit", num_classes=2), 3)
    with pytest.raises(ValueError, match=r"this Sequential has no head"):
        last_layer(nn.Sequential(nn.Linear(3, 3)), 3)


class Valued:
    """Provide the part of a data set that the goal reads."""

    classes, class_names = 2, ("age", "height")

    def __init__(self, values: Any) -> None:
        self.images, self.indices, self.train = self, np.array([0, 2, 3]), self
        self.values = np.array(values)


def test_values_are_standardized_by_the_training_images() -> None:
    model = timm.create_model("test_vit", num_classes=2)
    config = TrainConfig(task="regression")
    goal: Any = make_goal(config, Valued([[1.0, 5.0], [99.0, 99.0], [2.0, 5.5], [3.0, 6.0]]), model)
    torch.testing.assert_close(goal.mean, torch.tensor([2.0, 5.5]))
    torch.testing.assert_close(goal.std, torch.tensor([(2 / 3) ** 0.5, (1 / 6) ** 0.5]))
    with pytest.raises(ValueError, match="height is the same in all training images"):
        make_goal(config, Valued([[1.0, 5.0], [99.0, 99.0], [2.0, 5.0], [3.0, 5.0]]), model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"img_size": 64}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1, "reg_tokens": 3}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1, "class_token": False, "global_pool": "avg"}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}),
        ("test_convnext", {}),
        ("test_resnet", {}),
    ],
)
def test_segmenter_reads_the_last_map(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, **options).eval()
    model, images = Segmenter(backbone, 3), torch.randn(2, 3, 64, 64)
    features = backbone.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
    kernel = model.head.weight[:, :, 0, 0]  # [classes, width]
    small = torch.einsum("bwij,cw->bcij", features[-1], kernel) + model.head.bias[:, None, None]
    logits = model(images)
    torch.testing.assert_close(logits, functional.interpolate(small, (64, 64), mode="bilinear"), rtol=1e-4, atol=1e-4)
    assert logits.shape == (2, 3, 64, 64)


def test_models_without_a_map() -> None:
    with pytest.raises(ValueError, match="segmentation needs a model of timm, with forward_features and num_features"):
        Segmenter(nn.Linear(3, 3), 2)

    class Strange(nn.Module):
        num_features = 8

        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 7, 8)

    with pytest.raises(ValueError, match=r"but the features of the Strange have the shape \[1, 7, 8\]"):
        Segmenter(Strange(), 2)(torch.zeros(1, 3, 4, 4))


def test_scores_in_words() -> None:
    assert score_text({"miou": 0.5, "pixel_accuracy": 0.75}) == "miou 50.00%, pixel_accuracy 75.00%"
    assert score_text({"r2": 0.98765, "mae": 1234.5678}) == "r2 0.9877, mae 1235"
