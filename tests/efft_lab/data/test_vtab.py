"""Test the 19 tasks of VTAB-1K: the published file layout, errors, and the published hyperparameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import efft_lab.data
from efft_lab.data.vtab import INFOS, LISTS, vtab_hyperparameters

Write = Callable[[Path, int], Path]


@pytest.fixture
def root(tmp_path: Path, write_image: Write) -> Path:
    """Write the task kitti (4 classes) in the published layout, and return the folder that contains it.

    The parts have 8, 4, 12 and 6 images.
    """
    folder = tmp_path / "vtab-1k" / "kitti"
    for split, count in (("train800", 8), ("val200", 4), ("train800val200", 12), ("test", 6)):
        lines = []
        for number in range(count):
            name = f"images/{split}/{number:06d}.jpg"
            write_image(folder / name, number)
            lines.append(f"{name} {number % 4}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder.parent


def test_published_layout(root: Path) -> None:
    task = efft_lab.data.load("kitti", root=root, image_size=8, seed=7)
    assert [len(task.train), len(task.val), len(task.trainval), len(task.test)] == [8, 4, 12, 6]
    assert task.test.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert task.test[5][0].shape == (3, 8, 8)
    assert task.raw("test", 5).size == (5, 6)
    assert task.info.group == "structured"


def test_limited_test_set(root: Path) -> None:
    task = efft_lab.data.load("kitti", root=root, max_test=4)
    assert task.test.labels.tolist() == [0, 1, 2, 3] or sorted(task.test.labels) == [0, 1, 2, 3]
    assert task.test.labels.tolist() == efft_lab.data.load("kitti", root=root, max_test=4, seed=1).test.labels.tolist()


def test_missing_root_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: pass root=.*, the folder that holds kitti/"):
        efft_lab.data.load("kitti", root=tmp_path / "nowhere")


def test_missing_task_lists_near_folders(root: Path) -> None:
    (root / "kitti").rename(root / "Kitti_dist")
    with pytest.raises(FileNotFoundError, match=r"no folder kitti/ in .*; rename Kitti_dist\?"):
        efft_lab.data.load("kitti", root=root)
    with pytest.raises(FileNotFoundError, match=r"no folder svhn/ in .*; it holds: Kitti_dist\."):
        efft_lab.data.load("svhn", root=root)


def test_missing_lists_are_all_named(root: Path) -> None:
    (root / "kitti/test.txt").unlink()
    (root / "kitti/val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"kitti lacks val200\.txt, test\.txt"):
        efft_lab.data.load("kitti", root=root)


def test_missing_images_are_counted_and_named(root: Path) -> None:
    (root / "kitti/images/test/000002.jpg").unlink()
    (root / "kitti/images/test/000004.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.txt lists 2 images that do not exist: .*000002\.jpg, .*000004"):
        efft_lab.data.load("kitti", root=root)


@pytest.mark.parametrize("line", ["images/test/000001.jpg", "images/test/000001.jpg one", "3", "a.jpg -1"])
def test_bad_line_is_named_by_number(root: Path, line: str) -> None:
    file = root / "kitti/test.txt"
    file.write_text("\n".join([*file.read_text().splitlines()[:2], line]))
    with pytest.raises(ValueError, match=rf"test\.txt, line 3: expected 'images/.* 3', got '{line}'"):
        efft_lab.data.load("kitti", root=root)


def test_label_out_of_range(root: Path) -> None:
    file = root / "kitti/train800.txt"
    file.write_text(file.read_text().replace("000005.jpg 1", "000005.jpg 4"))
    with pytest.raises(ValueError, match=r"train800\.txt, line 6: label 4 is out of range 0\.\.3"):
        efft_lab.data.load("kitti", root=root)


def test_empty_list(root: Path) -> None:
    (root / "kitti/test.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"test\.txt lists no images"):
        efft_lab.data.load("kitti", root=root)


def test_nineteen_tasks_with_the_published_numbers_of_classes() -> None:
    # The order and the numbers come from the table at the top of vtab.py in the EFFT repository.
    published = (
        "cifar 100, caltech101 102, dtd 47, oxford_flowers102 102, oxford_iiit_pet 37, svhn 10, sun397 397, "
        "patch_camelyon 2, eurosat 10, resisc45 45, diabetic_retinopathy 5, clevr_count 8, clevr_dist 6, dmlab 6, "
        "kitti 4, dsprites_loc 16, dsprites_ori 16, smallnorb_azi 18, smallnorb_ele 9"
    )
    assert ", ".join(f"{name} {info.classes}" for name, info in INFOS.items()) == published
    groups = [info.group for info in INFOS.values()]
    assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8
    assert sorted(LISTS.values()) == ["test.txt", "train800.txt", "train800val200.txt", "val200.txt"]


def test_published_hyperparameters() -> None:
    assert vtab_hyperparameters("svhn") == {"rank": 32, "scale": 80, "init": "vu"}
    assert vtab_hyperparameters("svhn", "efft1") == {"rank": 32, "scale": 50, "init": "u"}
    both = {variant: [vtab_hyperparameters(task, variant) for task in INFOS] for variant in ("efft1", "efft2")}
    # The lists count how many of the 19 tasks have rank 8, 16 and 32, and how many have each initialization.
    ranks = {variant: [sum(s["rank"] == rank for s in rows) for rank in (8, 16, 32)] for variant, rows in both.items()}
    assert ranks == {"efft1": [4, 5, 10], "efft2": [2, 9, 8]}
    assert [sum(s["init"] == letter for s in both["efft1"]) for letter in ("v", "u")] == [10, 9]
    assert [sum(s["init"] == letters for s in both["efft2"]) for letters in ("vv", "vu")] == [12, 7]
    assert json.loads(json.dumps(both)) == both


def test_hyperparameters_are_copies() -> None:
    vtab_hyperparameters("svhn")["rank"] = 1
    assert vtab_hyperparameters("svhn")["rank"] == 32


def test_unknown_task_or_variant_of_hyperparameters() -> None:
    with pytest.raises(ValueError, match=r"no published settings for 'clevr_counts': .*did you mean 'clevr_count"):
        vtab_hyperparameters("clevr_counts")
    with pytest.raises(ValueError, match="unknown variant 'efft3'; settings are published for efft1 and efft2"):
        vtab_hyperparameters("svhn", "efft3")
