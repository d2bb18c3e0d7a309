"""Write single files and adapters atomically, and read them.

If a process that writes is killed, either the old or the new content remains (except with :func:`write_pair`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"

#: Maximum size of a configuration file in bytes. Parsed JSON can need thirty times the memory of its text.
LARGEST_JSON = 2 * 2**20
#: Maximum number of bytes of a weights file in addition to its tensors (for names, shapes and free text).
_LARGEST_HEADER = 16 * 2**20


def replace_file(path: Path, content: bytes) -> None:
    """Replace the content of a file.

    After a crash of the process or the machine, the file has either the old or the new content.
    """
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces ``path`` when the block ends without an error.

    Other processes that write to the folder wait until the block has ended.
    """
    with _hold_folder(path.parent) as alone, _stage(path) as staged:
        if alone:
            _sweep(path, ".tmp")
        with open(staged, "xb") as file:
            yield file
            _sync(file)
        os.replace(staged, path)
        _sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is longer than :data:`LARGEST_JSON` or is not JSON.
    """
    content = _read(path, LARGEST_JSON)
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is not usable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def write_adapter(folder: Path, weights: bytes, description: dict[str, Any], card: str) -> None:
    """Write all files of an adapter.

    If the process is killed at any moment, the folder holds either the old or the new adapter.

    The configuration contains the hash of the weights. The function first writes the new weights next to the old
    weights, under a name that contains the hash. It then replaces the configuration, and finally replaces the old
    weights. If several processes write to the same folder, they take turns if the file system supports locks. The
    adapter that is written last remains.

    Raises:
        OSError: the disk is full, or permission is missing. The old adapter is kept.
        ValueError: the description is too long.
        TypeError: the description cannot be converted to JSON.
    """
    digest = hashlib.sha256(weights).hexdigest()
    text = json.dumps({**description, "weights": {"sha256": digest}}, indent=2) + "\n"
    contents = {WEIGHTS: weights, CONFIG: text.encode(), CARD: card.encode()}
    if len(contents[CONFIG]) > LARGEST_JSON:
        raise ValueError(
            f"{CONFIG} may be at most {LARGEST_JSON} bytes long, got {len(contents[CONFIG])}: shorten info"
        )
    pending = _pending(folder, digest)
    with _stage_all(folder, contents) as (staged, alone):
        os.replace(staged[WEIGHTS], pending)
        _sync_folder(folder)
        os.replace(staged[CONFIG], folder / CONFIG)  # from here on, loading reads the new adapter
        _sync_folder(folder)
        os.replace(pending, folder / WEIGHTS)
        os.replace(staged[CARD], folder / CARD)
        if alone:
            for name in contents:
                _sweep(folder / name)


def write_pair(folder: Path, weights: bytes, config: bytes) -> None:
    """Write weights and configuration for readers that do not check a hash.

    If the process is killed before it starts to replace files, the old files remain. If it is killed while it replaces
    files, the folder has no configuration.

    Raises:
        OSError: the disk is full, or permission is missing. The old files are kept.
    """
    with _stage_all(folder, {WEIGHTS: weights, CONFIG: config}) as (staged, _):
        (folder / CONFIG).unlink(missing_ok=True)
        os.replace(staged[WEIGHTS], folder / WEIGHTS)
        os.replace(staged[CONFIG], folder / CONFIG)
        _sync_folder(folder)


def read_description(folder: Path) -> Any:
    """Return the content of an adapter's configuration file.

    Raises:
        FileNotFoundError: the folder has no configuration file.
        ValueError: the file is not JSON or is longer than :data:`LARGEST_JSON`.
    """
    try:
        return read_json(folder / CONFIG)
    except FileNotFoundError:
        raise _no_adapter(folder) from None


#: Number of attempts to read weights with the recorded hash before the weights count as damaged. Several attempts are
#: needed, because other processes may replace the adapter between reading the configuration and reading the weights.
_ATTEMPTS = 4


def read_weights(
    folder: Path, description: dict[str, Any], largest: int = sys.maxsize - _LARGEST_HEADER
) -> bytes | None:
    """Return the weights that belong to a configuration.

    If the configuration records a hash, the returned weights have this hash.

    Args:
        folder: the folder of the adapter.
        description: the result of :func:`read_description`.
        largest: maximum number of bytes of the tensors. A larger file is not read.

    Returns:
        The content of the file, or None if the adapter was replaced after its description was read.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: the file is too large, is damaged, or comes from another save.
    """
    digest, content = _digest_in(folder, description), None
    for _ in range(_ATTEMPTS):
        # The order matters, because another process that saves renames weights from the first name to the second.
        for path in (*([] if digest is None else [_pending(folder, digest)]), folder / WEIGHTS):
            try:
                content = _read(path, largest + _LARGEST_HEADER)
            except FileNotFoundError:
                continue
            if digest == hashlib.sha256(content).hexdigest():
                return content
        if _digest_in(folder, read_description(folder)) != digest:
            return None
    if content is None:
        raise _no_adapter(folder)
    if digest is None:  # the adapter was written before hashes were recorded
        return content
    raise ValueError(
        f"{folder / WEIGHTS} is damaged or of another save: its SHA-256 is not the one in {CONFIG}; copy both "
        "files again, save the adapter again or, if you changed the weights yourself, delete 'weights' from that file"
    )


def _digest_in(folder: Path, description: Any) -> str | None:
    """Return the hash of the weights from the configuration, or None if the configuration has no hash."""
    weights = description.get("weights") if isinstance(description, dict) else None
    if weights is None:
        return None
    digest = weights.get("sha256") if isinstance(weights, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{folder / CONFIG}: 'weights' must be an object with a 'sha256' of 64 hexadecimal digits")
    return digest


def _pending(folder: Path, digest: str) -> Path:
    """Return the name of the file with new weights before it replaces the file with the old weights."""
    return folder / f".{WEIGHTS}.{digest}"


def _no_adapter(folder: Path) -> FileNotFoundError:
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
    return FileNotFoundError(f"no adapter in {folder}: expected {CONFIG} and {WEIGHTS}, found {there}")


def _read(path: Path, largest: int) -> bytes:
    if not path.is_file():  # reading a pipe or a device may never end
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"{path} has {size} bytes, expected at most {largest}: it is damaged or another file")
        return file.read(size)


@contextmanager
def _stage(path: Path) -> Iterator[Path]:
    """Yield the name of a new file next to ``path``. The file is removed after the block."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield staged
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def _stage_all(folder: Path, contents: dict[str, bytes]) -> Iterator[tuple[dict[str, Path], bool]]:
    """Write new files next to the old files.

    Yield a mapping from the name of each old file to its new file, and the value that :func:`_hold_folder` yields.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        alone = stack.enter_context(_hold_folder(folder))
        staged = {name: stack.enter_context(_stage(folder / name)) for name in contents}
        for name, content in contents.items():
            with open(staged[name], "xb") as file:
                file.write(content)
                _sync(file)
        yield staged, alone


def _sweep(path: Path, suffix: str = "") -> None:
    """Remove files next to ``path`` that killed processes have left."""
    for other in path.parent.iterdir():
        if other.name.startswith(f".{path.name}.") and other.name.endswith(suffix):
            other.unlink(missing_ok=True)


@contextmanager
def _hold_folder(folder: Path) -> Iterator[bool]:
    """Prevent other processes from writing to the folder.

    Yields False if locks are not supported (on Windows and some network disks).
    """
    descriptor = _lock(folder)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            import fcntl

            # Closing is not enough if a process that was forked in the meantime also has the file open.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # if the folder cannot be read, writing to it raises an error later
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder survive a power cut."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not support it
            raise
    finally:
        os.close(descriptor)
