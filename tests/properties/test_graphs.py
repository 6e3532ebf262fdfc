"""Random graphs: small descriptions that become models which HTP takes whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

from pytest_qnn.assertions import assert_fully_offloaded
from pytest_qnn.backend import Backend
from pytest_qnn.errors import OptionError
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.properties import QdqModel, Step, qdq_models
from pytest_qnn.properties.graphs import OPERATORS

SIMPLEST = [Phase.generate, Phase.shrink]


@given(qdq_models(max_nodes=12))
@settings(max_examples=150, deadline=None)
def test_every_description_is_a_valid_graph_and_is_rebuilt_from_its_repr(model: QdqModel) -> None:
    again = eval(repr(model), {"QdqModel": QdqModel, "Step": Step})
    assert again.operators == model.operators
    assert model.effective == model
    assert 1 <= len(model.operators) <= 12


@given(qdq_models(operators=["Conv", "Relu", "Softmax"], activation=16, weight=4))
@settings(max_examples=40, deadline=None)
def test_only_what_was_asked_for_is_drawn(model: QdqModel) -> None:
    assert set(model.operators) <= {"Conv", "Relu", "Softmax", "Add"}
    assert (model.activation, model.weight, model.per_channel) == (16, 4, True)


def test_every_operator_is_drawn() -> None:
    seen: set[str] = set()

    @given(qdq_models(max_nodes=12))
    @settings(max_examples=400, deadline=None, derandomize=True, phases=[Phase.generate])
    def collect(model: QdqModel) -> None:
        seen.update(step.operator for step in model.steps)

    collect()
    assert seen == set(OPERATORS)


def test_a_graph_shrinks_by_losing_nodes() -> None:
    found = find(
        qdq_models(max_nodes=8),
        lambda model: {"Softmax", "MatMul"} <= set(model.operators),
        settings=settings(max_examples=3000, database=None, phases=SIMPLEST),
    )
    assert sorted(step.operator for step in found.steps) == ["MatMul", "Softmax"]
    assert (found.activation, found.weight, found.per_channel, found.seed) == (8, 8, False, 0)


def test_steps_that_do_not_fit_are_left_out() -> None:
    assert QdqModel((1, 4, 8, 8), (Step("Gemm"), Step("GlobalAveragePool"), Step("MaxPool"))).operators == (
        "GlobalAveragePool",
    )
    assert QdqModel((1, 16), (Step("Conv"), Step("Relu"))).operators == ("Add",), "a quantised node is the least"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: qdq_models(operators=["Convolution"]),
            "operators: unknown operator 'Convolution'. Known: Add, AveragePool",
        ),
        (lambda: qdq_models(activation=4), "activation: unknown bit width"),
        (lambda: qdq_models(weight=()), "weight: name at least one"),
        (lambda: qdq_models(max_nodes=0), "max_nodes"),
        (lambda: QdqModel((1, 4), (Step("Cnv"),)).operators, "unknown operator 'Cnv'"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        wrong()  # type: ignore[operator]


def test_a_saved_pair_is_quantised_as_described_and_the_same_each_time(tmp_path: Path) -> None:
    model = QdqModel((1, 4, 8, 8), (Step("Conv", 1), Step("Add")), activation=16, weight=4, per_channel=True, seed=5)
    pairs = [model.save(tmp_path / name) for name in ("a", "b")]
    assert [read_model(p.quantized).precision for p in pairs] == ["A16W4"] * 2
    assert pairs[0].float_model.read_bytes() == pairs[1].float_model.read_bytes()
    scales = [
        [onnx.numpy_helper.to_array(i).tolist() for i in onnx.load(p.quantized).graph.initializer if "scale" in i.name]
        for p in pairs
    ]
    assert scales[0] == scales[1]
    assert np.isfinite(np.concatenate([np.ravel(s) for s in scales[0]])).all()


@pytest.mark.slow
@pytest.mark.parametrize("activation", [8, 16])
def test_htp_takes_random_graphs_whole(htp: Backend, tmp_path: Path, activation: int) -> None:
    number = 0

    @given(qdq_models(max_nodes=8, activation=activation))
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # shrinking would quantise and compile for minutes
        suppress_health_check=list(HealthCheck),
    )
    def check(model: QdqModel) -> None:
        nonlocal number
        number += 1
        pair = model.save(tmp_path / str(number))
        session = htp.load(pair.quantized, float_model=pair.float_model)
        assert session.outputs[0].encoding is not None
        assert_fully_offloaded(session)
        assert session.inputs[0].encoding is not None
        assert np.isfinite(session.run(seeded_inputs(session, 1)[0]).output()).all()

    check()
