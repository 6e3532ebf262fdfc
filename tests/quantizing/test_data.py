"""Calibration data in each of its forms gives the same model; what doesn't fit is refused with what to change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from pytest_qnn.errors import InputError, OptionError
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.quantization.calibration import open_calibration_data
from tests import small_models
from tests.quantizing.conftest import Sample, floats, samples

X = TensorSpec("x", "float32", (1, 3, 16, 16))
TWO = (TensorSpec("a", "float32", (1, 2)), TensorSpec("ids", "int64", (1, 3)))


def written(folder: Path, form: str) -> object:
    """The twelve samples in one of the forms that a user may have."""
    arrays = [s["x"] for s in samples()]
    if form == "npy":
        for i, a in enumerate(arrays):
            np.save(folder / f"{i:02}.npy", a)
    elif form == "npz":
        for i, a in enumerate(arrays):
            np.savez(folder / f"{i:02}.npz", x=a)
    elif form == "one npy":
        np.save(folder / "all.npy", np.concatenate(arrays))
        return folder / "all.npy"
    elif form == "raw":
        for i, a in enumerate(arrays):
            a.tofile(folder / f"{i:02}.raw")
        lines = ["# a comment", "%out", "", *(f"{'x:=' if i % 2 else ''}{i:02}.raw" for i in range(12))]
        (folder / "input_list.txt").write_text("\n".join(lines) + "\n")
    else:
        return {
            "list": samples(),
            "arrays": arrays,
            "array": np.concatenate(arrays),
            "generator": (s for s in samples()),
            "function": samples,
            "batches": [{"x": np.concatenate(arrays[:8])}, {"x": np.concatenate(arrays[8:])}],
        }[form]
    return folder


FORMS = ("npy", "npz", "one npy", "raw", "list", "arrays", "array", "generator", "function", "batches")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    got = [s["x"] for s in open_calibration_data(written(tmp_path, form), [X])]
    assert np.array_equal(np.stack(got), np.stack([s["x"] for s in samples()]))


@pytest.mark.parametrize("form", ["raw", "generator"])
def test_the_form_does_not_change_the_model(form: str, tmp_path: Path, quantize_net: Callable[..., Any]) -> None:
    digests = {
        hashlib.sha256(quantize_net(data).path.read_bytes()).hexdigest()
        for data in (samples(), written(tmp_path, form))
    }
    assert len(digests) == 1


def test_a_function_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_calibration.py").write_text(
        "import numpy as np\ndef some(): return (np.full((1, 3, 16, 16), i, np.float32) for i in range(3))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert [s["x"][0, 0, 0, 0] for s in open_calibration_data("my_calibration:some", [X])] == [0, 1, 2]


def test_raw_files_are_float32_unless_told_otherwise(tmp_path: Path) -> None:
    np.array([1, 2], np.float32).tofile(tmp_path / "a.raw")
    np.array([3, 4, 5], np.float32).tofile(tmp_path / "ids.raw")
    np.array([6, 7, 8], np.int64).tofile(tmp_path / "native.raw")
    (tmp_path / "input_list.txt").write_text("ids:=ids.raw a:=a.raw\n")
    (sample,) = open_calibration_data(tmp_path, TWO)
    assert (sample["ids"].dtype, sample["ids"].tolist(), sample["a"].tolist()) == (np.int64, [[3, 4, 5]], [[1, 2]])
    (tmp_path / "input_list.txt").write_text("a.raw native.raw\n")
    (sample,) = open_calibration_data(tmp_path, TWO, raw_type="native")
    assert sample["ids"].tolist() == [[6, 7, 8]]
    with pytest.raises(
        InputError, match=r"24 bytes, but input ids: int64\[1, 3\] as float32 takes 12: it looks like int64, "
    ):
        list(open_calibration_data(tmp_path, TWO))


def test_samples_are_read_one_at_a_time() -> None:
    asked = []

    def source() -> Iterator[Sample]:
        for i in range(100):
            asked.append(i)
            yield {"x": floats(1, 3, 16, 16, seed=i)}

    data = iter(open_calibration_data(source(), [X], limit=5))
    next(data)
    next(data)
    assert asked == [0, 1]
    assert len(list(data)) == 3
    assert len(asked) == 5


def bad(**arrays: object) -> list[object]:
    return [samples(1)[0], arrays]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            bad(x=floats(1, 16, 16, 3)),
            r"sample 1: input x: float32\[1, 3, 16, 16\] got shape .* NCHW and NHWC, transpose it",
        ),
        (bad(x=floats(3, 16, 16)), "the batch axis is missing"),
        (bad(x=floats(1, 3, 16, 16).astype(np.float64)), r"sample 1: .* got dtype float64: convert it with .astype"),
        (bad(x=[[1.0]]), "expected a numpy array, got list"),
        (bad(), r"sample 1: input x: .* is missing"),
        (bad(x=floats(1, 3, 16, 16), y=floats(1)), "sample 1: unknown input 'y'"),
        (bad(x=np.full((1, 3, 16, 16), np.nan, np.float32)), "sample 1: input 'x' has 768 NaN or infinite elements"),
        ([], "there are no samples in it"),
        (iter(()), "there are no samples in it"),
        ({"x": floats(1, 3, 16, 16)}, "a dict is one sample: pass a list of dicts"),
        ([(floats(1, 3, 16, 16), 3)], "expected a dict of arrays, got tuple"),
        (7, "expected a folder, a file, 'module:function', a function or an iterable, got int"),
        (lambda: 7, "must return an iterable of samples, got int"),
        ("/does/not/exist", "there is no such file or folder"),
        ("no_such_module_at_all:f", "no module 'no_such_module_at_all'"),
        ("os:no_such", "module 'os' has no 'no_such'"),
        ("os:sep", "'sep' is no function"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    quantize_net: Callable[..., Any], tmp_path: Path, data: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        quantize_net(data)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_is_chained(quantize_net: Callable[..., Any], tmp_path: Path) -> None:
    def source() -> Iterator[Sample]:
        yield from samples(3)
        raise KeyError("label")

    with pytest.raises(InputError, match=r"KeyError while item 3 was read: 'label'") as caught:
        quantize_net(source())
    assert isinstance(caught.value.__cause__, KeyError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no samples in this folder: it needs .npy files"),
        ({"a.raw": b"1234"}, "for .raw files write an input_list.txt there"),
        ({"a.npy": b"nonsense"}, "a.npy: not a readable .npy file"),
        ({"a.npz": b"PK nonsense"}, "a.npz: not a readable .npz file"),
        ({"input_list.txt": b"# nothing\n"}, "the input list names no samples"),
        ({"input_list.txt": b"y:=a.raw\n"}, "line 1: unknown input 'y'"),
        ({"input_list.txt": b"a.raw b.raw\n"}, "line 1: has 2 files, the model 1 inputs"),
        ({"input_list.txt": b"x:=a.raw b.raw\n"}, "line 1: mixes name:=path with bare paths"),
        ({"input_list.txt": b"x:=a.raw\n"}, "a.raw: input 'x': can't be read: No such file"),
        ({"input_list.txt": b"x:=a.raw\n", "a.raw": b"1234"}, r"4 bytes, but input x: .* as float32 takes 3072"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(open_calibration_data(tmp_path, [X]))


@pytest.mark.parametrize(("options", "message"), [({"limit": 0}, "samples"), ({"raw_type": "int8"}, "raw_type")])
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        open_calibration_data([], [X], **options)


def test_a_model_with_several_inputs(tmp_path: Path) -> None:
    from pytest_qnn.model import quantize

    model = small_models.save(
        tmp_path / "gather.onnx",
        [
            helper.make_node("Gather", ["t", "ids"], ["g"], name="g"),
            helper.make_node("Add", ["g", "a"], ["y"], name="add"),
        ],
        {"ids": [1, 3], "a": [1, 3, 4]},
        {"y": [1, 3, 4]},
        {"t": floats(10, 4)},
        types={"ids": TensorProto.INT64},
    )
    data = [{"ids": np.array([[i, 1, 2]]), "a": floats(1, 3, 4, seed=i)} for i in range(9)]
    assert read_model(quantize(model, data, tmp_path / "q.onnx").path).precision == "A8W8"
