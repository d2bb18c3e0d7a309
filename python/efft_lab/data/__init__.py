"""Load image tasks, which are data sets with splits for training, validation and test.

The tasks are VTAB-1K, your own folders, the data sets of torchvision, data sets in packages of PyPI, npm and Debian
("packaged"), and data sets that this package draws itself ("generated" without and "rendered" with a renderer).

``names()`` lists the known tasks, ``describe(name)`` describes a task, and ``load(name)`` returns a task with its
splits ``train``, ``val``, ``trainval`` (both together) and ``test``. Importing this package downloads nothing. ``load``
and ``fetch`` print a message to stderr before they download or draw data.
"""

from efft_lab.data.baselines import nearest_neighbors, trivial_baselines

# The next line first imports the submodule `efft_lab.data.fetch`. Then the attribute `fetch` of this package becomes
# the function of the same name. `from efft_lab.data.fetch import fetch_pypi` still finds the submodule.
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
