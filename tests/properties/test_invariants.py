"""Each invariant holds on the simulator, and each is broken by a backend with the fault that it is there for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from pytest_qnn import InvariantError, PlacementError, UsageError
from pytest_qnn.backend import Backend
from pytest_qnn.errors import OptionError
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.properties import (
    INVARIANTS,
    ModelPair,
    QdqModel,
    Sample,
    Step,
    assert_argmax_stable,
    assert_backend_matches,
    assert_deterministic,
    assert_finite,
    assert_order_invariant,
    assert_quantizer,
    assert_saturates,
    denormal,
    edges,
    saturating,
    uniform,
)
from pytest_qnn.properties.invariants import Trial, find_invariants
from pytest_qnn.properties.quantizer import MAX_VALUES, Quantizer, ladder
from pytest_qnn.session import Session
from tests import small_models
from tests.properties.tampered import Arrays, tampered

SHAPE = (1, 3, 16, 16)


def drawn(count: int = 4) -> list[Sample]:
    return [Sample(x=uniform(SHAPE, seed=seed, within=(-0.9, 0.9))) for seed in range(count)]


def beyond(session: Session) -> list[Sample]:
    encoding = session.inputs[0].encoding
    assert encoding is not None
    return [Sample(x=saturating(SHAPE, seed=seed, within=encoding)) for seed in range(3)]


def test_all_of_them_hold_on_the_simulator(classifier: Session) -> None:
    samples = drawn()
    assert assert_backend_matches(classifier, samples).judged == 4
    assert assert_saturates(classifier, beyond(classifier)).judged == 3
    assert assert_finite(classifier, samples[0]).judged == 1
    assert assert_order_invariant(classifier, samples).ok
    assert assert_argmax_stable(classifier, samples).judged == 4
    assert assert_quantizer(classifier, samples).ok
    before = classifier.loads
    assert assert_deterministic(classifier, samples, repeats=2).judged == 4
    assert classifier.loads == before + 1, "in a fresh process"


@pytest.mark.slow
@pytest.mark.parametrize("activation", [8, 16])
@pytest.mark.parametrize("soc", ["SM8350", "SM8750"])
def test_htps_own_quantiser_is_monotone_idempotent_and_within_its_bound(
    htp: Backend, tmp_path: Path, activation: int, soc: str
) -> None:
    pair = QdqModel(SHAPE, (Step("Conv"),), activation=activation).save(tmp_path)
    session = htp.load(pair.quantized, soc=soc)
    assert assert_quantizer(session, drawn()).ok
    encoding = session.inputs[0].encoding
    assert encoding is not None
    quantizer = Quantizer.of(session, encoding)
    values = np.resize(ladder(encoding, MAX_VALUES), MAX_VALUES)
    off = np.abs(quantizer.run(values) - encoding.dequantize(encoding.quantize(values)))
    assert off.max() > 0.5 * encoding.step, "it really quantises, and breaks ties otherwise than onnxruntime"
    assert dict(quantizer.session.plan.options)["offload_graph_io_quantization"] == "0"


def halved(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
    return {"y": y["y"] * np.float32(0.5)}


def wraps(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
    return {"y": -y["y"]} if np.abs(x["x"]).max() > 1.1 else y


def not_a_number(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
    y["y"][0, 3] = np.nan
    return y


def drifts(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
    y["y"][0, 2] += np.float32(n * 1e-6)
    return y


class Stale:
    """Gives the previous input's output."""

    def __init__(self) -> None:
        self.last: Any = None

    def __call__(self, n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
        self.last, stale = y, self.last or y
        return stale


def sorts(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
    """Moves the best class once the same input comes moved."""
    return {"y": np.roll(y["y"], 3, -1)} if n >= 4 else y


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        (halved, lambda s: assert_backend_matches(s, drawn()), "matches_reference doesn't hold: .*\n.*output 'y': "),
        (wraps, lambda s: assert_saturates(s, beyond(s)), "output 'y' .* at the end of the range, .* beyond it"),
        (
            not_a_number,
            lambda s: assert_finite(s, drawn()),
            r"1 of 8 elements are NaN or infinite, the first at \[0, 3\]",
        ),
        (
            drifts,
            lambda s: assert_deterministic(s, drawn(), repeats=1, reload=False),
            r"'y' \[0, 2\]: .* at first, .* again",
        ),
        (Stale(), lambda s: assert_order_invariant(s, drawn()), "in order, .* from back to front"),
        (sorts, lambda s: assert_argmax_stable(s, drawn()), "the best class went from"),
    ],
)
def test_a_faulty_backend_breaks_the_invariant_that_is_there_for_it(
    classifier: Session, fault: Any, check: Callable[[Session], object], said: str
) -> None:
    with pytest.raises(InvariantError, match=said) as caught:
        check(tampered(classifier, fault))
    assert caught.value.verdict.violations
    assert "case: Sample(x=" in str(caught.value)


def test_a_backend_that_computes_another_model_breaks_the_match_with_the_reference(
    htp: Backend, classifier: Session, pair: ModelPair, tmp_path: Path
) -> None:
    import copy

    import onnx
    from onnx import numpy_helper

    proto = onnx.load(pair.quantized)
    weights = next(i for i in proto.graph.initializer if len(i.dims) == 4)
    swapped = numpy_helper.to_array(weights)[::-1].copy()
    weights.CopyFrom(numpy_helper.from_array(swapped, weights.name))
    onnx.save(proto, tmp_path / "swapped.onnx")
    other = copy.copy(classifier)
    other._loaded = htp.load(tmp_path / "swapped.onnx")._loaded
    with pytest.raises(InvariantError, match="matches_reference"):
        assert_backend_matches(other, drawn())


@pytest.mark.parametrize("kind", [uniform, denormal, edges])
def test_a_bias_of_16_bits_is_told_from_what_htp_is_off_by(htp: Backend, tmp_path: Path, kind: Any) -> None:
    """HTP's sums are off by up to 2 steps of 65,535, and not at random; 40 steps are no rounding."""
    pair = QdqModel(SHAPE, (Step("Conv", 1),), activation=16).save(tmp_path)
    session = htp.load(pair.quantized, float_model=pair.float_model)
    assert session.outputs[0].encoding is not None
    step = np.float32(session.outputs[0].encoding.step)
    samples = [Sample(x=kind(SHAPE, seed=seed, within=session.inputs[0].encoding)) for seed in range(4)]
    assert assert_backend_matches(session, samples).ok
    with pytest.raises(InvariantError, match=r"bias: the mean of y-q is \+?(40|39\.\d) steps"):
        assert_backend_matches(tampered(session, lambda n, x, y: {"y": y["y"] + 40 * step}), samples)


def test_what_a_quantisation_ruins_is_not_the_backends_fault(htp: Backend, tmp_path: Path) -> None:
    model = QdqModel(SHAPE, (Step("Conv", 1),))
    pair = model.save(tmp_path)
    from pytest_qnn.model import quantize

    faint = [{"x": np.full(SHAPE, 0.001 * i, np.float32)} for i in range(4)]
    quantize(pair.float_model, faint, tmp_path / "faint.onnx")
    session = htp.load(tmp_path / "faint.onnx", float_model=pair.float_model)
    assert assert_backend_matches(session, drawn()).ok


def test_a_faulty_quantiser_is_found(classifier: Session) -> None:
    encoding = classifier.inputs[0].encoding
    assert encoding is not None
    real = Quantizer.of(classifier, encoding)
    samples = drawn(1)

    def found(change: Any, name: str) -> str:
        trial = Trial(classifier, samples, classifier.run_many(samples), classifier.run_many)
        trial.quantizers["x"] = Quantizer(encoding, tampered(real.session, change))
        return " ".join(violation.text for violation in INVARIANTS[name](trial).violations)

    step = np.float32(encoding.step)
    assert found(lambda n, x, y: {"y": -y["y"]}, "quantizer_monotone").startswith("input 'x': not monotone: ")
    assert "not idempotent" in found(lambda n, x, y: {"y": y["y"] + step}, "quantizer_idempotent")
    assert "off by 1." in found(lambda n, x, y: {"y": y["y"] + step}, "quantizer_error")
    truncated = found(lambda n, x, y: {"y": np.floor(np.resize(x["x"], y["y"].shape) / step) * step}, "quantizer_error")
    assert "error: " in truncated, "rounding down is off by a whole step"
    for name in ("quantizer_monotone", "quantizer_idempotent", "quantizer_error"):
        assert found(lambda n, x, y: y, name) == ""


def test_what_could_not_have_failed_is_refused(classifier: Session, htp: Backend, models: Path) -> None:
    with pytest.raises(UsageError, match="saturates: none of the 4 samples could break it: give some beyond the range"):
        assert_saturates(classifier, drawn())
    with pytest.raises(UsageError, match="order_invariant: none of the 1 samples .* at least two"):
        assert_order_invariant(classifier, drawn(1))
    floats = htp.load(models / "conv.onnx")
    with pytest.raises(UsageError, match="no float input with an encoding"):
        assert_quantizer(floats, seeded_inputs(floats, 1))
    with pytest.raises(OptionError, match="repeats"):
        assert_deterministic(classifier, drawn(), repeats=0)
    with pytest.raises(UsageError, match="must be a session, got Backend"):
        assert_finite(htp, drawn())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown invariant 'saturate'. Did you mean 'saturates'"):
        find_invariants(["saturate"])


def test_where_the_float_model_runs_nothing_saturates(cpu: Backend, pair: ModelPair) -> None:
    session = cpu.load(pair.quantized, float_model=pair.float_model)
    wide = [Sample(x=uniform(SHAPE, seed=seed, within=(-4.0, 4.0))) for seed in range(2)]
    assert assert_backend_matches(session, wide).ok
    for check in (assert_saturates, assert_quantizer):
        with pytest.raises(UsageError, match="could break it"):
            check(session, wide)


def test_what_ran_elsewhere_is_not_judged(htp: Backend, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="on_htp"),
        helper.make_node("Det", ["a"], ["y"], name="nowhere"),
    ]
    file = small_models.save(tmp_path / "mixed.onnx", nodes, {"x": [1, 4, 4]}, {"y": [1]})
    session = htp.load(file)
    with pytest.raises(PlacementError, match="nowhere"):
        assert_backend_matches(session, seeded_inputs(session, 2))
