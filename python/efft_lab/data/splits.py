"""Split image sets at random, and find copies of images.

The splits depend only on a seed. They are stratified: each has about the class proportions of the complete set. Copies
of one image stay in the same split if :func:`stratified_split` gets the numbers from :func:`duplicate_groups`.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def stable_rng(*key: int) -> np.random.RandomState:
    """Return a random generator with the same stream on every platform and in every NumPy version.

    NumPy guarantees this only for ``RandomState``. The streams of the newer ``Generator`` may change between releases.
    """
    return np.random.RandomState(list(key))


def balanced_labels(n: int, classes: int, rng: np.random.RandomState) -> Indices:
    """Return labels [n] in random order with equally frequent classes.

    The class sizes differ by one if ``n`` is not a multiple of ``classes``.
    """
    return rng.permutation(np.arange(n) % classes).astype(np.int64)


def pixel_keys(images: npt.NDArray[np.uint8]) -> list[bytes]:
    """Return one hash for each of n images [n, ...]. Two hashes are equal exactly if the pixels are equal."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def file_keys(paths: Sequence[Path]) -> list[tuple[int, bytes]]:
    """Return one key per file. Two keys are equal exactly if the contents of the files are equal.

    Only files that have the same size as another file are read.
    """
    sizes = [path.stat().st_size for path in paths]
    shared = Counter(sizes)
    return [
        (size, hashlib.blake2b(path.read_bytes(), digest_size=16).digest() if shared[size] > 1 else b"")
        for path, size in zip(paths, sizes, strict=True)
    ]


def duplicate_groups(keys: Sequence[Hashable]) -> Indices:
    """Number the distinct keys in order of appearance. Return the number of each given key, [n]."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def distinct(keys: Sequence[Hashable], labels: npt.NDArray[Any]) -> Indices:
    """Return the positions of the images without duplicates.

    Of several images with the same key, only the first is included. If their labels differ, none of them is included.
    """
    first: dict[Hashable, int] = {}
    ambiguous = set()
    for index, key in enumerate(keys):
        if labels[first.setdefault(key, index)] != labels[index]:
            ambiguous.add(key)
    return np.array([index for key, index in first.items() if key not in ambiguous], dtype=np.int64)


def quotas(class_sizes: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Return the number of images to draw from each class, in proportion to the class sizes, with the sum ``total``.

    Fractions are rounded by the largest remainder method. Every class that has images contributes at least one image,
    if ``total`` is large enough.
    """
    available = int(class_sizes.sum())
    if total > available:
        raise ValueError(f"cannot draw {total} images from {available}")
    exact = class_sizes * (total / max(available, 1))
    shares = np.floor(exact).astype(np.int64)
    if total >= np.count_nonzero(class_sizes):
        shares = np.maximum(shares, np.minimum(class_sizes, 1))
    while shares.sum() != total:
        step = 1 if shares.sum() < total else -1
        open_ = shares < class_sizes if step > 0 else shares > 1
        gap = np.where(open_, step * (exact - shares), -np.inf)
        shares[np.argmax(gap)] += step
    return shares


def stratified_split(
    labels: npt.NDArray[np.int64], sizes: Sequence[int], seed: int, groups: Indices | None = None
) -> list[Indices]:
    """Draw disjoint sets of images, each with (nearly) the class proportions of the images that remain.

    Args:
        labels: Labels of all images, [n].
        sizes: Number of images of each set. The sets are drawn in this order. Their sum may be smaller than n.
        seed: Seed for the selection. Equal seeds give equal sets on every machine.
        groups: Group numbers of all images, [n]. Images with the same number are in the same set or in no set. If the
            groups do not allow the exact size of a set, the set is smaller.

    Returns:
        One sorted array per set with the positions of its images.
    """
    rng = stable_rng(seed)
    groups = np.arange(len(labels)) if groups is None else groups
    order = rng.permutation(len(labels))
    members: dict[int, list[int]] = {}
    for index in order.tolist():
        members.setdefault(int(groups[index]), []).append(index)
    waiting: dict[int, list[list[int]]] = {}
    for group in members.values():  # a group with several labels counts for its first label
        waiting.setdefault(int(labels[group[0]]), []).append(group)

    classes = sorted(waiting)
    result = []
    for size in sizes:
        left = np.array([sum(map(len, waiting[c])) for c in classes], dtype=np.int64)
        chosen: list[int] = []
        for label, quota in zip(classes, quotas(left, size).tolist(), strict=True):
            rest = []
            for group in waiting[label]:
                if len(group) <= quota:
                    chosen += group
                    quota -= len(group)
                else:
                    rest.append(group)
            waiting[label] = rest
        result.append(np.sort(np.array(chosen, dtype=np.int64)))
    return result
