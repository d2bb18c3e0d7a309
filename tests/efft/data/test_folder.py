from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import efft.data

Write = Callable[[Path, int], Path]


@pytest.fixture
def classes_only(tmp_path: Path, write_image: Write) -> Path:
    """60 + 30 distinct images, in class folders alone."""
    for number in range(90):
        write_image(tmp_path / "pets" / ("dog" if number % 3 else "cat") / f"{number:03d}.png", number)
    return tmp_path / "pets"


@pytest.fixture
def divided(tmp_path: Path, write_image: Write) -> Path:
    for number in range(40):
        part = "train" if number < 30 else "test"
        write_image(tmp_path / "pets" / part / ("dog" if number % 2 else "cat") / "deep" / f"{number}.png", number)
    return tmp_path / "pets"


def contents(dataset: efft.data.ImageDataset) -> set[bytes]:
    return {dataset.raw(index).tobytes() for index in range(len(dataset))}


def test_class_folders_alone_are_divided(classes_only: Path) -> None:
    task = efft.data.load(classes_only, image_size=8)
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [58, 14, 72, 18]
    assert task.class_names == ("cat", "dog")
    assert (task.info.name, task.info.group, task.classes) == ("pets", None, 2)
    assert np.bincount(task.test.labels).tolist() == [6, 12]
    train, val, test = contents(task.train), contents(task.val), contents(task.test)
    assert len(train | val | test) == 90
    assert contents(task.trainval) == train | val


def test_only_the_validation_part_moves_with_the_seed(classes_only: Path) -> None:
    first, other = (efft.data.load(str(classes_only), seed=seed) for seed in (0, 1))
    assert contents(first.test) == contents(other.test)
    assert contents(first.val) != contents(other.val)
    assert contents(first.val) == contents(efft.data.load(classes_only, seed=0).val)


def test_planted_copies_stay_on_one_side(classes_only: Path, write_image: Write) -> None:
    for number in range(0, 90, 5):
        folder = "dog" if number % 3 else "cat"
        write_image(classes_only / folder / f"copy-of-{number}.png", number)
    for seed in range(4):
        task = efft.data.load(classes_only, seed=seed)
        train, val, test = contents(task.train), contents(task.val), contents(task.test)
        assert not train & val
        assert not (train | val) & test
        assert len(task.trainval) + len(task.test) == 90 + 18


def test_given_division_is_kept(divided: Path) -> None:
    task = efft.data.load(divided)
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [24, 6, 30, 10]
    assert contents(task.trainval) == contents(task.train) | contents(task.val)


def test_given_validation_folder_is_kept(divided: Path) -> None:
    (divided / "val").mkdir()
    for name in ("cat", "dog"):
        (divided / "val" / name).mkdir()
        source = sorted((divided / "train" / name / "deep").iterdir())[:2]
        for path in source:
            path.rename(divided / "val" / name / path.name)
    for seed in (0, 1):
        task = efft.data.load(divided, seed=seed)
        assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [26, 4, 30, 10]
        assert task.val.labels.tolist() == [0, 0, 1, 1]


def test_training_image_in_the_test_set_is_refused(divided: Path, write_image: Write) -> None:
    write_image(divided / "test/cat/leak.png", 4)
    with pytest.raises(ValueError, match=r"1 test images of .* e\.g\. .*leak\.png is a copy of .*4\.png"):
        efft.data.load(divided)


def test_missing_part(divided: Path) -> None:
    (divided / "test").rename(divided / "val")
    with pytest.raises(ValueError, match="has train/, val/ but no test/: expected train/, test/ and perhaps val/"):
        efft.data.load(divided)


def test_class_only_in_test(divided: Path, write_image: Write) -> None:
    write_image(divided / "test/bird/1.png", 99)
    with pytest.raises(ValueError, match="has class folders that train/ has not: bird"):
        efft.data.load(divided)


def test_class_without_images_says_what_is_there(classes_only: Path) -> None:
    (classes_only / "emu").mkdir()
    (classes_only / "emu/notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"no images in .*emu: expected \.bmp, .*; found \['\.txt'\]"):
        efft.data.load(classes_only)


def test_no_class_folders_says_what_is_there(tmp_path: Path, write_image: Write) -> None:
    write_image(tmp_path / "flat/1.png", 1)
    with pytest.raises(ValueError, match=r"expected at least two class folders .* found the folders \[\] and 1 files"):
        efft.data.load(tmp_path / "flat")


def test_class_too_small_to_divide(classes_only: Path, write_image: Write) -> None:
    write_image(classes_only / "emu/1.png", 200)
    with pytest.raises(ValueError, match=r"needs 3 images per class; too few: \['emu \(1\)'\]"):
        efft.data.load(classes_only)


def test_smallest_classes_reach_every_role(tmp_path: Path, write_image: Write) -> None:
    for number in range(40):
        write_image(tmp_path / "many" / f"class{number % 12 if number < 36 else 0}" / f"{number}.png", number)
    task = efft.data.load(tmp_path / "many")
    for dataset in (task.train, task.val, task.test):
        assert set(dataset.labels.tolist()) == set(range(12))
