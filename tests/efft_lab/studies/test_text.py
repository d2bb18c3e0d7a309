"""Test the text study, which trains models to recognize the package from which a docstring comes.

The tests cover the task on artificial packages, the model on padded tokens, LoRA, the bag of words, and the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import study_tables, tables
from efft_lab import record
from efft_lab.studies import side_by_side, text

transformers = pytest.importorskip("transformers", reason="needs the hf extra")


@pytest.fixture
def model() -> text.Classifier:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
    return text.Classifier(encoder, 3).eval()


def test_docstrings_are_first_paragraphs_without_the_name(tmp_path: Path) -> None:
    source = '''
"""The module's own is no class's and no function's docstring."""
class A:
    """Draws with MatPlotLib (mpl) as\\n    always and ever.

    More.
    """
    def short(self):
        """Too short."""
async def c():
    "Async functions are left out of this."
'''
    for name in ("a.py", "tests/a.py", "test_a.py", "sub/b.py"):
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.replace("always", "never" if "sub" in name else "always"))
    files = text.sources(tmp_path / "package")
    assert [path.name for path in files] == ["a.py", "b.py"]
    found = [text.docstrings(path, text.PACKAGES["matplotlib"]) for path in files]
    assert found == [[f"Draws with [MASK] ([MASK]) as {word} and ever."] for word in ("always", "never")]


def test_splits_share_no_file_and_no_text(tmp_path: Path) -> None:
    def file(name: str, number: int) -> Path:
        texts = [f"{name} {number} is the file, {i} the number" for i in range(7)] + ["In all files is the same"]
        path = tmp_path / f"{name}{number}.py"
        path.write_text("\n".join(f"def f{i}():\n    {text!r}" for i, text in enumerate(texts)))
        return path

    files = {name: [file(word, number) for number in range(80)] for name, word in (("scipy", "one"), ("torch", "two"))}
    drawn = text.splits(files, 0)
    assert {split: len(pairs) for split, pairs in drawn.items()} == {s: 2 * n for s, n in text.SIZES.items()}
    texts = [pair[0] for pairs in drawn.values() for pair in pairs]
    assert len(set(texts)) == len(texts)
    of_split = {split: {t.partition(" is ")[0] for t, _ in pairs} - {"In all files"} for split, pairs in drawn.items()}
    assert sum(map(len, of_split.values())) == len(set.union(*of_split.values()))
    assert all(t.startswith(("one", "two")[label]) for t, label in drawn["test"] if not t.startswith("In all"))
    assert text.splits(files, 0) == drawn != text.splits(files, 1)
    with pytest.raises(ValueError, match="torch has too few docstrings: train needs 100, but only 10 are left"):
        text.splits({"torch": files["torch"][:2]}, 0)


def test_padding_does_not_count(model: text.Classifier) -> None:
    tokens = torch.randint(1, 50, (2, 7))
    padded = nn.functional.pad(tokens, (0, 5))
    torch.testing.assert_close(model(padded), model(tokens))
    torch.testing.assert_close(model(tokens), model.head(model.encoder(tokens).last_hidden_state.mean(1)))


def test_lora_of_peft_on_the_layers_of_efft(model: text.Classifier) -> None:
    side_by_side.lora(model, text.LAYERS)
    adapted = [n for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n]
    assert len(adapted) == 2 * 6
    others = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert others == {"head.weight", "head.bias"}


def test_words_that_tell_the_package(model: text.Classifier) -> None:
    pairs = [(f"word{label} and {i}", label) for label in range(3) for i in range(20)]
    assert text.bag_of_words({"train": pairs, "val": pairs, "test": pairs}) == 1.0


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    facts = {"machine": "Test CPU", "versions": {"torch": "2.10"}, "commit": "abc1234", "command": "x"}
    path.write_text("".join(json.dumps({**facts, "date": "2026-01-02", **line}) + "\n" for line in lines))


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert study_tables.study("text") == tables.NOTHING
    common = {"task": "docstrings", "row": "EFFT2", "parameters": 12345}
    words = {"task": "docstrings", "row": "bag of words", "seed": 0, "test_accuracy": 0.61}
    runs = [(0, 0.1), (0, 0.8), (1, 0.9)]  # the second run repeats the first one
    write(tmp_path / "text.jsonl", [*({**common, "seed": s, "test_accuracy": a} for s, a in runs), words])
    shown = study_tables.study("text").splitlines()
    assert shown[2:4] == ["| EFFT2 | 12,345 | 85.0 ± 7.1 | 2 |", "| bag of words | - | 61.0 | 1 |"]
    assert shown[-1] == "- docstrings: `x`, commit abc1234, Test CPU; torch 2.10; 2026-01-02"


def test_rows_are_kept_as_they_come_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"row": "EFFT2", "seed": seed, "test_accuracy": accuracy} for seed, accuracy in enumerate((0.5, 0.7))]
    side_by_side.record("some", iter(rows), tmp_path)
    assert [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()] == rows
    assert capsys.readouterr().out.splitlines()[-1].split() == ["EFFT2", "mean", "of", "2:", "60.0%"]
