"""assert_robust: bounded, finds what is planted, goes on to the worst case, and says how to see it again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from pytest_qnn import RobustnessError, RuntimeCrashError, UsageError, properties
from pytest_qnn.bench import Bench, CurrentTest
from pytest_qnn.errors import OptionError
from pytest_qnn.properties import RobustnessReport, Sample, assert_robust, constant, inputs_of
from pytest_qnn.properties.robust import worst_case
from pytest_qnn.session import Session
from tests.properties.tampered import Arrays, inferences, tampered

NAMES = {name: getattr(properties, name) for name in properties.__all__}


def honest(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
    return y


def flips_when_bright(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
    """Wrong if any element is above 0.9, as an accumulator that overflows."""
    return {"y": -y["y"]} if x["x"].max() > 0.9 else y


def off_where_large(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
    """The more the mean of the input is above zero, the more a single output is off: something to climb."""
    y["y"][0, 0] += np.float32(3.0 * max(float(x["x"].mean()), 0.0))
    return y


def test_a_healthy_model_is_robust_and_its_worst_case_is_told(classifier: Session) -> None:
    session = tampered(classifier, honest)
    report = assert_robust(session, inferences=120)
    assert report.ok
    assert {o.name for o in report.outcomes if o.judged} == {
        "matches_reference",
        "saturates",
        "finite",
        "deterministic",
    }
    assert report.inferences == inferences(session) <= 120
    assert report.inferences > 80, "the budget is there to be used"
    assert report.worst is not None
    assert 0 < report.worst.ratio < 3
    assert isinstance(report.worst.sample, Sample)


@pytest.mark.parametrize("budget", [8, 9, 30, 100])
def test_the_budget_holds_for_searching_and_shrinking_together(classifier: Session, budget: int) -> None:
    session = tampered(classifier, flips_when_bright)
    try:
        report = assert_robust(session, inferences=budget, seed=3)
    except RobustnessError as error:
        report = error.verdict
    assert report.inferences == inferences(session) <= budget


def test_a_planted_fault_is_found_and_shrunk(classifier: Session) -> None:
    with pytest.raises(RobustnessError) as caught:
        assert_robust(tampered(classifier, flips_when_bright), inferences=300, seed=1)
    report = caught.value.verdict
    (broken,) = [outcome for outcome in report.outcomes if not outcome.ok]
    assert broken.name == "matches_reference"
    assert broken.case is not None
    encoding = classifier.inputs[0].encoding
    assert encoding is not None
    high = repr(encoding.range[1])
    text = str(caught.value)
    assert f"case: session.run([Sample(x=constant({high}, [1, 3, 16, 16]))])" in text
    (again,) = eval(repr(list(broken.case)), dict(NAMES))
    assert np.array_equal(again["x"], broken.case[0]["x"])  # type: ignore[index, call-overload]
    assert "worst case: noise ratio" in text
    assert "held: " in text


def test_the_search_goes_on_after_the_first_failure_to_the_worst_case(classifier: Session) -> None:
    faulty = tampered(classifier, off_where_large)
    with pytest.raises(RobustnessError) as caught:
        assert_robust(faulty, inputs_of(classifier), invariants=["matches_reference"], inferences=100, seed=5)
    report = caught.value.verdict
    case = report.outcomes[0].case
    assert case is not None
    assert report.worst is not None
    own = worst_case(faulty.run_many(case), case)
    assert own is not None
    assert own.ratio <= report.worst.ratio
    assert report.examples > 40, "70% of the budget, a sample each"
    assert report.outcomes[0].broken > 5


def test_a_seed_finds_the_same_again(classifier: Session) -> None:
    reports = [assert_robust(classifier, inferences=60, seed=9) for _ in range(2)]
    assert repr(reports[0].worst) == repr(reports[1].worst)
    assert repr(assert_robust(classifier, inferences=60, seed=10).worst) != repr(reports[0].worst)


def test_any_strategy_will_do(classifier: Session) -> None:
    arrays = st.floats(-1, 1, width=32).map(lambda v: np.full((1, 3, 16, 16), v, np.float32))
    assert assert_robust(classifier, arrays, inferences=40).ok
    assert assert_robust(classifier, st.lists(arrays, min_size=2, max_size=3), inferences=40).ok
    one = st.just(Sample(x=constant(0.5, (1, 3, 16, 16))))
    report = assert_robust(classifier, one, inferences=40)
    assert report.examples == 1, "there is nothing else to draw"
    assert report.inferences < 5


def test_the_quantisers_of_the_model_can_be_among_the_invariants(classifier: Session) -> None:
    names = ["quantizer_monotone", "quantizer_idempotent", "quantizer_error", "order_invariant", "argmax_stable"]
    report = assert_robust(classifier, invariants=names, inferences=60)
    assert [o.name for o in report.outcomes if o.judged] == names
    assert report.inferences <= 60


def test_what_goes_wrong_with_the_bench_is_no_verdict(classifier: Session) -> None:
    def crashes(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
        if n >= 20:
            raise RuntimeCrashError("the runtime process died")
        return y

    session = tampered(classifier, crashes)
    with pytest.raises(RuntimeCrashError) as caught:
        assert_robust(session, inferences=200)
    assert inferences(session) <= 28, "it isn't tried again"
    assert "with the inputs [Sample(" in caught.value.__notes__[0]


def test_ctrl_c_ends_it_at_once(classifier: Session) -> None:
    def interrupted(n: int, x: Arrays, y: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    session = tampered(classifier, interrupted)
    with pytest.raises(KeyboardInterrupt):
        assert_robust(session)
    assert inferences(session) == 0


def test_senseless_arguments_are_refused(classifier: Session) -> None:
    with pytest.raises(OptionError, match="inferences must be .* at least one batch"):
        assert_robust(classifier, inferences=5)
    with pytest.raises(OptionError, match="at least one name"):
        assert_robust(classifier, invariants=[])
    with pytest.raises(UsageError, match="takes a session, got Run"):
        assert_robust(classifier.run(constant(0, (1, 3, 16, 16)).array()))  # type: ignore[arg-type]
    in_range = st.just(Sample(x=constant(0.5, (1, 3, 16, 16))))
    with pytest.raises(UsageError, match="nothing that was drawn could have broken saturates"):
        assert_robust(classifier, in_range, invariants=["saturates"], inferences=20)


def test_a_test_searches_from_its_own_seed(bench: Bench, classifier: Session) -> None:
    def seed_of(nodeid: str) -> int:
        bench.enter(CurrentTest(nodeid))
        try:
            report: RobustnessReport = assert_robust(classifier, inferences=10)
        finally:
            bench.enter(CurrentTest())
        return report.seed

    assert seed_of("test_a.py::test_a") == seed_of("test_a.py::test_a") != seed_of("test_a.py::test_b")
