"""Image classification tasks: VTAB-1K, folders, torchvision, packaged, generated and rendered sets.

``names()`` lists what is known, ``describe(name)`` says what it is, ``load(name)`` gives its four data sets. Nothing
is downloaded by an import; `load` and `fetch` say on stderr when they do.
"""

from efft_lab.data.baselines import nearest_neighbours, trivial_baselines

# The submodule `efft_lab.data.fetch` is loaded by the next line, so that the function of the same name stays on the
# package; `from efft_lab.data.fetch import fetch_pypi` still finds the module.
from efft_lab.data.registry import describe, fetch, list_table, load, names
from efft_lab.data.task import NORMALIZATIONS, ROLES, ImageDataset, TaskData, TaskInfo
from efft_lab.data.vtab import vtab_hyperparameters

__all__ = [
    "NORMALIZATIONS",
    "ROLES",
    "ImageDataset",
    "TaskData",
    "TaskInfo",
    "describe",
    "fetch",
    "list_table",
    "load",
    "names",
    "nearest_neighbours",
    "trivial_baselines",
    "vtab_hyperparameters",
]
