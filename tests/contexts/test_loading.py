"""``load(model, artifact="somebody's.bin")``: run, judged against the model it came from, or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pytest_qnn import (
    AccuracyError,
    ArtifactError,
    OptionError,
    TargetError,
    Tolerance,
    UsageError,
    assert_fully_offloaded,
    assert_matches_reference,
)
from pytest_qnn.artifacts import ForeignArtifact
from pytest_qnn.backend import Backend
from pytest_qnn.model.inputs import seeded_inputs
from tests.contexts.conftest import MakeBinary

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def foreign(make_binary: MakeBinary, kinds: Path, tmp_path: Path) -> Path:
    """A binary as the SDK would make it from the model: integers and channels last at its edges, other names."""
    return Path(shutil.copy(make_binary(kinds / "nhwc.onnx"), tmp_path / "vendor.bin"))


def test_a_foreign_binary_is_judged_against_the_model_it_came_from(htp: Backend, models: Path, foreign: Path) -> None:
    model, original = models / "conv.qdq.onnx", models / "conv.onnx"
    session = htp.load(model, float_model=original, artifact=foreign)
    inputs = seeded_inputs(session)
    run = session.run(inputs)
    assert assert_matches_reference(run).ok
    assert_fully_offloaded(session)
    ordinary = htp.load(model, float_model=original).run(inputs)
    assert np.array_equal(run.output(), ordinary.output())
    assert session.provenance["artifact"]["kind"] == "foreign context binary"
    assert session.provenance["artifact"]["source"] == "given"
    assert "vendor.bin was built elsewhere" in session.notes[0]


def test_a_foreign_binary_of_other_weights_is_red(
    htp: Backend, models: Path, make_binary: MakeBinary, tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(str(models / "conv.onnx"))
    weight = next(i for i in proto.graph.initializer if i.name == "w")
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), "w"))
    onnx.save(proto, str(tmp_path / "other.onnx"))
    session = htp.load(models / "conv.onnx", artifact=make_binary(tmp_path / "other.onnx"))
    with pytest.raises(AccuracyError, match="backend to blame"):
        assert_matches_reference(session.run(seeded_inputs(session)))


def test_a_foreign_binary_for_another_soc_is_refused_by_name(htp: Backend, models: Path, foreign: Path) -> None:
    with pytest.raises(ArtifactError, match=r"vendor\.bin.*SM8650 \(v75\).*SM8550"):
        htp.load(models / "conv.qdq.onnx", artifact=foreign, soc="SM8550")


def test_a_foreign_binary_of_another_model_is_refused(htp: Backend, kinds: Path, foreign: Path) -> None:
    with pytest.raises(ArtifactError, match=r"vendor\.bin"):
        htp.load(kinds / "two.onnx", artifact=foreign)


def test_a_quantised_artifact_of_a_float_model_needs_an_explicit_limit(
    htp: Backend, models: Path, foreign: Path
) -> None:
    session = htp.load(models / "conv.onnx", artifact=foreign)
    run = session.run(seeded_inputs(session))
    with pytest.raises(UsageError, match="artifact is quantised and the model is not"):
        assert_matches_reference(run)
    assert assert_matches_reference(run, Tolerance(sqnr_db=20)).ok


def test_names_that_need_explaining_are_explained(htp: Backend, models: Path, foreign: Path) -> None:
    told = ForeignArtifact(foreign, names={"y": "_1_features_out"}, layouts={"y": "channels_last"})
    session = htp.load(models / "conv.qdq.onnx", artifact=told)
    assert assert_matches_reference(session.run(seeded_inputs(session))).ok
    with pytest.raises(OptionError, match="names"):
        htp.load(models / "conv.qdq.onnx", artifact=ForeignArtifact(foreign, names={"z": "_1_features_out"}))


def test_a_damaged_or_missing_one_is_refused(htp: Backend, models: Path, foreign: Path) -> None:
    foreign.write_bytes(foreign.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"vendor\.bin"):
        htp.load(models / "conv.qdq.onnx", artifact=foreign)
    with pytest.raises(UsageError, match="there is no such file"):
        htp.load(models / "conv.qdq.onnx", artifact="nowhere.bin")
    with pytest.raises(ArtifactError, match=r"must be a \.bin, \.so or \.dlc file"):
        htp.load(models / "conv.qdq.onnx", artifact=ForeignArtifact(models / "conv.onnx"))


def test_a_model_library_needs_the_sdk(
    htp: Backend, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    library = tmp_path / "libconv.so"
    library.write_bytes(b"\x7fELF")
    with pytest.raises(TargetError, match="QNN_SDK_ROOT"):
        htp.load(models / "conv.qdq.onnx", artifact=library)


def test_the_record_says_that_it_was_built_elsewhere(project: Run, pytester: pytest.Pytester, foreign: Path) -> None:
    shutil.copy(foreign, pytester.path)
    result = project("""
def test_a(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx", artifact="vendor.bin")
    assert_matches_reference(session.run(qnn_inputs(session)))
""")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["note: vendor.bin was built elsewhere: *"])
