"""Test that the README's Python blocks, tables, links and make targets are correct.

One test runs the ``efft`` commands of docs/command-line.md.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.readme import render

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(program: str, page: str = README) -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("console", page) for line in block.splitlines()]
    return [line for line in lines if line.split()[:1] == [program]]


def test_it_fits_a_screen_or_two() -> None:
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[1].split()[-1])
def test_python_block_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm

    create = timm.create_model

    def without_download(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    (printed,) = blocks("text")
    assert capsys.readouterr().out == printed, "the README shows another output"
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    head = sum(p.numel() for p in names["model"].head.parameters())  # type: ignore[attr-defined]
    assert round((size - 4 * head) / 1e6, 1) == 0.6, "the README says 0.6 MB without the head"


@pytest.mark.slow
def test_efft_commands_run_in_order(tmp_path: Path) -> None:
    shown = [line for line in commands("efft", COMMANDS) if line.split()[1] != "compare"]  # comparisons take long
    assert {line.split()[1] for line in shown} == {"data", "inspect", "train", "eval", "merge", "export", "env"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": path, "EFFT_HOME": str(tmp_path / "cache")}
    for line in shown:
        arguments = shlex.split(line)[1:]
        run = subprocess.run(
            [sys.executable, "-m", "efft_lab", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{line}\n{run.stdout}\n{run.stderr}"
    assert (tmp_path / "runs/digits/result.json").is_file()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands("make"):
        assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line


def test_tables_are_those_of_the_result_files() -> None:
    assert render(README) == README, "run: python -m benchmarks tables"


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
