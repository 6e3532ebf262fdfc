"""The markers at collection: what they parametrise, how they combine, and what they refuse."""

from __future__ import annotations

import pytest


def collected(pytester: pytest.Pytester, *arguments: str) -> list[str]:
    result = pytester.runpytest_inprocess("--collect-only", "-q", *arguments)
    return [line for line in result.outlines if "::" in line]


def test_each_backend_named_gives_a_test_with_its_id(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.backend("htp", "cpu")
        def test_accuracy(qnn_backend): ...
        """
    )
    assert collected(pytester) == [
        "test_each_backend_named_gives_a_test_with_its_id.py::test_accuracy[htp]",
        "test_each_backend_named_gives_a_test_with_its_id.py::test_accuracy[cpu]",
    ]


def names(pytester: pytest.Pytester, text: str, *arguments: str) -> list[str]:
    pytester.makepyfile(test_it="import pytest\nmark = pytest.mark\n" + text)
    return [line.partition("::")[2] for line in collected(pytester, *arguments)]


def test_without_a_mark_the_ini_value_decides(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nqnn_backends = cpu htp\n")
    assert names(pytester, "def test_a(qnn_backend): ...") == ["test_a[cpu]", "test_a[htp]"]


def test_without_mark_and_ini_value_it_is_htp(pytester: pytest.Pytester) -> None:
    assert names(pytester, "def test_a(qnn_backend): ...") == ["test_a[htp]"]


def test_the_project_table_is_read_where_the_ini_file_says_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml("[tool.pytest_qnn]\nbackends = ['cpu']\n")
    assert names(pytester, "def test_a(qnn_backend): ...") == ["test_a[cpu]"]


def test_a_mark_reaches_tests_through_their_fixtures(pytester: pytest.Pytester) -> None:
    text = """
@pytest.fixture(scope="module")
def classifier(qnn_backend): ...
@mark.backend("htp", "cpu")
def test_a(classifier): ...
"""
    assert names(pytester, text) == ["test_a[htp]", "test_a[cpu]"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('pytestmark = mark.backend("cpu")\ndef test_a(qnn_backend): ...', ["test_a[cpu]"]),
        (
            'pytestmark = mark.backend("cpu")\n@mark.backend("htp")\ndef test_a(qnn_backend): ...\n'
            "def test_b(qnn_backend): ...",
            ["test_a[htp]", "test_b[cpu]"],
        ),
        (
            '@mark.backend("htp", "cpu")\nclass TestA:\n  def test_a(self, qnn_backend): ...\n'
            '  @mark.backend("gpu")\n  def test_b(self, qnn_backend): ...',
            ["TestA::test_a[htp]", "TestA::test_a[cpu]", "TestA::test_b[gpu]"],
        ),
        (
            'pytestmark = mark.backend("cpu")\ndef test_a(qnn_backend): ...\ndef test_plain(): ...',
            ["test_a[cpu]", "test_plain"],
        ),
        (
            '@mark.backend("htp", "cpu")\n@mark.parametrize("n", [1, 2])\ndef test_a(qnn_backend, n): ...',
            ["test_a[htp-1]", "test_a[htp-2]", "test_a[cpu-1]", "test_a[cpu-2]"],
        ),
    ],
    ids=["module", "function over module", "function over class", "unused by a plain test", "with parametrize"],
)
def test_the_nearest_mark_wins(pytester: pytest.Pytester, text: str, expected: list[str]) -> None:
    assert sorted(names(pytester, text)) == sorted(expected)


def test_marks_on_one_function_add_up_and_differences_show_in_the_id(pytester: pytest.Pytester) -> None:
    text = """
@mark.backend("htp", soc="SM8550")
@mark.backend("htp", soc="SM8650")
def test_a(qnn_backend): ...
"""
    assert sorted(names(pytester, text)) == ["test_a[htp-SM8550]", "test_a[htp-SM8650]"]


def test_a_mark_without_names_adds_options(pytester: pytest.Pytester) -> None:
    text = """
@mark.backend(soc="SM8550", htp_performance_mode="burst")
@mark.backend("htp", "cpu")
class TestA:
    def test_a(self, qnn_backend): ...
"""
    assert names(pytester, text) == ["TestA::test_a[htp]", "TestA::test_a[cpu]"]


def test_k_selects_by_backend(pytester: pytest.Pytester) -> None:
    text = '@mark.backend("htp", "cpu")\ndef test_a(qnn_backend): ...'
    assert names(pytester, text, "-k", "cpu") == ["test_a[cpu]"]


MISTAKES = {
    "unknown backend": ('@mark.backend("hpt")', "unknown backend 'hpt'. Did you mean 'htp'?"),
    "misspelt mark": ("@mark.tolerence(steps=2)", "unknown mark 'tolerence': did you mean 'tolerance'?"),
    "another misspelt mark": ('@mark.backends("htp")', "unknown mark 'backends': did you mean 'backend'?"),
    "mark without anything": ("@mark.backend", "backend needs names such as 'htp', or options"),
    "wrong case": ('@mark.backend("HTP")', "unknown backend 'HTP'. Did you mean 'htp'?"),
    "backend not a name": ("@mark.backend(3)", "backend takes names such as 'htp'"),
    "unknown option": ('@mark.backend("htp", vtcm_mbb=2)', "unknown option 'vtcm_mbb'. Did you mean 'vtcm_mb'?"),
    "bad value": ('@mark.backend("htp", htp_performance_mode="fast")', "option htp_performance_mode: unknown value"),
    "bad number": ('@mark.backend("htp", vtcm_mb=-5)', "option vtcm_mb: expected a whole number from 0 to 64"),
    "float16 can't be turned off": (
        '@mark.backend("htp", enable_htp_fp16_precision=0)',
        "computes a float model in float16 whatever",
    ),
    "unknown SoC": ('@mark.backend("htp", soc="SM9999")', "unknown SoC 'SM9999'"),
    "unknown SoC of a device": ('@mark.device(soc="SM8651")', "unknown SoC 'SM8651'. Did you mean"),
    "unknown key of device": ('@mark.device(sox="SM8650")', "device: unknown argument 'sox'. Did you mean 'soc'?"),
    "unknown kind": ('@mark.device(kind="phone")', "device: unknown kind 'phone'"),
    "contradiction": (
        '@mark.backend("htp", soc="SM8550")\n@mark.device(soc="SM8650")',
        "backend asks for soc SM8550, device for SM8650",
    ),
    "SoC without that arch": ('@mark.device(soc="SM8650", htp_arch=73)', "soc SM8650 has htp_arch v75, not 73"),
    "unknown tolerance": ("@mark.tolerance(step=2)", "tolerance: unknown argument 'step'. Did you mean 'steps'?"),
    "senseless tolerance": ("@mark.tolerance(cosine=1.5)", "tolerance: cosine must be a number from -1 to 1, got 1.5"),
    "empty tolerance": ("@mark.tolerance()", "tolerance: needs at least one of steps"),
    "positional tolerance": ("@mark.tolerance(2)", "tolerance takes keyword arguments only"),
    "unknown budget": ("@mark.latency_budget(p90_ms=2)", "latency_budget: unknown argument 'p90_ms'"),
    "zero budget": ("@mark.latency_budget(p95_ms=0)", "latency_budget: p95_ms must be greater than 0"),
}


@pytest.mark.parametrize(("mark", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_mark_is_a_usage_error_that_names_the_test(
    pytester: pytest.Pytester, mark: str, message: str
) -> None:
    pytester.makepyfile(test_it=f"import pytest\nmark = pytest.mark\n{mark}\ndef test_a(qnn_backend): ...")
    result = pytester.runpytest_inprocess("--collect-only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: pytest-qnn: test_it.py::test_a: *{message.replace('[', '[[]')}*"])


def test_all_mistakes_are_told_at_once(pytester: pytest.Pytester) -> None:
    text = '@mark.backend("a")\ndef test_a(qnn_backend): ...\n@mark.backend("b")\ndef test_b(qnn_backend): ...'
    pytester.makepyfile(test_it=f"import pytest\nmark = pytest.mark\n{text}")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_a*unknown backend 'a'*", "*test_b*unknown backend 'b'*"])


def test_mistakes_stop_a_distributed_run_too(pytester: pytest.Pytester) -> None:
    pytester.makepyfile('import pytest\n@pytest.mark.backend("hpt")\ndef test_a(qnn_backend): ...')
    result = pytester.runpytest_subprocess("-n2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stdout.str().count("test_a: unknown backend 'hpt'. Did you mean 'htp'?") == 1
    assert "INTERNALERROR" not in result.stdout.str()


def test_a_marked_test_that_never_asks_for_the_backend_is_a_mistake(pytester: pytest.Pytester) -> None:
    pytester.makepyfile('import pytest\n@pytest.mark.backend("htp")\ndef test_a(): ...')
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_a: marked backend(...) but never asks for the qnn_backend fixture*"])


@pytest.mark.parametrize("level", ["class", "method"])
def test_a_unittest_case_is_told_that_it_cannot_take_fixtures(pytester: pytest.Pytester, level: str) -> None:
    mark = '@pytest.mark.backend("htp")'
    on_class, on_method = (mark, "") if level == "class" else ("", mark)
    pytester.makepyfile(
        test_it=f"import unittest, pytest\n{on_class}\nclass TestA(unittest.TestCase):\n    {on_method}\n    def test_a(self): ..."
    )
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*TestA::test_a: a unittest.TestCase can't take fixtures*"])


def test_a_unittest_case_that_gets_the_backend_by_an_autouse_fixture_is_told_too(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import unittest, pytest\n@pytest.fixture(autouse=True)\ndef model(qnn_backend): ...\n"
        "class TestA(unittest.TestCase):\n    @unittest.expectedFailure\n    def test_a(self): ..."
    )
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*TestA::test_a: a unittest.TestCase can't take fixtures*"])


def test_markers_are_registered(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--markers")
    result.stdout.fnmatch_lines(
        [f"@pytest.mark.{name}(*" for name in ("backend", "device", "tolerance", "latency_budget")]
    )
