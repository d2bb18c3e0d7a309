"""The optional C++/CUDA extension; all metadata is in pyproject.toml.

``EFFT_BUILD_EXT`` says what is built (efft_kernels/build.py): without the tools, and for a source distribution, the
packages are pure Python.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# By its path: importing it from the package would import torch, which need not be there.
spec = importlib.util.spec_from_file_location("efft_kernels_build", ROOT / "efft_kernels" / "build.py")
assert spec is not None
assert spec.loader is not None
builder = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = builder
spec.loader.exec_module(builder)

BUILDING = any(command in sys.argv for command in ("bdist_wheel", "editable_wheel", "build_ext", "install", "develop"))
REQUEST = builder.requested_build(os.environ)
TARGETS, SUMMARY = builder.plan(REQUEST) if BUILDING else ([], [])


class WithSources(build_py):
    """Ships csrc/ in the package, so that the extension can still be built where the wheel is installed."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "efft_kernels" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


class Libraries(build_ext):
    """The libraries, into the wheel; of an editable installation into the cache."""

    def run(self) -> None:
        print("\n".join(SUMMARY))
        for target in list(TARGETS):
            try:
                self._build(target)
            except builder.BuildError as error:
                if REQUEST != "auto":
                    raise
                TARGETS.remove(target)  # nobody asked for it, and everything works without
                print(f"{error}\nefft-kernels: going on without {target}; try again: python -m efft_kernels build")

    def _build(self, target: str) -> None:
        if self.editable_mode or self.inplace:
            builder.build_into_cache([target])
        else:
            builder.build([target], self._folder)

    @property
    def _folder(self) -> Path:
        return Path(self.build_lib) / "efft_kernels" / "lib"

    def get_outputs(self) -> list[str]:
        return [str(self._folder / builder.library_name(target)) for target in TARGETS]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPython(bdist_wheel):
    """One wheel for every Python 3: the libraries know nothing of Python, only of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if TARGETS else "any"


setup(
    cmdclass={"build_py": WithSources, "build_ext": Libraries, "bdist_wheel": AnyPython},
    ext_modules=[Extension("efft_kernels.lib", [])] if TARGETS else [],
)
