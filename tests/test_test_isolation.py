"""What one test says must not reach the next, and what it says must reach the backend."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Project = Callable[..., pytest.RunResult]

HELD = """
import numpy as np
HOLD = {}
def zeros(s, qnn_inputs):
    r = s.run(qnn_inputs(s))
    return Run(s, r.samples, tuple({"y": np.zeros_like(o["y"])} for o in r.results), True, r.seconds)
"""


def test_marks_of_one_test_do_not_reach_the_next(pytester: pytest.Pytester, project: Project) -> None:
    text = HELD + (
        """
@pytest.mark.tolerance(absolute=1e9)
def test_a(qnn_backend, qnn_inputs):
    HOLD["s"] = qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx")
    assert_matches_reference(zeros(HOLD["s"], qnn_inputs))
def test_b(request, qnn_inputs):
    s = request.getfixturevalue("qnn_backend").load("conv.qdq.onnx", float_model="conv.onnx")
    assert_matches_reference(zeros(s, qnn_inputs))
@pytest.mark.tolerance(sqnr_db=300)
def test_c(qnn_inputs):
    assert_matches_reference(zeros(HOLD["s"], qnn_inputs))
"""
    )
    result = project(text, "--qnn-json=out.json")
    result.assert_outcomes(passed=1, failed=2)
    records = json.loads((pytester.path / "out.json").read_text())["records"]
    assert [r["outputs"][0]["limits_from"] for r in records] == ["marker", "derived", "marker"]
    assert [r["test"].rpartition("::")[2] for r in records] == ["test_a[htp]", "test_b", "test_c"]


LATE = {
    "on a parameter": '@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.backend("cpu"))])\ndef test_a(qnn_backend, n): ...',
    "a device on a parameter": '@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.device(soc="SM8350"))])\n'
    "def test_a(qnn_backend, n): ...",
    "nonsense on a parameter": '@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.backend("cpuu"))])\n'
    "def test_a(qnn_backend, n): ...",
}


@pytest.mark.parametrize("text", LATE.values(), ids=LATE.keys())
def test_a_mark_that_comes_too_late_to_choose_the_backend_is_a_mistake(project: Project, text: str) -> None:
    result = project(text)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: pytest-qnn: test_it.py::test_a*: put such marks on the function, class or module*"]
    )


def test_a_mark_that_a_hook_adds_is_a_mistake(pytester: pytest.Pytester, project: Project) -> None:
    pytester.makeconftest(
        "import pytest\ndef pytest_itemcollected(item):\n    item.add_marker(pytest.mark.backend('cpu'))\n"
    )
    assert project("def test_a(qnn_backend): ...").ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize("mark", ['pytest.mark.backend("cpu")', 'pytest.mark.device(soc="SM8350")'])
def test_a_backend_that_cannot_follow_the_marks_loads_nothing(project: Project, mark: str) -> None:
    text = f"""
@{mark}
class TestA:
    def test_a(self, request):
        request.getfixturevalue("qnn_backend").load("conv.onnx")
"""
    result = project(text)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *UsageError: *TestA::test_a: its marks ask for *Name qnn_backend among the test's arguments"]
    )


def test_load_cannot_ask_for_another_soc_than_the_device_mark(project: Project) -> None:
    text = (
        '@pytest.mark.device(soc="SM8350")\ndef test_a(qnn_backend):\n    qnn_backend.load("conv.onnx", soc="SM8550")'
    )
    result = project(text)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *OptionError: soc='SM8550' contradicts the test's device mark*SM8350"])


def test_an_infrastructure_error_inside_another_error_is_still_one(project: Project) -> None:
    text = """
def fail(qnn_backend):
    raise TargetTimeoutError("too late")
@pytest.mark.xfail(strict=True)
def test_from(qnn_backend):
    try:
        fail(qnn_backend)
    except TargetError as error:
        raise AssertionError("wrapped") from error
@pytest.mark.xfail(strict=True)
def test_while(qnn_backend):
    try:
        fail(qnn_backend)
    except TargetError:
        assert 0
@pytest.mark.xfail(strict=True)
def test_group(qnn_backend):
    raise ExceptionGroup("several", [ValueError(), TargetTimeoutError("too late")])
def test_fresh(qnn_backend):
    assert 0
"""
    result = project(text, "--qnn-json=out.json")
    result.assert_outcomes(errors=3, failed=1)
    result.stdout.fnmatch_lines(["*ERROR at call of test_from*", "3 infrastructure errors: nothing was judged there"])


def test_no_temporary_folder_is_an_infrastructure_error(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
import tempfile
@pytest.mark.xfail(strict=True)
def test_a(qnn_backend, monkeypatch):
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    qnn_backend.load("conv.onnx")
"""
    result = project(text)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E *TargetError: no temporary folder can be made: No space left on device*"])


def test_an_older_json_report_does_not_outlive_a_killed_run(pytester: pytest.Pytester, project: Project) -> None:
    project("def test_a(): ...", "--qnn-json=out.json")
    assert (pytester.path / "out.json").exists()
    project("def test_a():\n    import os\n    os.kill(os.getpid(), 9)", "--qnn-json=out.json")
    assert not (pytester.path / "out.json").exists()


def test_the_json_report_needs_no_terminal_and_keeps_its_folder(pytester: pytest.Pytester, project: Project) -> None:
    (pytester.path / "elsewhere").mkdir()
    project("import os\ndef test_a():\n    os.chdir('elsewhere')", "--qnn-json=out.json", "-p", "no:terminal")
    assert json.loads((pytester.path / "out.json").read_text())["run"]["outcomes"] == {"passed": 1}
    assert not list((pytester.path / "elsewhere").iterdir())
    project("", "--qnn-json=out.json", "--collect-only")
    assert (pytester.path / "out.json").exists(), "collecting runs nothing, so it reports nothing"


def test_a_json_report_that_cannot_be_written_at_the_end_fails_the_run(
    pytester: pytest.Pytester, project: Project
) -> None:
    result = project(
        "import shutil\ndef test_a():\n    shutil.rmtree('reports')\n    open('reports', 'w').close()",
        "--qnn-json=reports/out.json",
    )
    assert result.ret == pytest.ExitCode.INTERNAL_ERROR
    result.stdout.fnmatch_lines(["ERROR: --qnn-json *reports/out.json could not be written (Not a directory)"])


def test_an_infrastructure_error_that_a_test_keeps_to_itself_is_shown(
    pytester: pytest.Pytester, project: Project
) -> None:
    from tests import small_models

    small_models.crashes_while_compiling(pytester.path / "stft.onnx")
    text = """
def test_a(qnn_backend):
    with pytest.raises(Exception):
        qnn_backend.load("stft.onnx")
"""
    result = project(text, "--qnn-json=out.json")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["infrastructure error that its test kept to itself: test_it.py::test_a*SIGSEGV*"])
    (error,) = json.loads((pytester.path / "out.json").read_text())["errors"]
    assert (error["swallowed"], error["type"]) == (True, "RuntimeCrashError")
