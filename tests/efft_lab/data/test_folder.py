"""Test data sets from folders of images: how they are divided, and errors for unusable folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import efft_lab.data

Write = Callable[[Path, int], Path]


@pytest.fixture
def classes_only(tmp_path: Path, write_image: Write) -> Path:
    """Return a folder with 60 + 30 distinct images that has only class folders."""
    for number in range(90):
        write_image(tmp_path / "pets" / ("dog" if number % 3 else "cat") / f"{number:03d}.png", number)
    return tmp_path / "pets"


@pytest.fixture
def divided(tmp_path: Path, write_image: Write) -> Path:
    for number in range(40):
        part = "train" if number < 30 else "test"
        write_image(tmp_path / "pets" / part / ("dog" if number % 2 else "cat") / "deep" / f"{number}.png", number)
    return tmp_path / "pets"


def contents(dataset: efft_lab.data.ImageDataset) -> set[bytes]:
    return {dataset.raw(index).tobytes() for index in range(len(dataset))}


def test_class_folders_alone_are_divided(classes_only: Path) -> None:
    task = efft_lab.data.load(classes_only, image_size=8)
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [58, 14, 72, 18]
    assert task.class_names == ("cat", "dog")
    assert (task.info.name, task.info.group, task.classes) == ("pets", None, 2)
    assert np.bincount(task.test.labels).tolist() == [6, 12]
    train, val, test = contents(task.train), contents(task.val), contents(task.test)
    assert len(train | val | test) == 90
    assert contents(task.trainval) == train | val


def test_only_the_validation_part_moves_with_the_seed(classes_only: Path) -> None:
    first, other = (efft_lab.data.load(str(classes_only), seed=seed) for seed in (0, 1))
    assert contents(first.test) == contents(other.test)
    assert contents(first.val) != contents(other.val)
    assert contents(first.val) == contents(efft_lab.data.load(classes_only, seed=0).val)


def test_planted_copies_stay_on_one_side(classes_only: Path, write_image: Write) -> None:
    for number in range(0, 90, 5):
        folder = "dog" if number % 3 else "cat"
        write_image(classes_only / folder / f"copy-of-{number}.png", number)
    for seed in range(4):
        task = efft_lab.data.load(classes_only, seed=seed)
        train, val, test = contents(task.train), contents(task.val), contents(task.test)
        assert not train & val
        assert not (train | val) & test
        assert len(task.trainval) + len(task.test) == 90 + 18


def test_given_division_is_kept(divided: Path) -> None:
    task = efft_lab.data.load(divided)
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
        task = efft_lab.data.load(divided, seed=seed)
        assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [26, 4, 30, 10]
        assert task.val.labels.tolist() == [0, 0, 1, 1]


def test_training_image_in_the_test_set_is_refused(divided: Path, write_image: Write) -> None:
    write_image(divided / "test/cat/leak.png", 4)
    with pytest.raises(ValueError, match=r"1 test images of .* e\.g\. .*leak\.png is a copy of .*4\.png"):
        efft_lab.data.load(divided)


def test_missing_test_folder_is_divided_from_train(divided: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (divided / "test").rename(divided / "val")
    first, other = (efft_lab.data.load(divided, seed=seed) for seed in (0, 1))
    assert [len(first.train), len(first.val), len(first.trainval), len(first.test)] == [24, 10, 34, 6]
    assert np.bincount(first.test.labels).tolist() == [3, 3]
    assert contents(first.test) == contents(other.test)
    assert len(contents(first.trainval) | contents(first.test)) == 40
    assert "has no test part: a fifth of the training images becomes the test set" in capsys.readouterr().err


def test_copies_of_validation_images_are_not_tested_on(divided: Path) -> None:
    (divided / "test").rename(divided / "val")
    for path in sorted((divided / "train").rglob("*.png")):  # all but two images of each class
        if path.stem not in ("0", "1", "2", "3"):
            (divided / "val" / path.parent.parent.name / path.name).write_bytes(path.read_bytes())
    task = efft_lab.data.load(divided)
    assert len(task.test) == 4
    assert not contents(task.test) & contents(task.val)


def test_missing_training_folder(divided: Path) -> None:
    (divided / "train").rename(divided / "val")
    with pytest.raises(ValueError, match="has val/, test/ but no train/: expected train/ and perhaps val/ and test/"):
        efft_lab.data.load(divided)


@pytest.mark.parametrize("names", [("Train", "valid", "TEST"), ("training", "Validation", "testing")])
def test_names_of_parts(names: tuple[str, str, str], divided: Path, write_image: Write) -> None:
    (divided / "train").rename(divided / "x").rename(divided / names[0])
    (divided / "test").rename(divided / "y").rename(divided / names[2])
    for number, name in enumerate(("cat", "dog")):
        write_image(divided / names[1] / name / "1.png", 100 + number)
    task = efft_lab.data.load(divided)
    assert [len(task.train), len(task.val), len(task.test)] == [30, 2, 10]


def test_two_folders_of_one_part(divided: Path, write_image: Write) -> None:
    write_image(divided / "Training/cat/1.png", 99)
    with pytest.raises(ValueError, match=r"has Training/, train/ for the part 'train': keep one of them"):
        efft_lab.data.load(divided)


def test_a_class_may_be_called_like_a_part(tmp_path: Path, write_image: Write) -> None:
    for number in range(20):
        write_image(tmp_path / ("training" if number % 2 else "match") / f"{number}.png", number)
    assert efft_lab.data.load(tmp_path).class_names == ("match", "training")


def test_hidden_files_and_folders_do_not_count(divided: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(efft_lab.data.load(divided).trainval)
    for hidden in ("train/.ipynb_checkpoints", "test/__MACOSX", "train/cat/.cache", "train/cat/deep/@eaDir", ".git"):
        (divided / hidden).mkdir()
        (divided / hidden / "1.png").write_bytes(b"no image")
    (divided / "train/cat/._0.png").write_bytes(b"no image")
    assert contents(efft_lab.data.load(divided).trainval) == before
    assert "ignored" not in capsys.readouterr().err
    (divided / "train/cat/Thumbs.db").write_bytes(b"")
    efft_lab.data.load(divided)
    assert "train: ignored files that are not images: .db (1)" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_named_at_the_start(divided: Path, write_image: Write) -> None:
    whole = (divided / "train/cat/deep/0.png").read_bytes()
    (divided / "train/cat/cut.png").write_bytes(whole[:-30])
    (divided / "test/dog/empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 42 images cannot be read: .*train/cat/cut\.png: .*test/dog/empty\.jpg"):
        efft_lab.data.load(divided)


def test_class_only_in_test(divided: Path, write_image: Write) -> None:
    write_image(divided / "test/bird/1.png", 99)
    with pytest.raises(ValueError, match="has class folders that train/ does not have: bird"):
        efft_lab.data.load(divided)


def test_class_without_images_says_what_is_there(classes_only: Path) -> None:
    (classes_only / "emu").mkdir()
    (classes_only / "emu/notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"no images in .*emu: expected \.bmp, .*; found \['\.txt'\]"):
        efft_lab.data.load(classes_only)


def test_no_class_folders_says_what_is_there(tmp_path: Path, write_image: Write) -> None:
    write_image(tmp_path / "flat/1.png", 1)
    with pytest.raises(ValueError, match=r"expected at least two class folders .* found the folders \[\] and 1 files"):
        efft_lab.data.load(tmp_path / "flat")


def test_class_too_small_to_divide(classes_only: Path, write_image: Write) -> None:
    write_image(classes_only / "emu/1.png", 200)
    with pytest.raises(ValueError, match=r"needs 3 images per class; too few: \['emu \(1\)'\]"):
        efft_lab.data.load(classes_only)


def test_smallest_classes_reach_every_role(tmp_path: Path, write_image: Write) -> None:
    for number in range(40):
        write_image(tmp_path / "many" / f"class{number % 12 if number < 36 else 0}" / f"{number}.png", number)
    task = efft_lab.data.load(tmp_path / "many")
    for dataset in (task.train, task.val, task.test):
        assert set(dataset.labels.tolist()) == set(range(12))
