"""All metadata is in pyproject.toml. This file is where the optional C++/CUDA extension will be declared."""

from setuptools import setup

setup()
