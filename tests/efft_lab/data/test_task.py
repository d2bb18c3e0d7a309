"""Test the data of one task: preprocessing, the four roles (train, val, trainval, test), and loading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from efft_lab.data.task import (
    NORMALIZATIONS,
    ArrayImages,
    FileImages,
    ImageDataset,
    Preprocess,
    Split,
    TaskData,
    TaskInfo,
)

INFO = TaskInfo("toy", None, 3, "here", "none")


def pixels(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def make_task(info: TaskInfo = INFO) -> TaskData:
    images = ArrayImages(pixels(6, 9, 7, 3), np.array([0, 1, 2, 0, 1, 2]))
    roles = {"train": [0, 1], "val": [2], "trainval": [0, 1, 2], "test": [5, 4, 3]}
    splits = {role: Split(images, np.array(indices)) for role, indices in roles.items()}
    return TaskData(info, splits, Preprocess(4, "none"))


@pytest.mark.parametrize(
    ("normalization", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        (((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
    ],
)
@pytest.mark.parametrize("shape", [(11, 17, 3), (40, 30, 3), (11, 17)])
def test_preprocessing_is_that_of_torchvision_to_the_bit(normalization, mean, std, shape) -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="needs torchvision to compare with")
    image = Image.fromarray(pixels(*shape)).convert("RGB")
    oracle = transforms.Compose(
        [
            transforms.Resize((24, 24), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    torch.testing.assert_close(Preprocess(24, normalization)(image), oracle(image), rtol=0, atol=0)


def test_normalisations_of_a_flat_image() -> None:
    image = Image.fromarray(np.full((3, 3, 3), 255, np.uint8))
    flat = {name: Preprocess(2, name)(image)[:, 0, 0].tolist() for name in NORMALIZATIONS}
    assert flat["none"] == [1, 1, 1]
    assert flat["half"] == [1, 1, 1]
    assert flat["imagenet"] == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])


def test_unknown_normalisation_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown normalization 'imgnet'; give 'imagenet', 'half', 'none' or"):
        Preprocess(8, "imgnet")


@pytest.mark.parametrize("bad", [((0.5,), (0.5,)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.0))])
def test_normalisation_needs_three_numbers(bad) -> None:
    with pytest.raises(ValueError, match=r"\(mean, std\) of three numbers each, std > 0; got"):
        Preprocess(8, bad)


def test_image_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, got 0"):
        Preprocess(0, "none")


def test_grey_images_get_three_equal_channels() -> None:
    data = ImageDataset(Split(ArrayImages(pixels(2, 8, 8), np.array([1, 0])), np.array([1])), Preprocess(8, "none"))
    tensor, label = data[0]
    assert tensor.dtype == torch.float32
    assert (tensor * 255).round().byte().tolist() == [pixels(2, 8, 8)[1].tolist()] * 3
    assert (label, type(label)) == (0, int)


def test_roles_index_and_raw_images() -> None:
    task = make_task()
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [2, 1, 3, 3]
    assert [label for _, label in task.test] == [2, 1, 0]
    assert task.test.labels.tolist() == [2, 1, 0]
    assert np.array_equal(np.asarray(task.raw("test", 1)), pixels(6, 9, 7, 3)[4])
    assert task.test[0][0].shape == (3, 4, 4)


def test_end_of_a_data_set_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        make_task().test[3]


def test_unknown_role() -> None:
    with pytest.raises(ValueError, match="unknown role 'dev'; the roles are train, val, trainval, test"):
        make_task().raw("dev", 0)


def test_class_names_fall_back_to_numbers() -> None:
    assert make_task().class_names == ("0", "1", "2")
    assert make_task(TaskInfo("toy", None, 2, "", "", ("cat", "dog"))).class_names == ("cat", "dog")
    assert repr(make_task()) == "TaskData('toy', classes=3, train=2, val=1, trainval=3, test=3)"


def test_damaged_image_file_is_named(tmp_path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(OSError, match=r"cannot read the image .*broken\.jpg"):
        FileImages([path], [0]).image(0)


def test_workers_and_batches() -> None:
    loader = torch.utils.data.DataLoader(make_task().test, batch_size=3, num_workers=1)
    (images, labels), *rest = list(loader)
    assert not rest
    assert images.shape == (3, 3, 4, 4)
    assert labels.tolist() == [2, 1, 0]
