"""Implement the commands of ``efft`` except ``compare``, ``bench`` and ``env``.

For a command other than ``train``, the parameters of a function are the options, and the docstring is the help text.
For ``train``, the options and their help texts are the fields of :class:`TrainCommand` and their docstrings.
"""

import argparse
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from efft.methods import EfftConfig
from efft.presets import paper_config
from efft_lab.backbones import DEFAULT
from efft_lab.cli.parsing import parse
from efft_lab.train.config import TrainConfig


@dataclass
class TrainCommand:
    """Fine-tune a model and test it once, after training. The defaults are the recipe of the EFFT paper's public
    code."""

    train: TrainConfig = field(default_factory=TrainConfig)

    config: Path | None = None
    """JSON file with a training configuration, such as the config.json that a run writes. Options on the command line
    override the values in the file."""

    out: Path | None = None
    """Folder for everything that the run writes; by default, runs/DATA-METHOD."""

    resume: bool = False
    """Continue from the checkpoint in the folder of the run (--out). Without a checkpoint, start from the beginning."""

    overwrite: bool = False
    """Delete the run in the folder (--out) and start again."""

    log_with: tuple[str, ...] = ()
    """Names of experiment trackers that also receive the metrics: tensorboard, wandb or any other tracker that
    accelerate supports."""


def train(words: list[str]) -> None:
    """Run ``efft train``. The values in the configuration file are the defaults of the options."""
    # Configuration files and messages use names such as efft.scale for the option --scale. Accept --efft.scale, too.
    words = [re.sub(r"^--efft\.", "--", word) for word in words]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(words)[0].config
    defaults = TrainCommand(train=TrainConfig.load(path)) if path else TrainCommand()
    command = parse(TrainCommand, words, "efft train", default=defaults)
    from efft_lab.train import run

    config = command.train
    out = command.out or Path("runs") / f"{Path(config.data).name}-{config.method}"
    options: dict[str, Any] = {"resume": command.resume, "overwrite": command.overwrite, "log_with": command.log_with}
    result = run(config, out, **options).summary
    from accelerate import PartialState  # imported after `run`, which reports a missing accelerate

    if not PartialState().is_main_process:
        return
    from efft_lab.train.goals import score_text

    test, validation = (
        {name.removeprefix(part): value for name, value in result.items() if name.startswith(part)}
        for part in ("test_", "val_")
    )
    score = next(iter(test))
    chosen = "" if validation[score] is None else f", validation {score_text({score: validation[score]}).split()[-1]}"
    facts = (
        f"test {score_text(test)}{chosen}",
        f"{result['trainable_parameters']:,} trainable parameters",
        f"{result['saved']} of {result['saved_bytes'] / 1e3:,.0f} kB",
        f"{result['seconds']:.0f} s",
        f"written to {out}",
    )
    print("; ".join(facts))


def evaluate(
    path: tyro.conf.Positional[Path],
    /,
    split: Literal["train", "val", "trainval", "test"] = "val",
    data: str | None = None,
    data_root: str | None = None,
    per_class: bool = False,
    batch_size: int = 256,
    amp: Literal["no", "bf16", "fp16"] = "no",
    checkpoint: Path | None = None,
) -> None:
    """Print the scores of a trained model. The test split is read only with --split test.

    Args:
        path: folder of a finished run, or folder of an adapter that a run wrote.
        split: the split to evaluate.
        data: name or folder of a data set to use instead of the data set on which the model was trained.
        data_root: folder with the files of the data set in --data, if that data set cannot be downloaded.
        per_class: also print one score for each class or value, which is the accuracy of each class (classification),
            the intersection over union of each class (segmentation), or the mean absolute error of each value
            (regression).
        batch_size: number of images that are computed at a time.
        amp: number format for autocast (no: fp32 without autocast).
        checkpoint: file with the weights of the base model, if the file has moved since training.
    """
    from efft_lab.train.build import load_task_for, load_trained
    from efft_lab.train.goals import make_goal, score_text
    from efft_lab.train.inference import measure, predict

    model, config = load_trained(path, checkpoint)
    task = load_task_for(config, data, data_root)
    if config.protocol == "final" and data is None and split != "test":
        print(f"note: this model was trained on the images of {split!r} (protocol 'final')")
    images = getattr(task, split)
    if config.task != "classification":
        goal = make_goal(config, task)
        sums = measure(model, images, goal, batch_size=batch_size, amp=amp, title=split)
        print(f"{split} {score_text(goal.scores(sums))} ({len(images)} images)")
        for value, name in zip(goal.details(sums), task.class_names, strict=True):
            if per_class:
                print(f"{value:8.2%}  {name}" if config.task == "segmentation" else f"{value:8.4g}  {name}")
        return
    predictions, labels = predict(model, images, batch_size=batch_size, amp=amp, title=split)
    right = predictions == labels
    print(f"{split} accuracy {right.float().mean():.2%} ({int(right.sum())} of {len(right)} images)")
    if per_class:
        for label, name in enumerate(task.class_names):
            own = right[labels == label]
            share = f"{own.float().mean():8.2%}" if len(own) else "       -"
            print(f"{share}  {int(own.sum()):>5} of {len(own):>5}  {name}")


def merge(path: tyro.conf.Positional[Path], /, out: Path | None = None, checkpoint: Path | None = None) -> None:
    """Add an adapter to the weights of its base model and write the merged weights to a file.

    The weights have the parameter names of the timm model without an adapter. For segmentation, they have the parameter
    names of efft_lab.train.Segmenter.

    Args:
        path: folder of a finished run whose method writes an adapter (such as efft), or the folder of that adapter.
        out: file for the merged weights; by default, merged.safetensors in the folder PATH.
        checkpoint: file with the weights of the base model, if the file has moved since training.
    """
    from safetensors.torch import save_file

    import efft
    from efft_lab.train.build import load_trained

    model, config = load_trained(path, checkpoint)
    if config.adapter_config() is None:
        raise ValueError(
            f"{path} is a run of method {config.method!r}, which trains no factors: there is nothing to merge"
        )
    print(efft.merge(model))
    target = out or path / "merged.safetensors"
    if target.suffix != ".safetensors":
        raise ValueError(f"the merged weights are written as .safetensors, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    state = efft.merged_state_dict(model)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target, {"model": config.model})
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


def export(path: tyro.conf.Positional[Path], /, out: Path | None = None, checkpoint: Path | None = None) -> None:
    """Write an adapter as an equivalent LoRA checkpoint, which `peft` can load into the timm model without an adapter.

    Args:
        path: folder of a finished run whose method writes an adapter (such as efft), or the folder of that adapter.
        out: folder for the checkpoint; by default, lora in the folder PATH.
        checkpoint: file with the weights of the base model, if the file has moved since training.
    """
    import efft
    from efft_lab.train.build import load_trained

    model, config = load_trained(path, checkpoint)
    if config.adapter_config() is None:
        raise ValueError(
            f"{path} is a run of method {config.method!r}, which trains no factors: there is nothing to export"
        )
    folder = efft.export_lora(model, out or path / "lora", base_model=config.model)
    size = sum(file.stat().st_size for file in folder.glob("adapter_*"))
    print(f"wrote {folder} ({size / 1e6:.1f} MB)")


def inspect(
    model: tyro.conf.Positional[str] = DEFAULT,
    /,
    classes: int = 1000,
    image_size: int | None = None,
    paper: bool = False,
    adapter: Annotated[EfftConfig, tyro.conf.arg(name="")] = EfftConfig(),  # noqa: B008  # tyro copies defaults
) -> None:
    """Print the parameters that would be trained in a model, or the tensors of a saved adapter.

    For a model, the output also lists the layers that would be adapted. No weights of the model are read.

    Args:
        model: name of a model (dinov2_vits14_saliency or any timm model), or the folder of an adapter or a run. All
            other options apply only to a model.
        classes: number of outputs of the classifier.
        image_size: height and width of the input in pixels; by default, the input size of the model.
        paper: use the ranks in the EFFT paper's public code for this architecture instead of --rank. All other options
            still apply.
        adapter: settings of the adapter.
    """
    from efft_lab.cli.inspect import adapter_table, model_table

    if paper:
        plain = EfftConfig()
        given = {f.name: getattr(adapter, f.name) for f in fields(adapter)}
        given = {name: value for name, value in given.items() if value != getattr(plain, name)}
        if "rank" in given:
            raise ValueError("give either --paper, which sets the ranks, or --rank, not both")
        adapter = paper_config(model, **given)
    folder = Path(model)
    print(adapter_table(folder) if folder.is_dir() else model_table(model, classes, image_size, adapter))


def data_list() -> None:
    """List the known data sets, with the size of the download, the license and the source.

    The column trivial is the best test accuracy, in percent, of predictors that do not recognize objects, such as the
    most frequent class. The column ready tells whether the data set is in the cache.
    """
    import efft_lab.data

    print(efft_lab.data.list_table())


def data_fetch(names: tyro.conf.Positional[tuple[str, ...]], /, allow_non_commercial: bool = False) -> None:
    """Download or draw data sets and store them in the cache, which makes later runs independent of the network.

    The environment variable EFFT_HOME names the folder of the cache (~/.cache/efft by default). The VTAB-1K data sets
    cannot be downloaded.

    Args:
        names: names of data sets; `efft data list` prints all names.
        allow_non_commercial: accept data sets whose license forbids commercial use.
    """
    import efft_lab.data

    options: dict[str, Any] = {"allow_non_commercial": allow_non_commercial}
    if not names:
        raise ValueError("name the data sets to fetch; `efft data list` lists them")
    for name in names:
        efft_lab.data.fetch(name, **options)
        print(f"{name}: ready")
