"""pytest's hooks, each a few lines that hand over. Imports nothing heavy: pytest loads this module in every run."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qnn import markers
from pytest_qnn.errors import OptionError, QnnError, bench_fault
from pytest_qnn.fixtures import (
    bench_key,
    close_bench,
    onnx_reference,
    open_bench,
    qnn_backend,
    qnn_inputs,
    qnn_target,
)
from pytest_qnn.settings import SETTINGS, Settings, load_settings, project_keys

if TYPE_CHECKING:
    from pytest_qnn.records.collector import Collector

__all__ = ["onnx_reference", "qnn_backend", "qnn_inputs", "qnn_target"]

OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
settings_key = pytest.StashKey[Settings]()
mistakes_key = pytest.StashKey[list[str]]()


def project_settings(config: pytest.Config) -> Settings:
    """The project's settings, read on first use.

    Raises:
        pytest.UsageError: an unknown key or a bad value.
    """
    if settings_key not in config.stash:
        given = {s.name: config.getoption(f"qnn_{s.name}") for s in SETTINGS}
        ini = {s.name: config.getini(f"qnn_{s.name}") for s in SETTINGS if s.ini}
        folder = config.inipath.parent if config.inipath else config.rootpath
        try:
            config.stash[settings_key] = load_settings(folder, given, ini)
        except OptionError as error:
            raise pytest.UsageError(f"pytest-qnn: {error}") from error
    return config.stash[settings_key]


# --- configuration ----------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qnn", "validation on Qualcomm's QNN backends")
    for setting in SETTINGS:
        flag = f"--qnn-{setting.name.replace('_', '-')}"
        dest = f"qnn_{setting.name}"
        if setting.flag:
            group.addoption(flag, dest=dest, action="store_true", default=None, help=setting.help)
        elif setting.optional_value:
            group.addoption(
                flag,
                dest=dest,
                nargs="?",
                const=setting.optional_value,
                metavar=setting.metavar,
                help=setting.help,
            )
        else:
            group.addoption(flag, dest=dest, metavar=setting.metavar, help=setting.help)
        if setting.ini:
            parser.addini(dest, setting.help, default=None)


def pytest_configure(config: pytest.Config) -> None:
    for line in markers.MARKERS:
        config.addinivalue_line("markers", line)
    config.stash[mistakes_key] = []
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporting(config), "qnn-reporting")
    if any(config.getoption(f"qnn_{s.name}") is not None for s in SETTINGS) or project_keys(config.rootpath):
        project_settings(config)  # a typo must not wait for the first test that would have noticed
    if config.getoption("qnn_json") and not hasattr(config, "workerinput"):
        from pytest_qnn.records.json_file import check_writable

        try:
            check_writable(project_settings(config).json)
        except OSError as error:
            raise pytest.UsageError(f"--qnn-json: {error.filename}: {error.strerror}") from error


def pytest_unconfigure(config: pytest.Config) -> None:
    close_bench(config)


# --- collection -------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    definition = metafunc.definition
    uses = "qnn_backend" in metafunc.fixturenames
    if not uses and not any(mark.name in markers.NAMES for mark in definition.iter_markers()):
        return
    try:
        markers.check_names(definition)
        requests = markers.backend_requests(definition, project_settings(metafunc.config).backends)
        markers.check_value_marks(definition)
        if not uses and any(mark.name == "backend" for mark in definition.own_markers):
            raise OptionError(
                "marked backend(...) but never asks for the qnn_backend fixture, itself or through another fixture: "
                "nothing would run on that backend"
            )
    except OptionError as error:
        metafunc.config.stash[mistakes_key].append(f"{definition.nodeid}: {error}")
        return
    if uses:
        metafunc.parametrize("qnn_backend", requests, ids=markers.request_ids(requests), indirect=True, scope="session")


def pytest_itemcollected(item: pytest.Item) -> None:
    in_test_case = isinstance(item, pytest.Function) and getattr(item.cls, "setUpClass", None) is not None
    if in_test_case and any(item.iter_markers("backend")):
        item.config.stash[mistakes_key].append(
            f"{item.nodeid}: a unittest.TestCase can't take fixtures, so the backend mark would do nothing: make it a "
            "plain class or function that asks for qnn_backend"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found: list[str] = config.stash[mistakes_key]
    mistakes = list(dict.fromkeys(found))
    if mistakes and hasattr(config, "workerinput"):
        # a worker that raises takes xdist down with it: run nothing, and let the controller say why
        config.workeroutput["qnn_mistakes"] = mistakes  # type: ignore[attr-defined]
        items.clear()
    elif mistakes:
        raise pytest.UsageError(*mistake_lines(mistakes))


def mistake_lines(mistakes: list[str]) -> list[str]:
    """What is said of mistakes in marks."""
    return [f"pytest-qnn: {mistake}" for mistake in mistakes]


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if "qnn_backend" in getattr(item, "fixturenames", ()):
        from pytest_qnn.records.collector import begin_test

        begin_test(item, open_bench(item.config))
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.excinfo is not None:
        show_the_users_frames(call.excinfo)
    report = yield
    if call.excinfo is not None and bench_fault(call.excinfo.value) is not None:
        # an error, not a failure, whatever phase it came from; and no xfail may turn it into a pass
        report.outcome = "failed"
        report.qnn_bench_fault = True  # type: ignore[attr-defined]
        if hasattr(report, "wasxfail"):
            del report.wasxfail
            report.longrepr = item.repr_failure(call.excinfo)
    if bench_key in item.config.stash:
        from pytest_qnn.records.collector import attach_records

        attach_records(item, call, report)
    return report


def show_the_users_frames(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Our errors say what happened: the traceback needs the lines of the test, not those of this package."""
    if not isinstance(excinfo.value, QnnError):
        return
    own = os.path.dirname(__file__)
    theirs = excinfo.traceback.filter(lambda entry: not str(entry.path).startswith(own))
    if theirs:
        excinfo.traceback = theirs
    excinfo.value.__cause__, excinfo.value.__suppress_context__ = None, True


# --- reporting --------------------------------------------------------------------------------------------------------


class Reporting:
    """What the process that talks to the user does with records: the controller of xdist, or the only process."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.collector: Collector | None = None
        self.mistakes: list[str] = []  # of workers

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.mistakes += getattr(node, "workeroutput", {}).get("qnn_mistakes", [])

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.mistakes:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None, None, None]:
        self._collect(report)
        if report.when != "call" or not getattr(report, "qnn_bench_fault", False):
            return (yield)
        # whoever counts errors and failures (the terminal, JUnit XML and others) tells them apart by the phase
        report.when = "setup"
        try:
            return (yield)
        finally:
            report.when = "call"

    def _collect(self, report: pytest.TestReport) -> None:
        if not hasattr(report, "qnn_records"):
            return
        from pytest_qnn.records import json_file
        from pytest_qnn.records.collector import Collector

        self.collector = self.collector or Collector()
        fresh = self.collector.add(report)
        file = project_settings(self.config).json
        if fresh and file:
            json_file.append(file, fresh)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
        for line in mistake_lines(list(dict.fromkeys(self.mistakes))):
            terminalreporter.write_line(f"ERROR: {line}", red=True)
        if self.collector is not None:
            from pytest_qnn.records.terminal import write_summary

            write_summary(terminalreporter, self.collector)
        if file := self.config.getoption("qnn_json"):
            self._write_json(terminalreporter, str(file), exitstatus)

    def _write_json(self, terminalreporter: pytest.TerminalReporter, name: str, exitstatus: int) -> None:
        from pytest_qnn.records import json_file
        from pytest_qnn.records.collector import Collector

        file = project_settings(self.config).json
        assert file is not None
        try:
            outcomes = {name: len(reports) for name, reports in terminalreporter.stats.items() if name in OUTCOMES}
            json_file.write(file, self.collector or Collector(), int(exitstatus), outcomes)
        except OSError as error:
            terminalreporter.write_line(
                f"ERROR: --qnn-json {name} could not be written ({error.strerror}); the records are in "
                f"{json_file.partial_file(file)}",
                red=True,
            )
        else:
            terminalreporter.write_line(f"QNN records: {name}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    close_bench(session.config)
