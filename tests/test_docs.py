"""Test the documentation: its code runs, the files and errors that it names exist, and the site builds.

The tables and figures on some pages must equal those that the code computes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.readme import render

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
#: The pages for readers, including those outside the site.
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ENVIRONMENT.md", "SECURITY.md"))]
TEXTS += [ROOT / "csrc/README.md", ROOT / "benchmarks/README.md"]
#: A path in backticks. ``<op>`` and ``x`` are placeholders, as in "an op ``x`` consists of these files".
PATH = re.compile(r"`((?:efft_kernels|python|csrc|tests|benchmarks|docs)/[^`\s]*)`")
PLACEHOLDER = re.compile(r"<\w+>|(?:/|_)x\.\w+$")
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
BLOCKS = [
    pytest.param(page, block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


def skip_without_what_it_imports(code: str) -> None:
    """Skip the test if ``code`` imports a package that is not installed; CI installs all of them."""
    for line in re.findall(r"^import (.+)$|^from (\w+)", code, re.MULTILINE):
        for name in "".join(line).split(", "):
            if importlib.util.find_spec(name.split()[0]) is None:
                pytest.skip(f"needs {name}: pip install 'efft-kernels[dev]'")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_block_runs(page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_what_it_imports(block)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, page.name, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    skip_without_what_it_imports(example.read_text(encoding="utf-8"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"docs/examples/{example.name}" in (ROOT / "docs/recipes.md").read_text(encoding="utf-8"), "not shown"


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_in_the_documentation_exist(page: Path) -> None:
    named = [path for path in PATH.findall(page.read_text(encoding="utf-8")) if not PLACEHOLDER.search(path)]
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_says_what_it_is_for(page: Path) -> None:
    """Each page has a sentence about its purpose directly after the title, or includes a file that has one."""
    text = page.read_text(encoding="utf-8")
    if text.startswith("--8<--"):
        text = (ROOT / text.split('"')[1]).read_text(encoding="utf-8")
    first = text.split("\n\n")[1]
    assert re.match(r"(This page|Each section of this page) [^|#]+\.", first), f"it begins with {first[:80]!r}"


def test_errors_of_the_troubleshooting_page_exist() -> None:
    """The sources must contain every error text of the page. The test first joins adjacent string literals."""
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("efft_kernels", "python/efft")
        for path in sorted((ROOT / folder).rglob("*.py"))
    )
    joined = re.sub(r'"\s+f?"', "", sources)
    texts = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(texts) > 10
    for text in texts:
        for part in filter(None, (part.strip() for part in text.split("…"))):
            assert part in joined, part


def test_figures_of_the_scaling_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The counts on the page are those of the library, and the page's formula yields the page's modeled shares."""
    import timm

    import efft
    from efft.params import count_plan
    from efft.planning.plan import make_plan

    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    for name in re.findall(r"^\| `(vit_\w+)`", page, re.MULTILINE):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=100)
        count = count_plan(model, make_plan(model, efft.paper_config(name)))
        ours, full = count.factors + count.head, count.backbone + count.head
        row = f"| `{name}` | {count.factors:,} | {count.head:,} | {4e-6 * ours:.2f} MB | {4e-6 * full:.1f} MB | "
        assert f"{row}{full / ours:.0f} |" in page
    exec(compile(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], "scaling.md", "exec"), {})
    for line in capsys.readouterr().out.splitlines():
        assert "| {} | {} | {} |".format(line.split()[0], *re.findall(r"[\d.]+%", line)) in page


def test_tables_of_the_experiments_page_are_those_of_the_result_files() -> None:
    page = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    assert render(page) == page, "run: python -m benchmarks tables"


@pytest.mark.slow
def test_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site/api/ops/index.html").read_text(encoding="utf-8")
    assert "Compute a linear layer plus a low-rank update" in api, "the page must contain the docstrings"
    performance = (tmp_path / "site/performance/index.html").read_text(encoding="utf-8")
    assert "frozen baseline" in performance, "the page must contain its tables"
    pages = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html"))
    assert "--8&lt;--" not in pages
    assert "fonts.googleapis.com" not in pages
