"""What the strategies draw: valid whatever is asked for, rebuilt from its repr, and simple when it is shrunk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from pytest_qnn import properties
from pytest_qnn.devices.soc import SOCS
from pytest_qnn.errors import InputError, OptionError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.inputs import check_inputs
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.properties import (
    ALL_KINDS,
    IN_RANGE,
    Sample,
    backend_options,
    batches_of,
    constant,
    encodings,
    grid,
    inputs_of,
    socs,
    tensors,
)
from pytest_qnn.targets.options import OPTIONS, check_options

NAMES = {name: getattr(properties, name) for name in properties.__all__}
FEW = settings(max_examples=40, deadline=None)
U8 = grid(0.0171, 100)


def simplest(strategy: st.SearchStrategy[Any], condition: Any = lambda value: True) -> Any:
    """What the strategy shrinks to. Hypothesis's explaining of examples would give the last that it looked at."""
    phases = [Phase.generate, Phase.shrink]
    return find(strategy, condition, settings=settings(max_examples=2000, database=None, phases=phases))


class Inputs:
    """Stands for a model: all that the strategies read of one."""

    def __init__(self, *specs: TensorSpec) -> None:
        self.inputs = specs


def image(encoding: Encoding | None = U8, dtype: str = "float32", name: str = "x") -> Inputs:
    return Inputs(TensorSpec(name, dtype, (1, 3, 16, 20), encoding))


SHAPES = st.sampled_from([(), (1,), (7,), (1, 16), (3, 5), (1, 3, 16, 16), (1, 16, 16, 3), (2, 4, 3)])
DTYPES = st.sampled_from(["float32", "float16", "uint8", "int8", "uint16", "int32", "int64", "bool"])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_tensor_has_its_shape_and_type_and_is_finite(data: st.DataObject) -> None:
    shape, dtype = data.draw(SHAPES), data.draw(DTYPES)
    quantized = dtype.startswith("float") and data.draw(st.booleans())
    per_channel = quantized and len(shape) > 1 and data.draw(st.booleans())
    encoding = None
    if per_channel:
        encoding = data.draw(encodings(channels=shape[-1], axis=len(shape) - 1))
    elif quantized:
        encoding = data.draw(encodings())
    array = data.draw(tensors(shape, dtype, encoding, ALL_KINDS))
    assert array.shape == shape
    assert array.dtype == dtype
    assert np.isfinite(array.astype(np.float64)).all()
    again = eval(repr(array), dict(NAMES))
    assert again.dtype == array.dtype
    assert np.array_equal(again, array)


@given(st.data())
@FEW
def test_kinds_in_range_stay_in_the_range_of_the_encoding(data: st.DataObject) -> None:
    encoding = data.draw(encodings(scales=st.floats(1e-3, 10)))
    array = data.draw(tensors((1, 4, 8, 8), encoding=encoding, kinds=IN_RANGE)).astype(np.float64)
    low, high = encoding.range
    slack = 1e-6 * max(abs(low), abs(high))  # the floats next to the ends are among the edges
    assert array.min() >= low - slack
    assert array.max() <= high + slack


def test_each_kind_is_what_its_name_says() -> None:
    shape = (1, 3, 16, 16)
    low, high = U8.range

    def of(kind: str, **given: Any) -> np.ndarray[Any, Any]:
        return properties.patterns.make(kind, shape, within=U8, seed=3, **given).array().astype(np.float64)  # type: ignore[attr-defined]

    steps = of("on_steps") / U8.step
    assert np.allclose(steps, np.rint(steps), atol=1e-4)
    between = of("ties") / U8.step + 0.5
    assert np.allclose(between, np.rint(between), atol=1e-4)
    q = U8.quantize(properties.ties(shape, within=U8, seed=3).array())
    assert len(np.unique(np.abs(q - 100 - of("ties") / U8.step) > 0.5)) == 2, "on either side of the tie"
    beyond = of("saturating")
    assert (beyond > high).mean() > 0.2
    assert (beyond < low).mean() > 0.2
    tiny = np.abs(properties.denormal(shape, seed=1).array())
    assert 0 < tiny.max() < np.finfo(np.float32).smallest_normal
    half = np.abs(properties.denormal(shape, seed=1, dtype="float16").array())
    assert 0 < half.max() < np.finfo(np.float16).smallest_normal
    assert 0 < np.count_nonzero(of("sparse", amount=0.1)) < 0.2 * np.prod(shape)
    ends = of("edges")
    assert (np.minimum(abs(ends - low), abs(ends - high)) < 1.01 * U8.step).all()
    for kind in ("gradient", "blobs", "smooth", "edge"):
        assert correlation(of(kind), 3) > 0.6, kind
        assert np.ptp(of(kind)) > 10 * U8.step, kind
    assert abs(correlation(of("uniform"), 3)) < 0.2
    sound = properties.patterns.make("sines", (1, 4000), within=(-1.0, 1.0), seed=1).array()  # type: ignore[attr-defined]
    assert 0.2 < np.abs(sound).max() <= 1
    assert np.abs(properties.bursts((1, 4000), seed=2).array()[0]).mean() < 0.3, "mostly silent"


def correlation(array: np.ndarray[Any, Any], axis: int) -> float:
    """Of neighbours along an axis."""
    a, b = np.take(array, range(array.shape[axis] - 1), axis), np.take(array, range(1, array.shape[axis]), axis)
    return float(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1])


def test_integers_without_an_encoding_are_small_indices_or_what_is_asked_for() -> None:
    ids = Inputs(TensorSpec("ids", "int64", (1, 32)))

    @given(inputs_of(ids), inputs_of(ids, within={"ids": (5, 30000)}))
    @FEW
    def check(small: Sample, asked: Sample) -> None:
        assert 0 <= small["ids"].min() <= small["ids"].max() <= 9
        assert 5 <= asked["ids"].min() <= asked["ids"].max() <= 30000

    check()


def test_quantised_integers_use_their_whole_type() -> None:
    spec = TensorSpec("x", "uint8", (1, 64), grid(0.1, 3))
    found = simplest(inputs_of(Inputs(spec)), lambda x: {0, 255} <= set(x["x"].reshape(-1).tolist()))
    assert found["x"].dtype == np.uint8


@pytest.mark.parametrize(
    ("condition", "shown"),
    [
        (lambda x: True, "Sample(x=constant(0.0, [1, 3, 16, 20]))"),
        (lambda x: x.max() > 1, "Sample(x=constant({high}, [1, 3, 16, 20]))"),
        (
            lambda x: x[0, 0, 0, 0] == 0 and np.count_nonzero(x) == 1,
            "Sample(x=constant(0.0, [1, 3, 16, 20]).but({(0, 0, 0, 1): 0.0171}))",
        ),
        (
            lambda x: len(np.unique(x)) > 9,
            "Sample(x=uniform([1, 3, 16, 20], seed=0, within=grid(0.0171, 100, 'uint8')))",
        ),
    ],
)
def test_examples_shrink_to_a_constant_without_edits(condition: Any, shown: str) -> None:
    found = simplest(inputs_of(image()), lambda sample: condition(sample["x"]))
    assert repr(found) == shown.replace("{high}", repr(U8.range[1]))


def test_a_sample_is_rebuilt_from_its_repr_and_survives_pickling() -> None:
    spec = TensorSpec("serving:0", "float32", (1, 8), U8)

    @given(inputs_of(Inputs(*image().inputs, spec), ALL_KINDS))
    @FEW
    def check(sample: Sample) -> None:
        for again in (eval(repr(sample), dict(NAMES)), pickle.loads(pickle.dumps(sample))):  # noqa: S301
            assert again.keys() == sample.keys()
            assert all(np.array_equal(again[name], sample[name]) for name in sample)
        check_inputs("model", (*image().inputs, spec), sample)

    check()


def test_what_was_computed_from_a_described_array_no_longer_says_so() -> None:
    drawn = simplest(tensors((2, 2)))
    assert repr(drawn) == "constant(0.0, [2, 2]).array()"
    assert repr(drawn + 1).startswith("DescribedArray([[")
    with pytest.raises(ValueError, match="read-only"):
        drawn[0, 0] = 1


def test_batches_are_mostly_full_shrink_to_one_and_have_near_duplicates() -> None:
    sizes, nearest = [], []

    @given(batches_of(image(), size=6))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def check(batch: list[Sample]) -> None:
        sizes.append(len(batch))
        for i, sample in enumerate(batch):
            nearest.extend(np.abs(sample["x"] - other["x"]).max() for other in batch[:i])

    check()
    assert max(sizes) == 6
    assert np.mean(sizes) > 3, "a fifth of the examples are small on purpose: Hypothesis starts with those"
    assert any(0 < distance < 2 * U8.step for distance in nearest)
    assert repr(simplest(batches_of(image(), size=6))) == "[Sample(x=constant(0.0, [1, 3, 16, 20]))]"
    two = simplest(batches_of(image(), size=6), lambda batch: any(b["x"].any() for b in batch[1:]))
    assert len(two) == 2


@given(st.data())
@FEW
def test_encodings_are_as_they_were_asked_for(data: st.DataObject) -> None:
    bits, signed = data.draw(st.sampled_from([4, 8, 16])), data.draw(st.booleans())
    symmetric = data.draw(st.none() | st.booleans())
    encoding = data.draw(encodings(bits, signed, symmetric, channels=3, axis=1))
    assert (encoding.bits, encoding.signed, len(encoding.scale), encoding.axis) == (bits, signed, 3, 1)
    middle = 0 if signed else 2 ** (bits - 1)
    if symmetric is not None:
        assert all(zero == middle for zero in encoding.zero_point) == symmetric
    values = data.draw(tensors((2, 3), encoding=encoding))
    q = encoding.quantize(values)
    assert np.array_equal(encoding.quantize(encoding.dequantize(q)), q)


def test_socs_by_architecture() -> None:
    assert simplest(socs()) == "QCS6490"
    assert {simplest(socs("v79")), simplest(socs([79, 81]), lambda name: SOCS[name].htp_arch == 81)} == {
        "SM8750",
        "SC8480XP",
    }
    with pytest.raises(OptionError, match="unknown htp_arch 77"):
        socs(77)


@pytest.mark.parametrize("backend", OPTIONS)
def test_options_are_those_that_the_backend_takes(backend: str) -> None:
    @given(backend_options(backend))
    @FEW
    def check(options: dict[str, str]) -> None:
        assert check_options(backend, options) == dict(sorted(options.items()))
        assert "device_id" not in options
        assert "hvx_threads" not in options, "onnxruntime can't carry it"

    check()
    assert simplest(backend_options(backend)) == {}


def test_one_option_by_name_takes_all_its_values() -> None:
    seen = set()

    @given(backend_options("htp", ["qnn_context_priority"]))
    @settings(deadline=None, derandomize=True)
    def check(options: dict[str, str]) -> None:
        seen.add(options.get("qnn_context_priority"))

    check()
    assert seen == {None, "low", "normal", "normal_high", "high"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: inputs_of(image(), ["in_rnge"]), "unknown kind 'in_rnge'. Did you mean 'in_range'"),
        (lambda: inputs_of(image(), "in_range"), "put it in a list"),
        (lambda: inputs_of(image(None), ["ties"]), "none of ties can be drawn .* without an encoding"),
        (lambda: inputs_of(image(), within={"y": (0, 1)}), "unknown input 'y'"),
        (lambda: inputs_of(image(None), within={"x": (0, float("nan"))}), "smallest and the largest"),
        (lambda: batches_of(image(), size=0), "size must be"),
        (lambda: tensors((2,), "float128"), "unknown element type"),
        (lambda: tensors((1, 3), encoding=grid([1.0, 1.0], [0, 0], "uint8", axis=1)), "doesn't fit"),
        (lambda: encodings(7), "4, 8 or 16 bits"),
        (lambda: backend_options("htpp"), "unknown backend"),
        (lambda: backend_options("htp", ["vtcm"]), "unknown option 'vtcm'"),
        (lambda: constant(0, (2, 2)).but({(2, 0): 1.0}), "no element"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(wrong: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        wrong()


def test_a_dynamic_dimension_left_open_is_refused() -> None:
    with pytest.raises(InputError, match="dynamic dimensions"):
        inputs_of(Inputs(TensorSpec("x", "float32", ("n", 4))))


def test_a_file_is_read_when_the_first_example_is_drawn(tmp_path: Path, models: Path) -> None:
    file = tmp_path / "later.onnx"
    strategy = inputs_of(file)
    file.write_bytes((models / "conv.qdq.onnx").read_bytes())
    assert simplest(strategy)["x"].shape == (1, 3, 16, 16)
