"""Test downloads without network: with the real pip on a local folder, and with replacements for the other clients."""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import sys
import zipfile
from pathlib import Path

import pytest

import efft_lab.data
from efft_lab.data.fetch import Archive, MissingToolError, cache_dir, extract_deb, fetch_archive, fetch_pypi

# PathFinder searches only sys.path. importlib.util.find_spec("pip") would also run an import hook of setuptools, which
# then restores the standard library's distutils.
needs_pip = pytest.mark.skipif(importlib.machinery.PathFinder.find_spec("pip") is None, reason="this Python has no pip")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a wheel in a folder that pip searches instead of an index; the wheel requires a nonexistent Python."""
    path = tmp_path / "wheels" / "toy_images-1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        metadata = "Metadata-Version: 2.1\nName: toy-images\nVersion: 1.2\nRequires-Python: >=99\nRequires-Dist: nope\n"
        archive.writestr("toy_images-1.2.dist-info/METADATA", metadata)
        archive.writestr("toy_images-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_images-1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


@pytest.fixture
def fake_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes a shell script with the given name into the only folder on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def install(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return install


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_function_and_module_of_the_same_name_both_work() -> None:
    assert callable(efft_lab.data.fetch)
    assert sys.modules["efft_lab.data.fetch"].fetch_pypi is fetch_pypi


def test_cache_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == home
    monkeypatch.setenv("EFFT_HOME", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("EFFT_HOME")
    assert cache_dir() == Path.home() / ".cache/efft"


@needs_pip
def test_wheel_is_downloaded_once(wheel: Path, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digest = sha256(wheel.read_bytes())
    path = fetch_pypi("toy-images", "1.2", digest)
    assert path == home / "downloads/toy-images-1.2.whl"
    assert path.read_bytes() == wheel.read_bytes()
    assert files(home) == ["downloads/toy-images-1.2.whl"]
    assert capfd.readouterr().err == "efft: fetching toy-images 1.2 (pip)\n"
    wheel.unlink()  # the second time, the wheel must not be needed
    assert fetch_pypi("toy-images", "1.2", digest) == path
    assert capfd.readouterr().err == ""


@needs_pip
def test_wrong_hash_is_refused_and_leaves_nothing(wheel: Path, home: Path) -> None:
    digest = sha256(wheel.read_bytes())
    with pytest.raises(RuntimeError, match=rf"is not the pinned toy-images 1\.2 .*expected sha256 0000.*got {digest}"):
        fetch_pypi("toy-images", "1.2", "0" * 64)
    assert files(home) == []


@needs_pip
def test_failed_download_shows_why_and_where_to_put_the_file(home: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"(?s)fetching no-such-toy 1\.2 \(pip\) failed: .*No matching.*put the file"
    ):
        fetch_pypi("no-such-toy", "1.2", "0" * 64)
    assert files(home) == []


def test_file_put_by_hand_is_verified(home: Path) -> None:
    path = home / "downloads/toy-3.tgz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"right")
    archive = Archive("npm", "toy", "3", sha256(b"right"))
    assert fetch_archive(archive) == path
    path.write_bytes(b"wrong")
    with pytest.raises(RuntimeError, match=r"downloads/toy-3\.tgz is not the pinned toy 3 .*delete it and try again"):
        fetch_archive(archive)


def test_python_without_pip(monkeypatch: pytest.MonkeyPatch, fake_tool) -> None:
    fake_tool("python", "exit 1")
    monkeypatch.setattr(sys, "executable", str(Path(os.environ["PATH"]) / "python"))
    with pytest.raises(MissingToolError, match=r"fetching toy 1 \(pip\) needs pip, which .*python does not have"):
        fetch_pypi("toy", "1", "0" * 64)


def test_npm_pack(fake_tool, home: Path) -> None:
    fake_tool("npm", '[ "$1 $2 $3" = "pack --ignore-scripts toy@3" ] && printf pixels > toy-3.tgz && echo toy-3.tgz')
    path = fetch_archive(Archive("npm", "toy", "3", sha256(b"pixels"), size=6))
    assert path.read_bytes() == b"pixels"
    assert files(home) == ["downloads/toy-3.tgz"]


def test_apt_download(fake_tool, home: Path) -> None:
    fake_tool("apt-get", '[ "$1 $3" = "download toy=3-1" ] && printf pixels > toy_3-1_all.deb')
    assert fetch_archive(Archive("apt", "toy", "3-1", sha256(b"pixels"))).name == "toy-3-1.deb"


@pytest.mark.parametrize(("manager", "tool"), [("npm", "npm"), ("apt", "apt-get")])
def test_missing_client(fake_tool, manager, tool: str) -> None:
    with pytest.raises(MissingToolError, match=rf"fetching toy 3 .* needs {tool}, .*not installed; install it, or put"):
        fetch_archive(Archive(manager, "toy", "3", "0" * 64))


def test_failing_client_is_quoted(fake_tool, home: Path) -> None:
    fake_tool("apt-get", "echo 'E: Unable to locate package toy' >&2; exit 100")
    with pytest.raises(
        RuntimeError, match=r"(?s)ended with 100.*Unable to locate package toy\napt needs .*apt-get upd"
    ):
        fetch_archive(Archive("apt", "toy", "3", "0" * 64))
    assert files(home) == []


def test_client_that_writes_nothing(fake_tool) -> None:
    fake_tool("npm", "printf x > readme.txt")
    with pytest.raises(RuntimeError, match=r"expected one \*\.tgz file from toy 3 \(npm\), got \['readme\.txt'\]"):
        fetch_archive(Archive("npm", "toy", "3", "0" * 64))


def test_unpacking_without_dpkg(fake_tool, tmp_path: Path) -> None:
    with pytest.raises(MissingToolError, match=r"unpacking toy\.deb needs dpkg, which is not installed"):
        extract_deb(tmp_path / "toy.deb", tmp_path)
