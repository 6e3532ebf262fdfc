"""What is kept of a failing case, and what happens where it can't be kept."""

from __future__ import annotations

import json
from collections.abc import Callable

import jsonschema
import numpy as np
import pytest

from pytest_qnn.records.bundle import bundle_schema

Project = Callable[..., pytest.RunResult]

FAILS = """
@pytest.mark.backend("htp")
def test_too_strict(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx")
    assert_matches_reference(session.run(qnn_inputs(session, 6)), Tolerance(sqnr_db=90))
"""


def test_a_failing_case_is_kept_with_all_that_it_takes_to_see_it_again(
    pytester: pytest.Pytester, project: Project
) -> None:
    result = project(FAILS, "--qnn-artifacts=kept")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*bundle: */kept/test-too-strict-htp-* (4 of 6 samples)", "*alone: * bundle run */kept/*"]
    )
    (bundle,) = (p for p in (pytester.path / "kept").iterdir() if p.is_dir())
    description = json.loads((bundle / "bundle.json").read_text())
    jsonschema.validate(description, bundle_schema())
    with np.load(bundle / "inputs.npz", allow_pickle=False) as arrays:
        assert len(arrays.files) == 4
