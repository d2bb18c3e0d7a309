"""Test the faults in the table of docs/faults.md one by one.

Each test checks that the table states what happens, such as an error, and whether models and files have changed.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.saving.files import write_adapter
from efft_kernels import measured
from tests.adapter_files import CONFIG, WEIGHTS, edit_config, edit_weights, write_weights
from tests.hostile import at_most, within

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]
Case = Callable[..., None]
Refused = Callable[..., AbstractContextManager[None]]

PAGE = (Path(__file__).parents[3] / "docs" / "faults.md").read_text()
ROWS = dict(re.findall(r"^\| (.+?) \| (.+ \| .+) \|$", PAGE, re.MULTILINE))
GB = 2**30


@pytest.fixture
def case(show: Callable[..., None]) -> Case:
    """Return a function that records one row of the table, which docs/faults.md must contain.

    In the page, "…" stands for any text.
    """

    def note(name: str, happened: str, earlier: str = "unchanged") -> None:
        show("What went wrong on purpose", name, "what was there", earlier)
        show("What went wrong on purpose", name, "what happened", happened[:120])
        assert name in ROWS, f"docs/faults.md lacks the row\n| {name} | {happened} | {earlier} |"
        pattern = ".*".join(map(re.escape, ROWS[name].split("…")))
        assert re.fullmatch(pattern, f"{happened} | {earlier}"), f"{ROWS[name]}\n{happened} | {earlier}"

    return note


@pytest.fixture
def refused(case: Case, tmp_path: Path) -> Refused:
    """Return a context that expects an error within limits of time and memory, and records its text for the table."""

    @contextmanager
    def check(name: str, kind: type[Exception] = ValueError) -> Iterator[None]:
        with at_most(100), within(10), pytest.raises(kind) as caught:
            yield
        text = " ".join(str(caught.value).replace(str(tmp_path), "…").splitlines())
        case(name, f"`{caught.type.__name__}: {text}`")

    return check


@pytest.fixture
def offered(refused: Refused, tiny_vit: Make, unchanged: Unchanged) -> Callable[[str, Path], None]:
    """Return a function that tries to load an adapter into a model, which must not change."""

    def offer(name: str, folder: Path) -> None:
        model = tiny_vit()
        with unchanged(model), refused(name):
            efft.load_adapter(model, folder)

    return offer


class Code:
    """Create the file ``marker`` when a pickle of this object is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def sparse(path: Path, size: int) -> None:
    """Create a sparse file of ``size`` bytes."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)


# --- adapter files ----------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "weights cut off": lambda folder: os.truncate(folder / WEIGHTS, 3000),
    "one bit of the weights flipped": lambda folder: (folder / WEIGHTS).write_bytes(
        bytes([b ^ (i == 2000) for i, b in enumerate((folder / WEIGHTS).read_bytes())])
    ),
    "weights of 1 TB": lambda folder: sparse(folder / WEIGHTS, 1024 * GB),
    "configuration of 1 GB": lambda folder: sparse(folder / CONFIG, GB),
    "configuration cut off": lambda folder: os.truncate(folder / CONFIG, 100),
    "configuration nested 100,000 times": lambda folder: (folder / CONFIG).write_text("[" * 100_000),
    "configuration of 2 MB of empty objects": lambda folder: (folder / CONFIG).write_text(f"[{'{},' * 699_000}0]"),
    "factors of another dtype": lambda folder: edit_weights(
        folder, lambda t: t.update({"efft.ffn.C": t["efft.ffn.C"].to(torch.int32)})
    ),
    "factors of another shape": lambda folder: edit_weights(
        folder, lambda t: t.update({"efft.ffn.U": torch.zeros(16, 5)})
    ),
    "NaN in a factor": lambda folder: edit_weights(folder, lambda t: t["efft.ffn.C"].fill_(float("nan"))),
    "tensor named like a path": lambda folder: edit_weights(folder, lambda t: t.update({"../../x": torch.zeros(1)})),
    "head named like a path": lambda folder: edit_config(folder, lambda d: d.update(head=["../../x"])),
    "hash that is a path": lambda folder: edit_config(folder, lambda d: d.update(weights={"sha256": "../x"})),
    "rank of 10³⁰": lambda folder: edit_config(folder, lambda d: d["config"].update(rank=10**30)),
    "patterns of unlimited length": lambda folder: edit_config(
        folder, lambda d: d["config"].update(exclude=["(.*)*"] * 200_000)
    ),
    "scale that is not a number": lambda folder: edit_config(folder, lambda d: d["config"].update(scale=float("nan"))),
}


def test_patterns_of_a_file_are_never_matched(
    saved: tuple[nn.Module, Path], tiny_vit: Callable[..., nn.Module]
) -> None:
    """Python's ``re`` would take forever to match this pattern. Loading must use the names in the file instead."""
    model, folder = saved
    edit_config(folder, lambda d: d["config"].update(targets=["(((((.+)+)+)+)+)+!"]))
    with at_most(20):
        again = efft.load_adapter(tiny_vit(), folder)
    assert efft.adapted_layers(again).keys() == efft.adapted_layers(model).keys()


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_adapters(name: str, saved: tuple[nn.Module, Path], offered: Callable[[str, Path], None]) -> None:
    _, folder = saved
    DAMAGE[name](folder)
    offered(name, folder)


def test_a_header_that_promises_more_than_there_is(
    saved: tuple[nn.Module, Path], offered: Callable[[str, Path], None]
) -> None:
    header = json.dumps({"efft.ffn.U": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}})
    write_weights(saved[1], len(header).to_bytes(8, "little") + header.encode())
    offered("header that claims a factor of 10⁶ × 10⁶ entries", saved[1])


def test_a_pickle_in_place_of_the_weights(
    saved: tuple[nn.Module, Path], offered: Callable[[str, Path], None], tmp_path: Path
) -> None:
    write_weights(saved[1], pickle.dumps(Code(tmp_path / "ran")))
    offered("pickle instead of the weights", saved[1])
    assert not (tmp_path / "ran").exists()


def test_a_lora_checkpoint_cut_off(
    adapted_vit: Make, tiny_vit: Make, refused: Refused, unchanged: Unchanged, tmp_path: Path
) -> None:
    folder, model = efft.export_lora(adapted_vit(), tmp_path), tiny_vit()
    os.truncate(folder / WEIGHTS, 3000)
    with unchanged(model), refused("LoRA checkpoint of peft cut off"):
        efft.import_lora(model, folder)


# --- saving -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_disk_full(
    saved: tuple[nn.Module, Path], randomize: Make, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    before = contents(folder)
    randomize(model, seed=9)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with refused("disk full while an adapter is saved", OSError):
        efft.save_adapter(model, folder)
    assert contents(folder) == before


def test_read_only_folder(saved: tuple[nn.Module, Path], case: Case) -> None:
    model, folder = saved
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a folder that only its owner may enter
        public = Path(name)
        shutil.copytree(folder, public, dirs_exist_ok=True)
        public.chmod(0o555)
        before = contents(public)
        user = os.geteuid()
        if user == 0:  # root may write to read-only files
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError) as caught:
                efft.save_adapter(model, public)
        finally:
            os.seteuid(user)
        assert contents(public) == before
    case("folder read-only", f"`PermissionError: {caught.value}`")


def killing(calls: int) -> Callable[..., None]:
    """Return a replacement for ``os.replace`` that kills the process after this number of calls."""
    replace, left = os.replace, iter(range(calls))

    def replace_or_kill(source: Any, target: Any) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    return replace_or_kill


def test_killed_while_saving(
    saved: tuple[nn.Module, Path], randomize: Make, tiny_vit: Make, images: Tensor, case: Case
) -> None:
    """This test kills a save at a few points. tests/efft/saving/test_files.py kills it at every line."""
    model, folder = saved
    old = model(images)
    randomize(model, seed=9)
    seen = set()
    for calls in range(10):
        child = os.fork()
        if child == 0:
            os.replace = killing(calls)
            efft.save_adapter(model, folder)
            os._exit(0)
        os.waitpid(child, 0)
        loaded = efft.load_adapter(tiny_vit().eval(), folder)(images)
        assert torch.equal(loaded, old) or torch.equal(loaded, model(images))
        seen.add(torch.equal(loaded, old))
    assert seen == {True, False}
    case("process killed while an adapter is saved", "either the earlier or the new adapter loads", "undamaged")


def test_two_processes_save_into_one_folder(tmp_path: Path, case: Case) -> None:
    children = []
    for letter in (b"a", b"b"):
        child = os.fork()
        if child == 0:
            for _ in range(20):
                write_adapter(tmp_path, letter * 1000, {"info": letter.decode()}, "card")
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert (tmp_path / WEIGHTS).read_bytes() == 1000 * json.loads((tmp_path / CONFIG).read_text())["info"].encode()
    case("two processes save into one folder", "they take turns, and the last one's adapter loads", "replaced")


# --- other files ------------------------------------------------------------------------------------------------------


def test_backbones_with_code_in_them(tiny_vit: Make, refused: Refused, unchanged: Unchanged, tmp_path: Path) -> None:
    from efft_lab.backbones import load_backbone

    model, path = tiny_vit(num_classes=0), tmp_path / "backbone.pth"
    torch.save({"model": Code(tmp_path / "ran")}, path)
    with unchanged(model), refused("backbone's .pth file that contains code"):
        load_backbone(model, path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["training checkpoint cut off", "training checkpoint that contains code"])
def test_training_checkpoints(name: str, refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'efft-kernels[train]'")
    from efft_lab.train.folder import CheckpointError, load_checkpoint, save_checkpoint

    path = tmp_path / "checkpoint.pt"
    if name.endswith("off"):
        save_checkpoint(path, {"config": {}})
        os.truncate(path, 500)
    else:
        torch.save({"format": 1, "config": Code(tmp_path / "ran")}, path)
    with refused(name, CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_suites_without_end(refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'efft-kernels[train]'")
    from efft_lab.compare import suite

    sparse(tmp_path / "suite.json", GB)
    with refused("suite of 1 GB"):
        suite.load(tmp_path / "suite.json")


def test_damaged_images(refused: Refused, tmp_path: Path) -> None:
    from efft_lab.data.task import FileImages

    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with refused("image cut off", OSError):
        FileImages([tmp_path / "image.png"], [0]).image(0)


def test_damaged_tables_of_measurements(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('[{"case": {"op": "tt_linear"}}]')
    with refused("damaged table in EFFT_AUTOTUNE"):
        measured.read(tmp_path / "table.json")


# --- several processes and threads ------------------------------------------------------------------------------------


def test_threads_that_call_one_model(adapted_vit: Make, case: Case) -> None:
    model = adapted_vit()
    batches = [torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [model(batch) for batch in batches]
    wrong: list[int] = []

    def call(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(model(batches[i]), expected[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    case("eight threads call one model", "each thread gets exactly the output that it would get alone", "-")


def trained(model: nn.Module, loader: Any) -> list[Tensor]:
    """Return the factors after an epoch."""
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=0.01))
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [factor.detach().clone() for _, factor in efft.named_factors(model)]


DATA = torch.utils.data.TensorDataset(
    torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 5
)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loaders_whose_workers_are_started_while_a_model_trains(start: str, adapted_vit: Make, case: Case) -> None:
    expected = trained(adapted_vit(dropout=0.0).train(), torch.utils.data.DataLoader(DATA, batch_size=4))
    context = multiprocessing.get_context(start)
    loader = torch.utils.data.DataLoader(DATA, batch_size=4, num_workers=2, multiprocessing_context=context)
    with warnings.catch_warnings():
        # Newer versions of Python warn about fork in a process with threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        found = trained(adapted_vit(dropout=0.0).train(), loader)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    case(f"data loader with workers started by {start}", "exactly the same training as without workers", "-")


def test_a_run_that_is_repeated(adapted_vit: Make, case: Case) -> None:
    runs = []
    for _ in range(2):
        model = adapted_vit(dropout=0.2).train()
        torch.manual_seed(3)
        torch.use_deterministic_algorithms(True)
        try:
            runs.append(trained(model, torch.utils.data.DataLoader(DATA, batch_size=4, shuffle=True)))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    case("two runs of one training, with `torch.use_deterministic_algorithms(True)`", "exactly the same factors", "-")
