"""Settings: the layers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qnn import OptionError
from pytest_qnn.settings import load_settings


def project(folder: Path, table: str) -> Path:
    (folder / "pyproject.toml").write_text(f"[tool.pytest_qnn]\n{table}\n")
    return folder


def test_the_command_line_wins_over_the_ini_file_and_that_over_the_table(tmp_path: Path) -> None:
    project(tmp_path, "soc = 'SM8550'\nrun_timeout = 5\nload_timeout = 7")
    settings = load_settings(tmp_path, {"soc": "SM8750"}, {"soc": "SM8450", "run_timeout": "6"})
    assert (settings.soc, settings.run_timeout, settings.load_timeout) == ("SM8750", 6.0, 7.0)


def test_without_anything_the_defaults_hold(tmp_path: Path) -> None:
    settings = load_settings(tmp_path)
    assert (settings.backends, settings.soc, settings.require) == (("htp",), "SM8650", ())


def test_names_of_socs_are_written_as_the_runtime_spells_them(tmp_path: Path) -> None:
    assert load_settings(project(tmp_path, "soc = 'sm8550'")).soc == "SM8550"


def test_paths_of_the_project_are_relative_to_it(tmp_path: Path) -> None:
    assert load_settings(project(tmp_path, "cache_dir = 'here'")).cache_dir == tmp_path / "here"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("sock = 'SM8550'", "unknown key 'sock'. Did you mean 'soc'?"),
        ("soc = 'SM1'", r"\[tool.pytest_qnn\] soc: unknown SoC 'SM1'"),
        ("backends = ['hpt']", "backends: unknown backend 'hpt'. Did you mean 'htp'?"),
        ("backends = []", "expected backend names"),
        ("run_timeout = -1", "run_timeout: expected a number greater than 0, got -1"),
        ("run_timeout = true", "expected a number greater than 0"),
        ("strict_latency = 'maybe'", "expected true or false, got 'maybe'"),
        ("tolerance = 3", "expected a table, got 3"),
        ("tolerance = [{modle = 'x', steps = 1}]", "unknown key 'modle'. Did you mean 'model'?"),
        ("tolerance = [{model = 'x'}]", "needs at least one of steps"),
        ("tolerance = [{steps = -1}]", "steps must be a number from 0 to inf, got -1"),
        ("latency_budget = [{p95_ms = 'fast'}]", "p95_ms must be a number"),
        ("soc = ", "is not valid TOML"),
    ],
)
def test_mistakes_name_the_layer_and_the_key(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load_settings(project(tmp_path, table))


def test_the_table_is_found_above_pytests_own_ini_file(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml("[tool.pytest_qnn]\nbackends = ['cpu']\n")
    tests = pytester.mkdir("tests")
    (tests / "pytest.ini").write_text("[pytest]\n")
    (tests / "test_it.py").write_text("def test_a(qnn_backend): ...")
    result = pytester.runpytest_inprocess("--collect-only", "-q", tests)
    result.stdout.fnmatch_lines(["*test_it.py::test_a[[]cpu[]]"])


def test_a_table_with_a_hyphen_is_not_ignored(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml("[tool.pytest-qnn]\nsoc = 'SM8550'\n")
    pytester.makepyfile("def test_a(): ...")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*tool.pytest-qnn* is not read: write *tool.pytest_qnn*, with an underscore*"])


def test_a_mistake_in_the_projects_table_stops_pytest_at_once(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml("[tool.pytest_qnn]\nsock = 'SM8550'\n")
    pytester.makepyfile("def test_a(): ...")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: pytest-qnn: *unknown key 'sock'. Did you mean 'soc'?*"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--qnn-soc=SM1", "--qnn-soc: unknown SoC 'SM1'"),
        ("--qnn-require=hpt", "--qnn-require: unknown backend 'hpt'*Write --qnn-require=htp with '='*"),
        ("--qnn-run-timeout=0", "--qnn-run-timeout: expected a number greater than 0"),
        ("--qnn-target=moon", "--qnn-target: unknown target 'moon'"),
    ],
)
def test_a_mistake_on_the_command_line_stops_pytest_at_once(pytester: pytest.Pytester, flag: str, message: str) -> None:
    pytester.makepyfile("def test_a(): ...")
    result = pytester.runpytest_inprocess(flag)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: pytest-qnn: {message}*"])
