"""Format the tables of ``efft inspect``."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from efft.methods import EfftConfig, config_from_dict
from efft.params import count_plan
from efft.planning.plan import make_plan
from efft.saving import io
from efft.saving.files import CONFIG
from efft_lab import backbones


def model_table(name: str, classes: int, image_size: int | None, config: EfftConfig) -> str:
    """Return a text with the plan of ``efft.apply`` for a model and the number of trained parameters by group.

    The model is built without memory for its weights.
    """
    with torch.device("meta"):
        model = backbones.create(name, classes, image_size=image_size, pretrained=False)
    plan = make_plan(model, config, share_tied=True)
    title = f"{name}, {config.variant}, cores {config.core_sharing}, {classes} classes"
    return "\n".join([title, str(plan), "", str(count_plan(model, plan))])


def adapter_table(folder: Path) -> str:
    """Return a text about a saved adapter: its settings, the facts that it records, and a table of its tensors.

    Facts are, for example, the name of the base model and the test scores. Only the files of the adapter are read.
    ``folder`` is the folder of the adapter or of its run.
    """
    folder = folder if (folder / CONFIG).is_file() else folder / "adapter"
    description, tensors = io.read_adapter(folder)
    base = description["base"]
    summary = " ".join(config_from_dict(description["config"]).summary().split())
    settings = re.sub(r" \(\[[^)]*\)\)", "", summary)  # the link to the paper is only for the model card
    width = max(map(len, tensors))
    rows = [f"{name:<{width}}  {t.numel():>10,}  {list(t.shape)}" for name, t in sorted(tensors.items())]
    total = sum(t.numel() for t in tensors.values())
    size = sum(file.stat().st_size for file in folder.iterdir())
    facts = [f"{key}: {value}" for key, value in description["info"].items()]
    return "\n".join(
        [
            f"adapter for {base['architecture']}: {settings}; "
            f"{len(base['layers'])} layers, head {', '.join(description['head']) or 'none'}",
            *facts,
            "",
            *rows,
            f"{'all':<{width}}  {total:>10,}  {size / 1e3:,.1f} kB on disk",
        ]
    )
