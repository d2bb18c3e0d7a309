"""Test how images are divided into splits: sizes, class proportions, seeds, and copies of images."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efft_lab.data.splits import distinct, duplicate_groups, file_keys, pixel_keys, quotas, stratified_split

LABELS = np.repeat([0, 1, 2], [600, 300, 100])


def test_sizes_disjointness_and_class_proportions() -> None:
    train, val, test = stratified_split(LABELS, [400, 100, 200], seed=3)
    assert [len(train), len(val), len(test)] == [400, 100, 200]
    assert len({*train, *val, *test}) == 700
    assert np.bincount(LABELS[train]).tolist() == [240, 120, 40]
    assert np.bincount(LABELS[val]).tolist() == [60, 30, 10]
    assert np.bincount(LABELS[test]).tolist() == [120, 60, 20]


def test_the_seed_decides() -> None:
    first, again, other = (stratified_split(LABELS, [100], seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_same_split_in_another_process_and_for_ever() -> None:
    code = (
        "import numpy as np; from efft_lab.data.splits import stratified_split as split;"
        "print(split(np.arange(30) % 3, [6], seed=5)[0].tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[1, 3, 17, 19, 20, 27]"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=60),
    st.floats(0, 0.6),
    st.integers(0, 9),
)
def test_copies_are_never_divided(images: list[tuple[int, int]], share: float, seed: int) -> None:
    labels, groups = (np.array(column) for column in zip(*images, strict=True))
    size = int(share * len(labels))
    first, second = stratified_split(labels, [size, (len(labels) - size) // 2], seed, groups)
    assert not set(first) & set(second)
    assert len(first) <= size
    for chosen in (first, second):
        # All members of a chosen group are chosen.
        assert set(np.flatnonzero(np.isin(groups, groups[chosen]))) == set(chosen)


def test_planted_copies_still_fill_the_sizes() -> None:
    labels = np.tile([0, 1], 60)
    groups = np.arange(120)
    groups[[0, 2, 4]] = 0  # three copies
    groups[[1, 119]] = 1
    for seed in range(20):
        train, val = stratified_split(labels, [60, 30], seed, groups)
        assert (len(train), len(val)) == (60, 30)
        for copies in ({0, 2, 4}, {1, 119}):
            assert any(copies <= part for part in (set(train), set(val), set(range(120)) - {*train, *val}))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.data())
def test_quotas_add_up_and_reach_every_class(sizes: list[int], data) -> None:
    class_sizes = np.array(sizes)
    total = data.draw(st.integers(0, sum(sizes)))
    shares = quotas(class_sizes, total)
    assert shares.sum() == total
    assert (shares >= 0).all()
    assert (shares <= class_sizes).all()
    if total >= np.count_nonzero(class_sizes):
        assert (shares[class_sizes > 0] > 0).all()


def test_too_many_images_asked_for() -> None:
    with pytest.raises(ValueError, match="cannot draw 1001 images from 1000"):
        stratified_split(LABELS, [1001], seed=0)


def test_distinct_keeps_one_copy_and_drops_contradictions() -> None:
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1)[[0, 1, 0, 2, 3, 3]]
    keys = pixel_keys(images)
    assert duplicate_groups(keys).tolist() == [0, 1, 0, 2, 3, 3]
    assert distinct(keys, np.array([0, 0, 0, 1, 1, 0])).tolist() == [0, 1, 3]


def test_file_keys_compare_contents(tmp_path) -> None:
    contents = [b"aa", b"ab", b"aa", b"abc"]
    paths = [tmp_path / str(number) for number in range(4)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert duplicate_groups(file_keys(paths)).tolist() == [0, 1, 0, 2]
