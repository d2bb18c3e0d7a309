"""Test data sets from CSV files of images and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import efft_lab.data

Write = Callable[[Path, int], Path]


@pytest.fixture
def folder(tmp_path: Path, write_image: Write) -> Path:
    lines = ["file,age, height"]
    for number in range(30):
        write_image(tmp_path / "people/faces" / f"{number}.png", number)
        lines.append(f"faces/{number}.png,{number},{1.5 - number}")
    (tmp_path / "people/ages.csv").write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    return tmp_path / "people"


@pytest.mark.parametrize("name", ["", "ages.csv"])
def test_one_file_is_divided(name: str, folder: Path) -> None:
    task = efft_lab.data.load(folder / name, image_size=8, kind="regression")
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [19, 5, 24, 6]
    assert (task.info.kind, task.classes, task.class_names) == ("regression", 2, ("age", "height"))
    assert task.info.name == ("ages" if name else "people")
    seen = set()
    for role in ("train", "val", "test"):
        data = getattr(task, role)
        for index in range(len(data)):
            number = float(data.images.paths[data.indices[index]].stem)
            image, values = data[index]
            torch.testing.assert_close(values, torch.tensor([number, 1.5 - number]))
            assert image.shape == (3, 8, 8)
            seen.add(number)
    assert seen == set(range(30))


def test_files_of_parts(folder: Path) -> None:
    head, *rows = (folder / "ages.csv").read_text("utf-8-sig").split("\n")[:-2]
    (folder / "ages.csv").rename(folder / "notes.csv")
    for name, own in (("Train.CSV", rows[:20]), ("valid.csv", rows[20:25]), ("testing.csv", rows[25:])):
        (folder / name).write_text("\n".join([head, *own]))
    task = efft_lab.data.load(folder, kind="regression")
    assert [len(task.train), len(task.val), len(task.test)] == [20, 5, 5]
    (folder / "valid.csv").write_text(f"file,height,age\n{rows[20]}")
    with pytest.raises(ValueError, match=r"valid\.csv has the columns \['height', 'age'\], but .* \['age', 'height'\]"):
        efft_lab.data.load(folder, kind="regression")
    (folder / "valid.csv").unlink()
    (folder / "testing.csv").write_text("\n".join([head, rows[0]]))
    with pytest.raises(ValueError, match=r"1 test images of .* are also training images"):
        efft_lab.data.load(folder, kind="regression")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 lines and 0 columns: expected a line that names the columns"),
        ("file\nfaces/1.png", "has 2 lines and 1 columns"),
        ("file;age\nfaces/1.png;3", "has 2 lines and 1 columns: expected .* separated by commas"),
        ("faces/1.png,3\nfaces/2.png,4", "begins with .*: expected a line that names the columns, such as file,age"),
        ("file,age\nfaces/1.png,3\nfaces/2.png,old", "line 3: expected a file and 1 finite numbers, got"),
        ("file,age\nfaces/1.png,nan", "line 2: expected a file and 1 finite numbers"),
        ("file,age\nfaces/1.png,3,4", "line 2: expected a file and 1 finite numbers"),
        ("file,age\nfaces/1.png,3\nnowhere.png,4", r"1 of 2 images cannot be read: .*nowhere\.png"),
    ],
)
def test_mistakes(text: str, message: str, folder: Path) -> None:
    (folder / "ages.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        efft_lab.data.load(folder, kind="regression")


def test_which_file(folder: Path) -> None:
    (folder / "more.csv").write_text("")
    with pytest.raises(ValueError, match=r"expected train\.csv and perhaps .*; found ages\.csv, more\.csv"):
        efft_lab.data.load(folder, kind="regression")
