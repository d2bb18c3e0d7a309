"""Configure the test suite: fixed random numbers and generated examples, few threads, and skipped GPU tests.

The plugins in this file print the errors and other values of the tests at the end of the output. In a run of the GPU
tests, a plugin also prints each failure at once.
"""

from __future__ import annotations

import collections
import os
import re
import statistics
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import setuptools  # noqa: F401  # must come before any import of distutils, because inductor needs setuptools' version
import torch

from efft_kernels import _calls, testing

# Compilation in the tests must not start a pool with one process per core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# The examples depend only on the test, so a failure occurs on every machine. There is no deadline, because the time of
# an example varies on a busy machine.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=40)
hypothesis.settings.load_profile("fixed")
# A longer run of the fuzzers, started by hand: pytest --hypothesis-profile=long tests/efft -k fuzz
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)


@pytest.fixture(autouse=True)
def _no_remembered_calls() -> None:
    """Forget the backends that earlier tests chose, because a test may replace values on which the choice depends."""
    _calls.choices.clear()


class FailuresAtOnce:
    """Report each failure immediately, because a run on a GPU may be stopped before its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._plugins.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.write_line(f"\n{report.nodeid}\n{report.longreprtext}")


class Budgets:
    """Report the errors of results at the end of a run, for each dtype.

    Each error is divided by the larger of two errors: the error of the plain formula in the same dtype, and the error
    of rounding the exact result to this dtype (see :func:`efft_kernels.testing.errors`).
    """

    def __init__(self) -> None:
        self._ratios: dict[torch.dtype, list[float]] = collections.defaultdict(list)
        measure = testing.errors

        def noted(got: torch.Tensor, *references: torch.Tensor) -> tuple[float, float, float]:
            error, peer, rounding = measure(got, *references)
            if 0 < error <= 4 * max(peer, rounding):  # larger errors belong to tests that fail or expect a failure
                self._ratios[got.dtype].append(error / max(peer, rounding))
            return error, peer, rounding

        testing.errors = noted

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist sends its ratios to the main process
            session.config.workeroutput["budgets"] = {str(dtype): ratios for dtype, ratios in self._ratios.items()}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        for dtype, ratios in getattr(node, "workeroutput", {}).get("budgets", {}).items():
            self._ratios[getattr(torch, dtype.removeprefix("torch."))].extend(ratios)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for dtype, ratios in self._ratios.items():
            terminalreporter.write_line(
                f"{str(dtype).removeprefix('torch.')}: {len(ratios)} results compared with fp64, "
                f"error at most {max(ratios):.2f} times that of the plain formula, "
                f"median {statistics.median(ratios):.2f}"
            )


class Shows:
    """Print two kinds of records at the end of a run.

    These are the tables of values that tests recorded with the fixture ``show``, and the number of inputs that the
    fuzzers generated.
    """

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        tables: dict[str, dict[str, dict[str, str]]] = {}
        for report in terminalreporter.getreports("passed"):
            for noted, cell in report.user_properties:
                if noted == "show":
                    table, row, column, value = cell
                    tables.setdefault(table, {}).setdefault(row, {})[column] = value
        for table, rows in tables.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            lines = [[table, *columns], *([name, *(row.get(c, "-") for c in columns)] for name, row in rows.items())]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            terminalreporter.write_line("")
            for line in lines:
                cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
                terminalreporter.write_line("  ".join(cells).rstrip())
            terminalreporter.write_line(f"({len(rows)} rows)")
        found = {
            report.nodeid: sum(map(int, re.findall(r"(\d+) passing", getattr(report, "_hypothesis_stats", ""))))
            for report in terminalreporter.getreports("")
            if "fuzz" in report.nodeid and report.when == "teardown"
        }
        if found:
            terminalreporter.write_line(f"\n{len(found)} fuzzers made {sum(found.values()):,} inputs")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budgets())
    config.pluginmanager.register(Shows())
    if config.getoption("markexpr") == "gpu":
        config.pluginmanager.register(FailuresAtOnce(config))
    # The matrices in the tests are small. More threads would only wait for one another and for other processes.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def show(record_property: Callable[[str, object], None]) -> Callable[[str, str, str, object], None]:
    """Return a function (table, row, column, value) that records a value for the tables at the end of the run."""

    def note(table: str, row: str, column: str, value: object) -> None:
        text = f"{value:.1e}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        record_property("show", [table, row, column, text])

    return note
