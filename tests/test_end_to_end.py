"""The main job through the front door: a quantised model on the HTP simulator and on QNN's CPU backend, judged."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from pytest_qnn.backend import Backend
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.records.record import schema

Project = Callable[..., pytest.RunResult]

CLASSIFIER = """
@pytest.fixture(scope="module")
def classifier(qnn_backend):
    return qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx")
"""
GOOD = (
    CLASSIFIER
    + """
@pytest.mark.backend("htp", "cpu")
def test_accuracy(classifier, qnn_inputs):
    run = classifier.run(qnn_inputs(classifier))
    verdict = assert_matches_reference(run)
    assert verdict.ok and verdict.samples == 4
    placement = assert_fully_offloaded(classifier)
    assert placement.backend > 0

@pytest.mark.latency_budget(p95_ms=1000)
def test_latency(classifier, qnn_inputs):
    verdict = assert_latency(classifier.measure(qnn_inputs(classifier)[0], max_seconds=1))
    assert verdict.outcome == "not judged"
"""
)


def report(pytester: pytest.Pytester, name: str = "out.json") -> dict[str, list[dict[str, object]]]:
    """The JSON report, checked against its published schema."""
    content = json.loads((pytester.path / name).read_text())
    jsonschema.validate(content, schema())
    return content


def test_a_good_model_passes_on_both_backends(pytester: pytest.Pytester, project: Project, cpu_library: Path) -> None:
    result = project(GOOD, f"--qnn-cpu-library={cpu_library}", "--qnn-json=out.json", "--junitxml=out.xml", "-v")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        [
            "*::test_accuracy[[]htp[]] PASSED*",
            "*::test_accuracy[[]cpu[]] PASSED*",
            "model *backend *SoC *in *worst output *SQNR dB *steps *p95 ms *verdict *test",
            "conv.qdq.onnx *htp[*]* SM8650 *A8W8 *y * pass *test_it.py::test_accuracy*",
            "conv.qdq.onnx *htp[*]* SM8650 *A8W8 * not judged *test_latency*",
            "conv.qdq.onnx *cpu~ * float32 *y * pass *test_it.py::test_accuracy*",
            "note: QNN cpu computes in float only: the float model ran in place of the QDQ model",
        ],
        consecutive=False,
    )
    records = report(pytester)["records"]
    assert [(r["kind"], r["provenance"]["backend"], r["verdict"]) for r in records] == [
        ("accuracy", "htp", "pass"),
        ("placement", "htp", "pass"),
        ("latency", "htp", "not judged"),
        ("accuracy", "cpu", "pass"),
        ("placement", "cpu", "pass"),
    ]
    on_htp, on_cpu = records[0], records[3]
    assert on_htp["provenance"]["simulated"] is True
    assert on_htp["provenance"]["soc"] == "SM8650"
    assert on_htp["reference"]["float"] == "conv.onnx"
    assert on_cpu["provenance"]["executed"] == "float_model"
    assert on_cpu["provenance"]["computed_in"] == "float32"
    assert on_cpu["outputs"][0]["metrics"]["sqnr_db"] > 100

    cases = {case.get("name"): case for case in ET.parse(pytester.path / "out.xml").iter("testcase")}
    properties = {p.get("name"): p.get("value") for p in cases["test_accuracy[htp]"].iter("property")}
    assert properties["qnn.backend"] == "htp"
    assert properties["qnn.verdict"] == "pass"
    assert float(properties["qnn.sqnr_db"]) > 10
    assert properties["qnn.2.kind"] == "placement"
    assert "qnn.p95_ms" in {p.get("name") for p in cases["test_latency[htp]"].iter("property")}


def test_xdist_workers_leave_the_same_records(pytester: pytest.Pytester, project: Project, cpu_library: Path) -> None:
    project(GOOD, f"--qnn-cpu-library={cpu_library}", "--qnn-json=plain.json").assert_outcomes(passed=3)
    result = project("", f"--qnn-cpu-library={cpu_library}", "--qnn-json=two.json", "-n2", "--junitxml=two.xml")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["conv.qdq.onnx *htp[*]* SM8650 *pass *"])

    def essence(name: str) -> list[tuple[object, ...]]:
        rows = []
        for r in report(pytester, name)["records"]:
            outputs = [(o["name"], o["metrics"]["sqnr_db"], o["metrics"]["max_steps"]) for o in r.get("outputs", [])]
            rows.append((r["test"], r["kind"], r["verdict"], r["provenance"]["backend"], outputs))
        return sorted(rows, key=str)

    assert essence("two.json") == essence("plain.json")
    assert {r["worker"] for r in report(pytester, "two.json")["records"]} <= {"gw0", "gw1"}
    assert "qnn.verdict" in (pytester.path / "two.xml").read_text()
    # each reference was computed once and shared: 4 inputs at 2 levels, 4 of the float model at two levels, 4 draws of the
    # rounding envelope
    assert len(list((pytester.path / "cache" / "references").glob("??/*.npz"))) == 20


def test_a_failure_reads_in_one_screen(pytester: pytest.Pytester, project: Project) -> None:
    text = CLASSIFIER + (
        '\n@pytest.mark.tolerance(steps=0.5)\n@pytest.mark.backend("htp", soc="SM8550")\n'
        "def test_tight(classifier, qnn_inputs):\n    assert_matches_reference(classifier.run(qnn_inputs(classifier)))\n"
    )
    result = project(text, "--qnn-soc=SM8650")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E *AccuracyError: limit to blame: conv.qdq.onnx on htp (SM8550, simulator): 1 of 1 outputs fail, 4 samples",
            "E * output 'y', step 0.0*, limits: marker (steps=0.5)",
            "E * steps: the largest |y-q| is * steps (limit 0.5)",
            "E * worst element: sample * [[]0, *[]]: float *, QDQ *, htp * (* steps)",
            "E * SQNR: QDQ against float * dB, htp against float * dB, htp against QDQ * dB",
            "E * blame: the limit that was set: *",
            "E * reference: onnxruntime * CPU, ORT_DISABLE_ALL, checked against ORT_ENABLE_ALL; float: conv.onnx",
            "E * again: python -m pytest 'test_it.py::test_tight[[]htp[]]' --qnn-soc=SM8650",
        ]
    )
    lines = [line for line in result.outlines if line.startswith("E ")]
    assert len(lines) < 24


def test_the_layers_of_tolerances(pytester: pytest.Pytester, project: Project) -> None:
    pytester.makepyprojecttoml(
        '[[tool.pytest_qnn.tolerance]]\nmodel = "conv*"\nbackend = "htp"\noutput = "y"\nsteps = 3\n'
    )
    text = CLASSIFIER + (
        """
def layer(classifier, qnn_inputs, **more):
    return assert_matches_reference(classifier.run(qnn_inputs(classifier)), **more).outputs[0].limits_from
def test_project(classifier, qnn_inputs):
    assert layer(classifier, qnn_inputs) == "project configuration"
@pytest.mark.tolerance(steps=3)
class TestMarked:
    def test_marker(self, classifier, qnn_inputs):
        assert layer(classifier, qnn_inputs) == "marker"
    def test_argument(self, classifier, qnn_inputs):
        assert layer(classifier, qnn_inputs, tolerance=Tolerance(steps=3)) == "argument"
    def test_argument_by_output(self, classifier, qnn_inputs):
        assert layer(classifier, qnn_inputs, tolerance={"y": Tolerance(sqnr_db=5)}) == "argument"
    def test_no_such_output(self, classifier, qnn_inputs):
        with pytest.raises(OptionError, match="tolerance: unknown output 'z'"):
            layer(classifier, qnn_inputs, tolerance={"z": Tolerance(sqnr_db=5)})
"""
    )
    project(text).assert_outcomes(passed=5)


def test_a_tolerance_for_an_output_that_the_model_lacks_is_not_ignored(
    pytester: pytest.Pytester, project: Project
) -> None:
    pytester.makepyprojecttoml('[[tool.pytest_qnn.tolerance]]\nmodel = "conv*"\noutput = "yy"\nsteps = 3\n')
    text = CLASSIFIER + (
        "\ndef test_a(classifier, qnn_inputs):\n    assert_matches_reference(classifier.run(qnn_inputs(classifier)))\n"
    )
    result = project(text)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *OptionError: *tool.pytest_qnn.tolerance*unknown output 'yy'. Did you mean 'y'?*"])


def test_a_broken_quantisation_is_caught_and_blamed_on_the_quantisation(
    pytester: pytest.Pytester, project: Project, models: Path
) -> None:
    from tests import small_models

    small_models.quantized(models / "conv.onnx", pytester.path / "broken.onnx", scale_of_data=0.02)
    text = """
def test_broken(qnn_backend, qnn_inputs):
    session = qnn_backend.load("broken.onnx", float_model="conv.onnx")
    with pytest.raises(AccuracyError) as caught:
        assert_matches_reference(session.run(qnn_inputs("conv.onnx")))
    assert caught.value.verdict.blame == "quantization"
"""
    project(text).assert_outcomes(passed=1)


def test_without_a_float_model_the_reference_is_the_model_without_its_rounding(
    pytester: pytest.Pytester, project: Project
) -> None:
    text = """
def test_two_way(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.qdq.onnx")
    assert assert_matches_reference(session.run(qnn_inputs(session))).ok
"""
    project(text, "--qnn-json=out.json").assert_outcomes(passed=1)
    assert report(pytester)["records"][0]["reference"]["float"] == "conv.qdq.onnx without its rounding"


def test_a_float_model_on_htp_is_judged_by_the_precision_it_ran_in(pytester: pytest.Pytester, project: Project) -> None:
    text = """
@pytest.mark.backend("htp", soc="SM8650")
@pytest.mark.backend("htp", soc="SM8350")
def test_float(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.onnx")
    assert_matches_reference(session.run(qnn_inputs(session)))
    assert session.precision == {"SM8650": "float16", "SM8350": "float32"}[qnn_backend.soc]
"""
    project(text).assert_outcomes(passed=2)


LATENCY = (
    CLASSIFIER
    + """
@pytest.mark.latency_budget(p95_ms={limit})
def test_latency(classifier, qnn_inputs):
    assert_latency(classifier.measure(qnn_inputs(classifier)[0], max_seconds={seconds}, max_samples={samples}))
"""
)


@pytest.mark.parametrize(
    ("limit", "samples", "flags", "outcome"),
    [
        (1e6, 200, ["--qnn-simulated-latency"], "passed"),
        (1e-6, 200, ["--qnn-simulated-latency"], "failed"),
        (1e6, 30, ["--qnn-simulated-latency"], "passed"),  # 30 samples can't bound p95: undecided
        (1e6, 30, ["--qnn-simulated-latency", "--qnn-strict-latency"], "failed"),
        (1e-6, 30, [], "passed"),  # a simulator is not judged
    ],
    ids=["within", "over", "undecided", "undecided, strict", "not judged"],
)
def test_latency_outcomes(
    pytester: pytest.Pytester, project: Project, limit: float, samples: int, flags: list[str], outcome: str
) -> None:
    result = project(LATENCY.format(limit=limit, samples=samples, seconds=5), "--qnn-json=out.json", *flags)
    result.assert_outcomes(**{outcome: 1})
    verdict = report(pytester)["records"][0]["verdict"]
    expected = "not judged" if not flags else {30: "undecided"}.get(samples, "pass" if limit > 1 else "fail")
    assert verdict == ("fail" if "--qnn-strict-latency" in flags else expected)
    if not flags:
        assert "simulator" in report(pytester)["records"][0]["reason"]
    if outcome == "failed":
        result.stdout.fnmatch_lines(["E *p95_ms * [[]*, *[]], budget <= *"])


def test_a_latency_test_without_a_budget_says_so(project: Project) -> None:
    text = (
        CLASSIFIER
        + "\ndef test_a(classifier, qnn_inputs):\n    assert_latency(classifier.measure(qnn_inputs(classifier)[0], max_seconds=0.2))"
    )
    result = project(text)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *UsageError: *there is no latency budget: mark the test*"])


def test_a_missing_backend_is_a_skip_with_its_reason_and_an_error_where_required(project: Project) -> None:
    text = '@pytest.mark.backend("gpu")\ndef test_gpu(qnn_backend): ...'
    result = project(text, "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED *backend 'gpu' is not available: the QNN GPU backend needs an Adreno GPU*"])
    for flag in ("--qnn-require=gpu", "--qnn-require"):
        result = project("", flag)
        result.assert_outcomes(errors=1)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
    project("", "--qnn-require=htp").assert_outcomes(skipped=1)


def test_requirements_on_the_device_that_cannot_be_met_skip(project: Project) -> None:
    text = """
@pytest.mark.device(serial="1234abcd")
def test_phone(qnn_backend): ...
@pytest.mark.device(kind="adb")
def test_any_phone(qnn_backend): ...
@pytest.mark.device(htp_arch="v73")
def test_arch(qnn_backend):
    assert qnn_backend.soc == "SM8550"
"""
    result = project(text, "-rs")
    result.assert_outcomes(skipped=2, passed=1)
    result.stdout.fnmatch_lines(["*device '1234abcd' is not attached*", "*wants a target of kind 'adb'*"])


def test_a_model_that_runs_but_is_never_judged_is_named(project: Project) -> None:
    run = "    run = classifier.run(qnn_inputs(classifier))\n"
    text = CLASSIFIER + f"\ndef test_lazy(classifier, qnn_inputs):\n{run}"
    result = project(text)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["never judged by pytest-qnn: conv.qdq.onnx on htp (SM8650, simulator)"])
    text += f"def test_judges(classifier, qnn_inputs):\n{run}    assert_matches_reference(run)\n"
    project(text).stdout.no_fnmatch_line("*never judged*")


def test_a_failed_verdict_that_the_test_wants_is_shown_as_such(pytester: pytest.Pytester, project: Project) -> None:
    judge = "assert_matches_reference(classifier.run(qnn_inputs(classifier)), Tolerance(steps=0.5))"
    text = CLASSIFIER + (
        f"\ndef test_caught(classifier, qnn_inputs):\n    with pytest.raises(AccuracyError):\n        {judge}\n"
        f"@pytest.mark.xfail(strict=True)\ndef test_xfail(classifier, qnn_inputs):\n    {judge}\n"
        f"def test_plain(classifier, qnn_inputs):\n    {judge}\n"
    )
    result = project(text, "--qnn-json=out.json")
    result.assert_outcomes(passed=1, failed=1, xfailed=1)
    result.stdout.fnmatch_lines(
        ["conv* fail (expected) *test_caught*", "conv* fail (xfail) *test_xfail*", "conv* fail  *test_plain*"]
    )
    assert [r["test_outcome"] for r in report(pytester)["records"]] == ["passed", "xfailed", "failed"]


def test_fixtures_work_in_classes_and_at_session_scope(project: Project) -> None:
    text = """
@pytest.fixture(scope="session")
def shared(qnn_backend):
    return qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx")
class TestShared:
    seen = []
    def test_a(self, shared, qnn_target):
        self.seen.append(shared)
        assert qnn_target.name == "simulator"
    def test_b(self, shared, onnx_reference, qnn_inputs):
        assert self.seen == [shared] and shared.loads == 1
        x, = qnn_inputs(shared, count=1)
        reference = onnx_reference("conv.qdq.onnx")
        assert reference.level == "ORT_DISABLE_ALL" and reference.run(x)["y"].shape == (1, 8, 16, 16)
        assert (reference.run(x)["y"] == reference.run(x)["y"]).all()
"""
    project(text).assert_outcomes(passed=2)


def test_last_failed_runs_the_failed_backend_only(pytester: pytest.Pytester, project: Project) -> None:
    text = """
@pytest.mark.backend("htp", soc="SM8650")
@pytest.mark.backend("htp", soc="SM8550")
def test_a(qnn_backend):
    assert qnn_backend.soc == "SM8650"
"""
    project(text).assert_outcomes(passed=1, failed=1)
    cached = pytester.runpytest_subprocess()
    cached.assert_outcomes(passed=1, failed=1)
    pytester.runpytest_subprocess("--lf").assert_outcomes(failed=1)


def test_the_json_report_survives_a_killed_run(pytester: pytest.Pytester, project: Project) -> None:
    text = CLASSIFIER + (
        "\ndef test_a(classifier, qnn_inputs):\n    assert_matches_reference(classifier.run(qnn_inputs(classifier)))\n"
        "def test_b():\n    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    project(text, "--qnn-json=out.json")
    lines = (pytester.path / "out.json.partial").read_text().splitlines()
    assert [json.loads(line)["verdict"] for line in lines] == ["pass"]


def test_a_json_report_that_cannot_be_written_is_refused_before_the_tests(
    pytester: pytest.Pytester, project: Project
) -> None:
    (pytester.path / "folder").mkdir()
    result = project("def test_a(): ...", "--qnn-json=folder")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --qnn-json: *is a folder*"])


def test_a_profile_has_cycles_per_node_and_says_that_it_is_simulated(htp: Backend, models: Path) -> None:
    session = htp.load(models / "conv.qdq.onnx")
    profile = session.profile(seeded_inputs(session, 1)[0])
    assert any(name.startswith("conv") for name in profile.nodes)
    assert list(profile.nodes.values()) == sorted(profile.nodes.values(), reverse=True)
    assert {"EXECUTE", "INIT"} <= {event.message for event in profile.events}
    assert "simulator" in profile.not_a_device


def test_every_output_and_input_is_told_with_its_encoding(htp: Backend, models: Path) -> None:
    session = htp.load(models / "conv.qdq.onnx")
    assert [spec.describe() for spec in session.inputs] == ["x: float32[1, 3, 16, 16]"]
    assert session.outputs[0].encoding is not None
    assert session.outputs[0].encoding.dtype == "uint8"


def test_synthetic_inputs_are_marked_and_real_ones_are_not(pytester: pytest.Pytester, project: Project) -> None:
    text = CLASSIFIER + (
        "\nimport numpy as np\n"
        "def test_synthetic(classifier, qnn_inputs):\n    assert_matches_reference(classifier.run(qnn_inputs(classifier)))\n"
        "def test_real(classifier):\n    x = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)\n"
        "    assert_matches_reference(classifier.run([x]))\n"
    )
    result = project(text, "--qnn-json=out.json")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["~ on made-up inputs, which can't show a wrong calibration"])
    assert [r["synthetic_inputs"] for r in report(pytester)["records"]] == [True, False]


def test_the_json_report_tells_an_interrupted_run_from_a_finished_one(
    pytester: pytest.Pytester, project: Project
) -> None:
    project("def test_a(): ...\ndef test_b():\n    raise KeyboardInterrupt", "--qnn-json=out.json")
    content = json.loads((pytester.path / "out.json").read_text())
    none = {"compiled": 0, "reused": 0, "rebuilt": 0, "in_memory": 0}
    assert content["run"] == {"exit_status": 2, "interrupted": True, "outcomes": {"passed": 1}, "artifacts": none}


def test_a_mistake_of_the_test_is_told_without_the_plugins_own_code(project: Project) -> None:
    text = (
        CLASSIFIER
        + "\ndef test_a(classifier):\n    classifier.run({'x': 1})\ndef test_b(qnn_backend):\n    qnn_backend.load('gone.onnx')"
    )
    result = project(text)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        ["E *InputError: *expected a numpy array, got int*", "E *ModelError: gone.onnx: there is no such*"]
    )
    assert len(result.outlines) < 90
    result.stdout.no_fnmatch_line("*session.py*")


def test_the_table_fits_a_narrow_terminal() -> None:
    from pytest_qnn.records.terminal import COLUMNS, table_lines

    row = dict.fromkeys(COLUMNS, "12345678") | {"verdict": "fail", "model": "m" * 50, "test": "t" * 70}
    for width in (80, 100, 120):
        lines = table_lines([row], width)
        assert max(map(len, lines)) <= width
        assert "verdict" in lines[0]
        assert "blame" in lines[0]
    assert all(column in table_lines([row], 250)[0] for column in COLUMNS)
    assert "SoC" not in table_lines([row | {"SoC": ""}], 250)[0]
