"""Load image tasks: VTAB-1K, folders, and torchvision, packaged, generated and rendered data sets.

``names()`` lists the known tasks, ``describe(name)`` describes a task, and ``load(name)`` returns its four splits.
Importing this package downloads nothing. ``load`` and ``fetch`` print a message to stderr when they download data.
"""

from efft_lab.data.baselines import nearest_neighbors, trivial_baselines

# The next line imports the submodule `efft_lab.data.fetch` first. The package attribute `fetch` is then replaced by the
# function of the same name, and `from efft_lab.data.fetch import fetch_pypi` still finds the module.
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
    "nearest_neighbors",
    "trivial_baselines",
    "vtab_hyperparameters",
]
