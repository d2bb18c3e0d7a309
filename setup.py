"""Build the optional compiled extension (C++ and CUDA) during installation; all metadata is in pyproject.toml.

The environment variable ``EFFT_BUILD_EXT`` selects the targets of the extension: ``auto`` (the default), ``none``,
``cpu`` or ``cuda``. efft_kernels/build.py documents these values and compiles the targets. With ``auto``, a target is
left out if this machine lacks the tools to build it, or if its compilation fails. Without any target, the installed
packages are pure Python. The sources in csrc/ are installed as well, so that the targets can be compiled later.
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

# build.py is loaded by its path, because importing the package efft_kernels would import torch, which may be missing.
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
    """Copy csrc/ into the package, so that ``python -m efft_kernels build`` can compile the extension later."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "efft_kernels" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


class Libraries(build_ext):
    """Compile the libraries into the wheel, or into the user's cache for an editable or in-place build."""

    def run(self) -> None:
        print("\n".join(SUMMARY))
        for target in list(TARGETS):
            try:
                self._build(target)
            except builder.BuildError as error:
                if REQUEST != "auto":
                    raise
                TARGETS.remove(target)  # "auto" does not require any target, and all features work without the library
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
    """Tag the wheel for every Python 3, because the libraries do not use Python and depend only on the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if TARGETS else "any"


setup(
    cmdclass={"build_py": WithSources, "build_ext": Libraries, "bdist_wheel": AnyPython},
    ext_modules=[Extension("efft_kernels.lib", [])] if TARGETS else [],
)
