"""Test data sets of folders with images and masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import efft_lab.data

Write = Callable[[Path, int], Path]  # images of 5 x 6 pixels


def mask(path: Path, numbers: Any, mode: str = "L", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(numbers, np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image = image.convert("L")
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([7 * i % 256 for i in range(768)])
    image.save(path, **options)


def numbers(seed: int, classes: int = 3) -> Any:
    return np.random.RandomState(seed).randint(0, classes, (6, 5))


@pytest.fixture
def folder(tmp_path: Path, write_image: Write) -> Path:
    for number in range(30):
        write_image(tmp_path / "cells/images/deep" / f"{number:02d}.png", number)
        mask(tmp_path / "cells/masks/deep" / f"{number:02d}.png", numbers(number))
    return tmp_path / "cells"


def load(folder: Path, **options: Any) -> efft_lab.data.TaskData:
    return efft_lab.data.load(folder, kind="segmentation", **options)


def test_one_pair_of_folders_is_divided(folder: Path) -> None:
    task = load(folder, image_size=12)
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [19, 5, 24, 6]
    assert (task.info.kind, task.classes, task.class_names) == ("segmentation", 3, ("0", "1", "2"))
    image, target = task.test[0]
    assert (image.shape, target.shape) == ((3, 12, 12), (12, 12))


def test_masks_belong_to_their_images(folder: Path) -> None:
    task = load(folder, image_size=60)
    for role in ("train", "val", "test"):
        data = getattr(task, role)
        for index in range(len(data)):
            stem = int(data.images.paths[data.indices[index]].stem)
            expected = np.kron(numbers(stem), np.ones((10, 12), int))  # 60 pixels are a multiple of 6 and of 5
            np.testing.assert_array_equal(data[index][1].numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_modes_of_masks(mode: str, folder: Path) -> None:
    for number in range(30):
        mask(folder / "masks/deep" / f"{number:02d}.png", np.where(numbers(number) == 2, 255, numbers(number)), mode)
    task = load(folder, image_size=30)
    assert task.classes == 2  # 255 is not a class
    assert set(np.unique(np.stack([target for _, target in task.trainval]))) == {0, 1, 255}


def test_one_bit_masks_and_grey_ones_of_two_bits(folder: Path) -> None:
    for number in range(30):
        values = numbers(number) % 2
        Image.fromarray(values.astype(bool)).save(folder / "masks/deep" / f"{number:02d}.png")
    assert load(folder).classes == 2
    rows = bytes([0, 0b00_01_10_11, 0b00_00_00_00])  # a PNG of two bits: no filter, 0 1 2 3, 0 (and padding)
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 5, 6, 2, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows * 6)) + chunk(b"IEND", b"")
    (folder / "masks/deep/00.png").write_bytes(png)
    assert load(folder).classes == 4


def test_layouts(folder: Path, tmp_path: Path) -> None:
    for inner, outer in (("outside", True), ("inside", False)):
        root = tmp_path / inner
        for part, stems in (("Training", range(20)), ("validation", range(20, 24)), ("test", range(24, 30))):
            for kind, name in (("images", "Images"), ("masks", "annotations")):
                place = root / part / name if outer else root / name / part
                place.mkdir(parents=True)
                for stem in stems:
                    (place / f"{stem}.png").write_bytes((folder / kind / "deep" / f"{stem:02d}.png").read_bytes())
        task = load(root)
        assert [len(task.train), len(task.val), len(task.test)] == [20, 4, 6]


def test_names_of_classes(folder: Path) -> None:
    (folder / "classes.txt").write_text("water\nland\n\nice\nfire\n")
    assert load(folder).class_names == ("water", "land", "ice", "fire")
    (folder / "classes.txt").write_text("water\nland")
    with pytest.raises(ValueError, match=r"classes\.txt names 2 classes, but masks have class 2"):
        load(folder)


def test_orientation_counts_for_the_size(folder: Path) -> None:
    """An image that is stored on its side fits an upright mask."""
    exif = Image.Exif()
    exif[0x0112] = 6
    side = np.random.RandomState(99).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    Image.fromarray(side).save(folder / "images/deep/00.png", exif=exif)
    assert load(folder).classes == 3


def test_unusable_masks_are_named(folder: Path, write_image: Write) -> None:
    masks = folder / "masks/deep"
    mask(masks / "03.png", numbers(0)[:4])
    write_image(masks / "04.png", 1)
    (masks / "05.png").unlink()
    mask(masks / "05.jpg", numbers(0))
    (masks / "06.png").write_bytes(b"none")
    mask(masks / "07.png", numbers(0) + 300, "I;16")
    with pytest.raises(ValueError, match="5 of 30 masks cannot be used") as caught:
        load(folder)
    for message in (
        r"03.png: expected 5 x 6 pixels like its image, got 5 x 4",
        r"04.png: expected one channel of class numbers (8 or 16 bits, 1 bit, or a palette), got the mode RGB",
        r"05.jpg: JPEG changes the numbers at every edge; store masks as PNG",
        r"06.png: cannot identify image file",
        r"07.png: expected class numbers from 0 to 255, got 300 to 302",
    ):
        assert message in str(caught.value)


def test_black_and_white_masks_are_explained(folder: Path) -> None:
    for number in range(30):
        mask(folder / "masks/deep" / f"{number:02d}.png", 255 * (numbers(number) % 2))
    with pytest.raises(ValueError, match=r"found the numbers \[0, 255\] .* so masks of two classes have 0 and 1"):
        load(folder)


def test_partners(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask(folder / "masks/extra.png", numbers(0))
    load(folder)
    assert "ignored 1 masks without an image, e.g. extra.png" in capsys.readouterr().err
    (folder / "masks/deep/07.png").unlink()
    with pytest.raises(ValueError, match=r"expected a mask of the same name .* 1 of 30 have none, e\.g\. .*07\.png"):
        load(folder)


def test_other_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "masks").rename(folder / "other")
    with pytest.raises(ValueError, match=r"expected one folder masks/ in .*, found images/, other/"):
        load(folder)
    with pytest.raises(ValueError, match="'digits' is a task of classification, not of segmentation"):
        efft_lab.data.load("digits", kind="segmentation")
