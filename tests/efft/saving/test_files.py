"""Test that files are complete after a killed process, on a full disk, and with several writers.

The files hold either the complete old content or the complete new content. Damaged weights are found by their hash.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft.saving import files
from efft.saving.files import CARD, CONFIG, WEIGHTS, read_description, read_weights, replace_file, write_adapter

Make = Callable[..., nn.Module]


def adapter(letter: str) -> tuple[bytes, dict[str, Any], str]:
    """Return arguments of write_adapter that contain a letter, which tells apart the adapters of a test."""
    return letter.encode() * 5000, {"info": {"letter": letter}}, f"card of {letter}"


def loaded(folder: Path) -> str:
    """Return the letter of the adapter in the folder; weights and description must belong together."""
    while True:
        description = read_description(folder)
        weights = read_weights(folder, description, 10_000)
        if weights is not None:
            letter = str(description["info"]["letter"])
            assert weights == adapter(letter)[0]
            return letter


def forked(action: Callable[[], object]) -> int:
    """Run ``action`` in another process and return 0, 1 if it failed, or the negative number of the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(line: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a process that is killed after ``line`` lines of ``files.py``; return whether it was killed.

    If the process ends earlier, it must end without an error.
    """
    count = itertools.count()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line" and next(count) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced() -> None:
        sys.settrace(trace)
        action()

    code = forked(traced)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_room_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``writes`` writes succeed and the next one stop halfway, as on a full disk."""
    count = itertools.count()

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            if next(count) < writes:
                return super().write(content)
            super().write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open", Full, raising=False)


# --- killed processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [True, False], ids=["over another", "in a new folder"])
def test_killed_at_any_line_a_save_leaves_the_old_adapter_or_the_new(earlier: bool, tmp_path: Path) -> None:
    found = []
    for line in itertools.count():
        folder = tmp_path / str(line)
        if earlier:
            write_adapter(folder, *adapter("a"))
        killed = killed_at(line, lambda folder=folder: write_adapter(folder, *adapter("b")))
        try:
            found.append(loaded(folder))
        except FileNotFoundError:
            assert not earlier
            found.append("")
        write_adapter(folder, *adapter("c"))  # this save must remove the files that the killed save left behind
        assert loaded(folder) == "c"
        assert names(folder) == sorted([CARD, CONFIG, WEIGHTS])
        if not killed:
            break
    old = "a" if earlier else ""
    first = found.index("b")  # the switch from old to new happens at a single line
    assert 20 < first < len(found) - 5
    assert found == [old] * first + ["b"] * (len(found) - first)


def test_saves_that_are_killed_one_after_the_other(tmp_path: Path) -> None:
    """The saves are killed at various lines. Each save must cope with the files that the previous saves left behind."""
    write_adapter(tmp_path, *adapter("a"))
    seen = {"a"}
    for i in range(150):
        before, new = loaded(tmp_path), "bcd"[i % 3]
        killed = killed_at((37 * i) % 140, lambda new=new: write_adapter(tmp_path, *adapter(new)))
        assert loaded(tmp_path) in ((before, new) if killed else (new,))
        seen.add(loaded(tmp_path))
    assert seen == set("abcd")
    write_adapter(tmp_path, *adapter("e"))
    assert names(tmp_path) == sorted([CARD, CONFIG, WEIGHTS])


def test_weights_that_are_not_in_their_place_yet_are_loaded(
    saved: tuple[nn.Module, Path], randomize: Make, tiny_vit: Make, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that was killed just after it replaced the configuration leaves files in this state."""
    model, folder = saved
    old = (folder / WEIGHTS).read_bytes()
    efft.save_adapter(randomize(model, seed=9), folder)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert json.loads((folder / CONFIG).read_text())["weights"] == {"sha256": digest}
    (folder / WEIGHTS).rename(folder / f".{WEIGHTS}.{digest}")
    (folder / WEIGHTS).write_bytes(old)
    assert torch.equal(efft.load_adapter(tiny_vit().eval(), folder)(images), model(images))
    (folder / f".{WEIGHTS}.{digest}").unlink()
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is damaged or of another save: its SHA-256 is not the one in"):
        efft.load_adapter(tiny_vit(), folder)


def test_killed_at_any_line_a_file_is_the_old_one_or_the_new(tmp_path: Path) -> None:
    path, found = tmp_path / "file", []
    for line in itertools.count():
        path.write_bytes(b"old")
        killed = killed_at(line, lambda: replace_file(path, b"new"))
        found.append(path.read_bytes())
        if not killed:
            break
    assert found == sorted(found, reverse=True)
    assert set(found) == {b"old", b"new"}
    assert names(tmp_path) == ["file"], "the call that was not killed must remove what the others left behind"


# --- full disk, missing permission ------------------------------------------------------------------------------------


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_without_room_nothing_changes(writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, *adapter("a"))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    no_room_after(writes, monkeypatch)
    with pytest.raises(OSError, match="No space left on device"):
        write_adapter(tmp_path, *adapter("b"))
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), files.replacing(path) as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_what_is_too_long_to_be_read_is_not_written(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    with pytest.raises(
        ValueError, match=r"adapter_config\.json may be at most 2097152 bytes long, got .*: shorten info"
    ):
        efft.save_adapter(model, folder, info={"notes": "x" * files.LARGEST_JSON})
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


# --- several writers --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["with locks", "without locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test with and without file locks, which some file systems lack. Return whether they work."""
    if not request.param:
        monkeypatch.setattr(files, "_lock", lambda folder: None)
    return bool(request.param)


def test_two_processes_that_save_into_one_folder(locks: bool, tmp_path: Path) -> None:
    """A reader at the same time must see one complete adapter. Without locks, it may get an error instead."""
    write_adapter(tmp_path, *adapter("a"))

    def writer(letter: str) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(100):
                    write_adapter(tmp_path, *adapter(letter))
                code = 0
            finally:
                os._exit(code)
        return child

    running, seen, refused, codes = {writer("b"), writer("c")}, set(), 0, []
    while running:
        try:
            seen.add(loaded(tmp_path))
        except ValueError as error:
            assert "is damaged or of another save" in str(error)  # noqa: PT017
            refused += 1
        ended = [os.waitpid(child, os.WNOHANG) for child in running]
        running -= {child for child, _ in ended}
        codes += [os.waitstatus_to_exitcode(status) for child, status in ended if child]
    assert codes == [0, 0]
    assert seen & {"b", "c"}
    if locks:
        assert refused == 0
        assert loaded(tmp_path) in "bc"
        assert names(tmp_path) == sorted([CARD, CONFIG, WEIGHTS])
    write_adapter(tmp_path, *adapter("d"))
    assert loaded(tmp_path) == "d"


def test_a_lock_ends_with_the_save_even_if_a_process_was_forked_meanwhile(tmp_path: Path) -> None:
    """Forked workers of a data loader inherit all open files, including the lock, and run for a long time."""
    with files.replacing(tmp_path / "file") as file:
        file.write(b"x")
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        assert forked(lambda: (signal.alarm(20), replace_file(tmp_path / "file", b"y"))) == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / "file").read_bytes() == b"y"


# --- damage -----------------------------------------------------------------------------------------------------------


def positions(size: int) -> Iterator[int]:
    yield from range(0, size, max(size // 97, 1))
    yield size - 1


def test_a_flipped_bit_in_the_weights_is_found(saved: tuple[nn.Module, Path], tiny_vit: Make) -> None:
    _, folder = saved
    content = (folder / WEIGHTS).read_bytes()
    model = tiny_vit()
    for i in positions(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1 << (i % 8)
        (folder / WEIGHTS).write_bytes(flipped)
        with pytest.raises(ValueError, match="is damaged or of another save"):
            efft.load_adapter(model, folder)
    assert not hasattr(model, "efft")


def test_adapters_from_before_hashes_were_recorded(
    saved: tuple[nn.Module, Path], tiny_vit: Make, images: Tensor
) -> None:
    model, folder = saved
    description = json.loads((folder / CONFIG).read_text())
    del description["weights"]
    (folder / CONFIG).write_text(json.dumps(description))
    assert torch.equal(efft.load_adapter(tiny_vit().eval(), folder)(images), model(images))


@pytest.mark.parametrize(
    "record", [5, {}, {"sha256": 1}, {"sha256": "../../etc/passwd"}, {"sha256": "A" * 64}], ids=str
)
def test_records_that_are_no_hash(record: Any, saved: tuple[nn.Module, Path], tiny_vit: Make) -> None:
    _, folder = saved
    description = json.loads((folder / CONFIG).read_text()) | {"weights": record}
    (folder / CONFIG).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="'weights' must be an object with a 'sha256' of 64 hexadecimal digits"):
        efft.load_adapter(tiny_vit(), folder)
