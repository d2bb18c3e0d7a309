"""Test that the command ``compare`` reports planted slowdowns between two result files and ignores noise."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare


def line(median: float, spread: float = 0.01, **other: Any) -> dict[str, Any]:
    ratio = {"p20": median * (1 - spread), "p50": median, "p80": median * (1 + spread)}
    about = {"suite": "ops", "machine": "this one", "case": "qkv", "model": "vit_b", "row": "efft:eager"}
    return {**about, "date": "today", "ratio": {"fwd_bwd": ratio}, "reason": None, **other}


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return str(path)


def found(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [str(change) for change in compare.compare([before], [after])]


def test_a_planted_slow_down_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", line(1.2), line(1.2, case="o"))
    after = write(tmp_path / "b", line(1.4, date="tomorrow", commit="another"), line(1.21, case="o"))
    assert compare.main([before, after]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "2 lines compared: 1 slower or lost, 0 faster",
        "slower  ops vit_b qkv efft:eager fwd_bwd: +16.7%",
    ]


def test_a_measurement_that_the_second_file_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", line(1.2), line(1.2, case="o"))
    assert compare.main([before, write(tmp_path / "b", line(1.2), line(1.2, case="fc1"))]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["only in the first file: ops vit_b o efft:eager"]


def test_what_got_faster_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([write(tmp_path / "a", line(1.4)), write(tmp_path / "b", line(1.2))]) == 0
    assert "faster  ops vit_b qkv efft:eager fwd_bwd: -14.3%" in capsys.readouterr().out


def test_overlapping_ranges_and_small_changes_are_noise() -> None:
    assert found(line(1.2, spread=0.1), line(1.4, spread=0.1)) == []
    assert found(line(1.2, spread=0.001), line(1.24, spread=0.001)) == []


def test_a_row_that_lost_its_figures_counts_as_slower(tmp_path: Path) -> None:
    refused = {key: value for key, value in line(1.2, reason="dG is wrong").items() if key != "ratio"}
    assert found(line(1.2), refused) == ["lost    ops vit_b qkv efft:eager: dG is wrong"]
    assert compare.main([write(tmp_path / "a", line(1.2)), write(tmp_path / "b", refused)]) == 1


def test_seconds_count_where_there_is_no_ratio_and_for_the_floor() -> None:
    def timed(median: float, **other: Any) -> dict[str, Any]:
        made = line(median, **other)
        return {**made, "seconds": made.pop("ratio")}

    assert found(timed(1.0), timed(2.0)) == ["slower  ops vit_b qkv efft:eager fwd_bwd: +100.0%"]
    floors = [{**line(1.0, row="floor"), "seconds": timed(seconds)["seconds"]} for seconds in (1.0, 2.0)]
    assert found(*floors) == ["slower  ops vit_b qkv floor fwd_bwd: +100.0%"]


def test_a_measurement_without_phases() -> None:
    flat = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    assert found(line(1, ratio=flat), line(1, ratio=dict.fromkeys(flat, 2.0))) == [
        "slower  ops vit_b qkv efft:eager: +100.0%"
    ]


def test_the_last_of_several_lines_counts() -> None:
    assert compare.compare([line(9.0), line(1.2)], [line(9.0), line(1.2)]) == []


def test_other_machines_and_missing_files_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", line(1.2))
    compare.main([before, write(tmp_path / "b", line(1.2, machine="that one"))])
    assert "different machines: that one; this one" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'HEAD' is not a file; to compare git revisions add --revisions"):
        compare.main([before, "HEAD"])


PRETENDED = """
import json, pathlib, sys
from library import RATIO
folder = pathlib.Path(sys.argv[sys.argv.index("--results") + 1])
folder.mkdir()
ratio = {"p20": RATIO, "p50": RATIO, "p80": RATIO}
line = {"suite": sys.argv[1], "row": "efft:eager", "machine": "", "ratio": {sys.argv[2]: ratio}}
(folder / "ops.jsonl").write_text(json.dumps(line) + "\\n")
"""


def test_two_revisions_are_measured_with_this_checkouts_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compare two revisions that differ only in the library. Neither revision contains the benchmarks."""
    root = tmp_path / "checkout"
    (root / "python").mkdir(parents=True)

    def git(*words: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True)

    git("init", "--initial-branch=main")
    for ratio in (1.0, 2.0):
        (root / "library.py").write_text(f"RATIO = {ratio}\n")
        git("add", ".")
        git("commit", "-m", f"{ratio}")
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "__main__.py").write_text(PRETENDED)
    monkeypatch.setattr(compare, "ROOT", root)

    assert compare.main(["--revisions", "main~1", "main", "--", "fwd"]) == 1
    assert "slower  ops efft:eager fwd: +100.0%" in capsys.readouterr().out
    listed = subprocess.run(["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1, "the worktrees are removed afterwards"
    with pytest.raises(ValueError, match=r"revision 'nowhere': .*invalid reference"):
        compare.main(["--revisions", "nowhere", "main"])
