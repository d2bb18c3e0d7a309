"""Test the VTAB-1K suite from end to end, and the published results that its report quotes.

The suite runs with a tiny ViT and a few generated images in the layout of the 19 tasks.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from efft_lab.cli import main
from efft_lab.compare.report import quote_literature
from efft_lab.compare.scores import groups, weights
from efft_lab.compare.store import read
from efft_lab.data.vtab import INFOS, LISTS

Image = pytest.importorskip("PIL.Image", reason="reading images needs the vision extra")
SIZES = {"train": 6, "val": 3, "trainval": 9, "test": 5}


def read_published() -> Any:
    """Return the accuracies from the literature that the report quotes."""
    return json.loads((files("efft_lab.compare") / "published_vtab1k.json").read_text("utf-8"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Create <root>/<task>/{train800,val200,train800val200,test}.txt and the images in these lists."""
    root = tmp_path / "vtab-1k"
    for task, info in INFOS.items():
        rng = np.random.RandomState(0)
        for role, name in LISTS.items():
            split = name.removesuffix(".txt")
            folder = root / task / "images" / split
            folder.mkdir(parents=True)
            lines = []
            for number in range(SIZES[role]):
                pixels = rng.randint(0, 256, (12, 10, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:06d}.jpg")
                lines.append(f"images/{split}/{number:06d}.jpg {number % info.classes}\n")
            (root / task / name).write_text("".join(lines))
    return root


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write random weights of a tiny ViT to a file and return its path. A user passes weights of ViT-B/16 instead."""
    import timm

    torch.manual_seed(0)
    path = tmp_path / "vit_tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).state_dict(), path)
    return path


@pytest.mark.slow
def test_all_tasks(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / "vtab.jsonl"
    words = ["compare", "--suite", "vtab1k", "--data", str(data), "--model", "vit_tiny_patch16_224"]
    words += ["--checkpoint", str(checkpoint), "--batch-size", "4", "--jobs", "2", "--out", str(results)]
    words += ["--image-size", "32", "--epochs", "1"]
    assert main(words) == 0
    records = list(read(results).values())
    methods = ["EFFT2", "EFFT1", "linear probe", "raw pixels, linear", "raw pixels, k-NN"]
    assert {(r["task"], r["method"]) for r in records} == {(task, method) for task in INFOS for method in methods}
    assert len(records) == 19 * 5
    assert {r["stage"] for r in records} == {"final"}
    assert {r["group"] for r in records} == {"natural", "specialized", "structured"}
    assert all(round(r["test_accuracy"] * 5) == pytest.approx(r["test_accuracy"] * 5) for r in records)
    assert {r["test_images"] for r in records} == {5}
    (svhn,) = (r for r in records if (r["task"], r["method"]) == ("svhn", "EFFT2"))
    own = {name: svhn["config"]["efft"][name] for name in ("rank", "scale", "init")}
    assert own == {"rank": 32, "scale": 80, "init": "vu"}
    assert svhn["updates"] == 2  # 9 images in batches of 4
    assert svhn["trainable_parameters"] - svhn["head_parameters"] == 7 * 192 * 32 + 6 * 12 * 32**2

    assert main([*words, "--report"]) == 0
    page = results.with_suffix(".md").read_text()
    assert "95 of 95 final runs" in page
    assert "## Published results from other papers" in page
    assert "| EFFT2 | 0.25 M | 81.5 | 85.5 | 60.8 | EFFT repository (figures/Combined.png) |" in page
    heading = next(line for line in page.splitlines() if line.startswith("| method |"))
    assert all(f"{task} ({info.group})" in heading for task, info in INFOS.items())


def test_published_table_has_the_published_averages() -> None:
    """The means of the three groups' means must equal the printed ones, so the 19 numbers were copied correctly."""
    published = read_published()
    tasks = {name: info.group for name, info in INFOS.items()}
    share = weights(tasks, categorical=True)
    printed = {
        **{"Full": 68.9, "Linear": 57.6, "BitFit": 65.2, "VPT-Deep": 72.0, "Adapter": 73.9, "AdaptFormer": 74.75},
        **{"LoRA r=8": 74.6, "NOAH": 75.5, "FacT-TT r<=16": 75.3, "FacT-TK r<=32": 75.6, "SSF": 75.69},
        **{"RepAdapter": 76.1, "Convpass": 76.56},
    }
    assert [len(own) for own in groups(tasks).values()] == [7, 4, 8]
    found = {}
    for entry in published["methods"]:
        assert list(entry["accuracy"]) == list(INFOS)
        assert entry["sources"]
        if entry["table"] == "ViT-B/16":
            found[entry["method"]] = sum(share[task] * value for task, value in entry["accuracy"].items())
    assert {name: found[name] for name in printed} == pytest.approx(printed, abs=0.1)


def test_published_rows_agree_with_the_means_that_their_sources_state() -> None:
    """Compare the means of the rounded accuracies with the printed means.

    The sources compute their means from unrounded accuracies, so the last digit may differ.
    """
    tasks = {name: info.group for name, info in INFOS.items()}
    checked = []
    for entry in read_published()["methods"]:
        quoted = any(source.startswith(("HTA paper, ", "RLRR paper, ")) for source in entry["sources"])
        assert ("stated" in entry) == quoted, entry["method"]
        if quoted:
            accuracy = entry["accuracy"]
            found = {group: fmean(accuracy[task] for task in own) for group, own in groups(tasks).items()}
            found["overall"] = fmean(accuracy.values())
            assert found == pytest.approx(entry["stated"], abs=0.07), (entry["table"], entry["method"])
            checked.append((entry["table"], entry["method"]))
    assert Counter(table for table, _ in checked) == {"ViT-B/16": 6, "ViT-L/16": 11, "ViT-H/14": 7, "Swin-B": 7}
    assert len(set(checked)) == len(checked)


def test_published_overall_means_equal_those_in_the_main_tables_of_the_papers() -> None:
    """The overall means are in the main part of the papers (RLRR tables 4 and 5, HTA tables 3 and 4).

    The published table of this repository was copied from the appendices, which list the accuracy of each task.
    """
    printed = {
        **{
            ("ViT-L/16", "LoRA"): 72.0,
            ("ViT-L/16", "SSF"): 73.0,
            ("ViT-L/16", "RLRR"): 75.2,
            ("ViT-L/16", "HTA"): 75.4,
        },
        **{
            ("ViT-H/14", "LoRA"): 69.3,
            ("ViT-H/14", "ARC"): 69.6,
            ("ViT-H/14", "SSF"): 70.4,
            ("ViT-H/14", "RLRR"): 72.0,
        },
        **{("Swin-B", "Full"): 72.4, ("Swin-B", "ARC"): 72.6, ("Swin-B", "RLRR"): 73.0, ("Swin-B", "HTA"): 74.2},
    }
    found = {(e["table"], e["method"]): fmean(e["accuracy"].values()) for e in read_published()["methods"]}
    assert {key: found[key] for key in printed} == pytest.approx(printed, abs=0.07)


def test_published_study_with_one_trainer_has_the_means_of_its_result_files() -> None:
    """The study's files contain no means. The means here were computed from the files, without the published table."""
    computed = {
        "Convpass": 76.35,
        "FacT-TT": 75.94,
        "FacT-TK": 75.70,
        "LoRA": 75.24,
        "BitFit": 74.54,
        "LayerNorm": 73.52,
    }
    share = weights({name: info.group for name, info in INFOS.items()}, categorical=True)
    own = [entry for entry in read_published()["methods"] if "one trainer" in entry["table"]]
    found = {e["method"]: sum(share[task] * value for task, value in e["accuracy"].items()) for e in own}
    assert len(own) == len(found) == 16
    assert {name: found[name] for name in computed} == pytest.approx(computed, abs=0.006)


def test_report_shows_every_published_row_with_a_source_that_is_listed() -> None:
    published = read_published()
    page = "\n\n".join(quote_literature(list(INFOS)))
    lines = page.splitlines()
    assert [line[4:] for line in lines if line.startswith("### ")] == [*published["tables"], "EFFT", "Sources"]
    assert sum(line.startswith("| ") for line in lines) == (
        len(published["methods"]) + len(published["groups"]) + 2 * (len(published["tables"]) + 1)
    )
    assert {entry["table"] for entry in published["methods"]} == set(published["tables"])
    for paper in published["papers"]:
        assert any(source.startswith(f"{paper}, ") for e in published["methods"] for source in e["sources"])
        assert f"- {paper}: " in page
    assert "## Published results from other papers" in lines
    assert "| EFFT2 | 0.25 M | 81.5 | 85.5 | 60.8 | EFFT repository (figures/Combined.png) |" in lines
    (row,) = (line for line in lines if line.startswith("| HTA | 0.54 M |"))
    assert row.endswith("| 45.6 | 77.7 | 75.4 | HTA paper, table 4 of the appendix |")
