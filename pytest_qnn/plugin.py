"""pytest's hooks, each a few lines that hand over. Imports nothing heavy: pytest loads this module in every run."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import _pytest
import pluggy
import pytest

from pytest_qnn.fixtures import (
    begin,
    bench_key,
    close_bench,
    item_key,
    onnx_reference,
    qnn_backend,
    qnn_inputs,
    qnn_target,
)
from pytest_qnn.interface import MARKER_NAMES, MARKERS, SETTINGS, may_have_table, project_folder

if TYPE_CHECKING:
    from pytest_qnn.errors import QnnError
    from pytest_qnn.records.collector import Collector
    from pytest_qnn.settings import Settings

__all__ = ["onnx_reference", "qnn_backend", "qnn_inputs", "qnn_target"]

settings_key: pytest.StashKey[Settings] = pytest.StashKey()
mistakes_key: pytest.StashKey[list[str]] = pytest.StashKey()


def project_settings(config: pytest.Config) -> Settings:
    """The project's settings, read on first use.

    Raises:
        pytest.UsageError: an unknown key or a bad value.
    """
    if settings_key not in config.stash:
        from pytest_qnn.errors import OptionError
        from pytest_qnn.settings import load_settings

        given = {s.name: config.getoption(f"qnn_{s.name}") for s in SETTINGS}
        ini = {s.name: config.getini(f"qnn_{s.name}") for s in SETTINGS if s.ini}
        folder = project_folder(config.inipath.parent if config.inipath else config.rootpath)
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
        elif setting.alone:
            group.addoption(
                flag,
                dest=dest,
                nargs="?",
                const=setting.alone,
                metavar=setting.metavar,
                help=setting.help,
            )
        else:
            group.addoption(flag, dest=dest, metavar=setting.metavar, help=setting.help)
        if setting.ini:
            parser.addini(dest, setting.help, default=None)


def pytest_configure(config: pytest.Config) -> None:
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    config.stash[mistakes_key] = []
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporting(config), "qnn-reporting")
    if any(config.getoption(f"qnn_{s.name}") is not None for s in SETTINGS) or may_have_table(
        project_folder(config.rootpath)
    ):
        project_settings(config)  # a typo must not wait for the first test that would have noticed
    if config.getoption("qnn_record") or config.getoption("qnn_replay"):
        check_tape(config)
    if config.getoption("qnn_artifacts") and not hasattr(config, "workerinput"):
        folder = project_settings(config).artifacts
        if folder is not None and folder.exists() and not folder.is_dir():
            raise pytest.UsageError(f"--qnn-artifacts: {folder} is a file: name a folder")
    if config.getoption("qnn_json") and not hasattr(config, "workerinput") and not config.option.collectonly:
        from pytest_qnn.records.json_file import check_writable

        try:
            check_writable(project_settings(config).json)
        except OSError as error:
            raise pytest.UsageError(f"--qnn-json: {error.filename}: {error.strerror}") from error


def check_tape(config: pytest.Config) -> None:
    """Refuse what can't be recorded or replayed."""
    from pytest_qnn.errors import OptionError
    from pytest_qnn.recording.checks import check_possible

    settings = project_settings(config)
    try:
        if settings.target != "adb":
            raise OptionError(
                f"--qnn-record and --qnn-replay are for devices, and the target is {settings.target}: add --qnn-target=adb"
            )
        check_possible(settings.record, settings.replay, bool(getattr(config.option, "numprocesses", None)))
    except OptionError as error:
        raise pytest.UsageError(f"pytest-qnn: {error}") from error


def pytest_unconfigure(config: pytest.Config) -> None:
    close_bench(config)


# --- collection -------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    definition = metafunc.definition
    uses = "qnn_backend" in metafunc.fixturenames
    if not uses and not any(mark.name in MARKER_NAMES for mark in definition.iter_markers()):
        return
    from pytest_qnn import markers
    from pytest_qnn.errors import OptionError

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
    asks = any(item.iter_markers("backend")) or "qnn_backend" in getattr(item, "fixturenames", ())
    if in_test_case and asks:
        item.config.stash[mistakes_key].append(
            f"{item.nodeid}: a unittest.TestCase can't take fixtures, so marks can't choose its backend: make it a "
            "plain class or function that asks for qnn_backend"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found: list[str] = config.stash[mistakes_key]
    if any("qnn_backend" in getattr(item, "fixturenames", ()) for item in items):
        found += unreachable_marks(config, items)
    mistakes = list(dict.fromkeys(found))
    if mistakes and hasattr(config, "workerinput"):
        # a worker that raises takes xdist down with it: run nothing, and let the controller say why
        config.workeroutput["qnn_mistakes"] = mistakes  # type: ignore[attr-defined]
        items.clear()
    elif mistakes:
        raise pytest.UsageError(*mistake_lines(mistakes))


def unreachable_marks(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Tests whose backend was chosen before all of their marks were there: it would not be the one they name."""
    from pytest_qnn import markers
    from pytest_qnn.errors import OptionError

    mistakes = []
    for item in items:
        if "qnn_backend" not in getattr(item, "fixturenames", ()) or not hasattr(item, "callspec"):
            continue
        if not any(mark.name in ("backend", "device") for mark in item.own_markers):
            continue
        try:
            wanted = markers.backend_requests(item, project_settings(config).backends)
            if item.callspec.params.get("qnn_backend") in wanted:
                continue
            error: object = "its backend or device mark came too late to choose the backend"
        except OptionError as mistake:
            error = mistake
        mistakes.append(
            f"{item.nodeid}: {error}: put such marks on the function, class or module, not on a parameter or in a hook"
        )
    return mistakes


def mistake_lines(mistakes: list[str]) -> list[str]:
    """What is said of mistakes in marks."""
    return [f"pytest-qnn: {mistake}" for mistake in mistakes]


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.config.stash[item_key] = item
    begin(item.config)
    try:
        return (yield)
    finally:
        item.config.stash[item_key] = None
        begin(item.config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.excinfo is None:
        report = yield
    else:
        from pytest_qnn.errors import QnnError, bench_fault

        has_frames = True
        if isinstance(call.excinfo.value, QnnError):
            has_frames = hide_own_frames(call.excinfo.value)
            if has_frames:
                call.excinfo = pytest.ExceptionInfo.from_exception(call.excinfo.value)
        report = yield
        if not has_frames:
            report.longrepr = call.excinfo.exconly()  # from a fixture of ours: there is no line of the test to show
        if bench_fault(call.excinfo.value) is not None:
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


def hide_own_frames(error: QnnError) -> bool:
    """Leave the test's own lines of an error's traceback, since our errors say what happened; whether there are any."""
    hidden = tuple(os.path.dirname(m.__file__ or "") + os.sep for m in (sys.modules[__package__], pluggy, _pytest))
    frames, kept = [], None
    current = error.__traceback__
    while current is not None:
        frames.append(current)
        current = current.tb_next
    for frame in reversed(frames):
        if not frame.tb_frame.f_code.co_filename.startswith(hidden):
            kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    if kept is not None:
        error.__traceback__ = kept
    error.__cause__, error.__suppress_context__ = None, True
    return kept is not None


# --- reporting --------------------------------------------------------------------------------------------------------


def outcome_of(report: pytest.TestReport) -> str:
    """A test's outcome as pytest counts it; empty for a phase that isn't counted."""
    if report.passed:
        counted = report.when == "call"
        return ("xpassed" if hasattr(report, "wasxfail") else "passed") if counted else ""
    if report.skipped:
        return "xfailed" if hasattr(report, "wasxfail") else "skipped"
    return "failed" if report.when == "call" and not getattr(report, "qnn_bench_fault", False) else "error"


class Reporting:
    """What the process that talks to the user does with records: the controller of xdist, or the only process."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.collector: Collector | None = None
        self.mistakes: list[str] = []  # of workers
        self.outcomes: dict[str, int] = {}
        self.json_note = ""
        self.trouble = ""  # what was only noticed when all tests were over

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.mistakes += getattr(node, "workeroutput", {}).get("qnn_mistakes", [])

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.mistakes:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        if self.config.getoption("qnn_json") and not self.config.option.collectonly:
            self._write_json(session)

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
        if self.config.getoption("qnn_json"):
            outcome = outcome_of(report)
            self.outcomes |= {outcome: self.outcomes.get(outcome, 0) + 1} if outcome else {}
        if not hasattr(report, "qnn_records"):
            return
        from pytest_qnn.records import json_file
        from pytest_qnn.records.collector import Collector

        self.collector = self.collector or Collector()
        fresh = [*self.collector.add(report), *getattr(report, "qnn_errors", [])]
        file = project_settings(self.config).json
        if fresh and file:
            json_file.append(file, fresh)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in mistake_lines(list(dict.fromkeys(self.mistakes))):
            terminalreporter.write_line(f"ERROR: {line}", red=True)
        if self.collector is not None:
            from pytest_qnn.records.terminal import write_summary

            write_summary(terminalreporter, self.collector)
        if self.trouble:
            terminalreporter.write_line(f"ERROR: {self.trouble}", red=True)
        if self.json_note:
            terminalreporter.write_line(self.json_note)

    def _write_json(self, session: pytest.Session) -> None:
        from pytest_qnn.records import json_file
        from pytest_qnn.records.collector import Collector

        file = project_settings(self.config).json
        assert file is not None
        try:
            json_file.write(file, self.collector or Collector(), int(session.exitstatus), self.outcomes)
        except OSError as error:
            partial = json_file.partial_file(file)
            rest = f"; the records are in {partial}" if partial.exists() else ""
            self.json_note = f"ERROR: --qnn-json {file} could not be written ({error.strerror}){rest}"
            session.exitstatus = session.exitstatus or pytest.ExitCode.INTERNAL_ERROR
        else:
            self.json_note = f"QNN records: {file}"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    trouble, reporting = close_bench(session.config), session.config.pluginmanager.get_plugin("qnn-reporting")
    if trouble and reporting is not None:
        reporting.trouble = trouble
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
