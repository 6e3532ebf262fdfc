"""Calibration data: where samples come from, read one at a time and checked against the model's inputs."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_qnn.errors import InputError, OptionError, QnnError
from pytest_qnn.model.inputs import check_inputs
from pytest_qnn.model.tensors import DTYPES, TensorSpec

Sample = dict[str, npt.NDArray[Any]]
RAW_TYPES = ("float32", "native")
INPUT_LIST = "input_list.txt"
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class CalibrationData:
    """Samples in their order; iterating reads them one at a time, so that they never lie in memory together.

    Attributes:
        name: of the source, for messages.
        count: number of items in the source, where it is known beforehand; an item that is a batch gives several samples.
        specs: the inputs that each sample must fit.
        limit: at most so many samples are read; None: all.
    """

    name: str
    count: int | None
    specs: tuple[TensorSpec, ...]
    limit: int | None
    _items: Callable[[], Iterator[tuple[str, object]]]

    def __iter__(self) -> Iterator[Sample]:
        """Checked samples.

        Raises:
            InputError: a sample doesn't fit, has NaN or infinite elements, the source has none, or it raised an error.
        """
        done = 0
        for label, sample in islice(self._samples(), self.limit):
            yield self._check(f"calibration data {self.name}: sample {done}{label}", sample)
            done += 1
        if not done:
            raise InputError(f"calibration data {self.name}: there are no samples in it")

    def _samples(self) -> Iterator[tuple[str, object]]:
        items = self._items()
        for number in range(sys.maxsize):
            try:
                label, item = next(items)
            except StopIteration:
                return
            except QnnError:
                raise
            except Exception as error:
                raise InputError(
                    f"calibration data {self.name}: {type(error).__name__} while item {number} was read: {error}. Mend the "
                    "source; nothing was written"
                ) from error
            parts = list(_split_batch(item, self.specs))
            for i, part in enumerate(parts):
                yield label if len(parts) == 1 else f"{label} [{i}]", part

    def _check(self, subject: str, sample: object) -> Sample:
        checked = check_inputs(subject, self.specs, sample, allow_non_finite=True)
        for name, array in checked.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = int(array.size - np.count_nonzero(np.isfinite(array)))
                raise InputError(
                    f"{subject}: input {name!r} has {bad} NaN or infinite elements: no range can be taken from them. Mend "
                    "the preprocessing or leave the sample out"
                )
        return checked


def open_calibration_data(
    data: object, specs: Sequence[TensorSpec], limit: int | None = None, raw_type: str = "float32"
) -> CalibrationData:
    """Calibration data from whatever a user has.

    Args:
        data: a folder of ``.npy`` files (models with one input) or ``.npz`` files (arrays named as the inputs); a folder
            with an ``input_list.txt``, or such a list, naming ``.raw`` files as for qnn-net-run; one ``.npy`` or ``.npz``
            file; ``"package.module:function"``, or the function: called without arguments it returns an iterable; or an
            iterable of dicts of arrays, or of arrays for a model with one input. Where the model's batch is 1, an item with a
            larger batch is split.
        specs: the model's inputs, with fixed shapes.
        limit: use the first so many samples only.
        raw_type: what ``.raw`` files hold: "float32" (qnn-net-run's default, whatever the input's type) or "native", the
            input's own type.

    Raises:
        InputError: there is no such source, or nothing in it.
        OptionError: bad ``limit`` or ``raw_type``.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise OptionError(f"samples: must be a whole number of at least 1, got {limit!r}")
    if raw_type not in RAW_TYPES:
        raise OptionError(f"raw_type: must be one of {', '.join(RAW_TYPES)}, got {raw_type!r}")
    inputs = tuple(specs)
    if isinstance(data, str | os.PathLike):
        text = os.fspath(data)
        path = Path(text).expanduser()
        if isinstance(text, str) and not path.exists() and _CALLABLE.fullmatch(text):
            data = _import_callable(text)
        else:
            name, count, items = _from_path(path, inputs, raw_type)
            return CalibrationData(name, count, inputs, limit, items)
    if isinstance(data, Mapping):
        raise InputError("calibration data: a dict is one sample: pass a list of dicts, one for each sample")
    if isinstance(data, np.ndarray):
        array = data
        return CalibrationData("(array)", None, inputs, limit, lambda: iter([("", array)]))
    if isinstance(data, Iterable):
        iterable = data
        size = len(data) if isinstance(data, Sized) else None
        return CalibrationData(f"({type(data).__name__})", size, inputs, limit, lambda: _unlabelled(iter(iterable)))
    if callable(data):
        function = data
        return CalibrationData(
            f"({getattr(data, '__qualname__', repr(data))})", None, inputs, limit, lambda: _from_callable(function)
        )
    raise InputError(
        f"calibration data: expected a folder, a file, 'module:function', a function or an iterable, got {type(data).__name__}"
    )


def _unlabelled(items: Iterator[object]) -> Iterator[tuple[str, object]]:
    for item in items:
        yield "", item


def _from_callable(function: Callable[[], object]) -> Iterator[tuple[str, object]]:
    made = function()
    if not isinstance(made, Iterable) or isinstance(made, str | bytes | Mapping):
        raise InputError(
            f"calibration data: {function!r} must return an iterable of samples, got {type(made).__name__}"
        )
    yield from _unlabelled(iter(made))


def _import_callable(text: str) -> Callable[[], object]:
    module_name, _, attribute = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # what `python -m` does, and an installed command doesn't
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise InputError(f"calibration data {text}: importing it failed: {error}") from error
        raise InputError(
            f"calibration data {text}: there is no such file or folder, and no module {error.name!r}: check the path, or "
            "run the command where the module can be imported"
        ) from None
    except AttributeError:
        raise InputError(f"calibration data {text}: module {module_name!r} has no {attribute!r}") from None
    except Exception as error:
        raise InputError(f"calibration data {text}: importing it failed: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InputError(f"calibration data {text}: {attribute!r} is no function: name one that returns an iterable")
    return found  # type: ignore[no-any-return]


def _from_path(
    path: Path, specs: tuple[TensorSpec, ...], raw_type: str
) -> tuple[str, int, Callable[[], Iterator[tuple[str, object]]]]:
    name = str(path)
    if not path.exists():
        raise InputError(f"calibration data {name}: there is no such file or folder: check the path")
    if path.is_dir():
        if (path / INPUT_LIST).is_file():
            return _from_path(path / INPUT_LIST, specs, raw_type)
        files = sorted(f for f in path.iterdir() if f.suffix in (".npy", ".npz") and f.is_file())
        if not files:
            raw = any(f.suffix == ".raw" for f in path.iterdir())
            hint = (
                f"for .raw files write an {INPUT_LIST} there, with a line per sample (input:=file.raw ...)"
                if raw
                else f"it needs .npy files, .npz files or an {INPUT_LIST}"
            )
            raise InputError(f"calibration data {name}: no samples in this folder: {hint}")
        return name, len(files), lambda: ((f" ({f.name})", _load_numpy(f)) for f in files)
    if path.suffix in (".npy", ".npz"):
        return name, 1, lambda: iter([("", _load_numpy(path))])
    if path.suffix == ".txt":
        lines = _read_input_list(path, specs)
        return name, len(lines), lambda: ((f" (line {n})", _load_raw(files, raw_type)) for n, files in lines)
    raise InputError(f"calibration data {name}: expected a folder, a .npy or .npz file, or an input list (.txt)")


def _load_numpy(file: Path) -> object:
    try:
        loaded = np.load(file, allow_pickle=False, mmap_mode="r" if file.suffix == ".npy" else None)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"calibration data {file}: not a readable {file.suffix} file without pickles: {error}"
        ) from None
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        try:
            return {name: loaded[name] for name in loaded.files}
        except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged archive
            raise InputError(f"calibration data {file}: damaged: {error}") from None


def _read_input_list(file: Path, specs: tuple[TensorSpec, ...]) -> list[tuple[int, dict[str, tuple[Path, TensorSpec]]]]:
    """Line numbers and files by input: a line per sample, ``name:=path`` or positional, ``#`` and ``%`` lines are no samples."""
    wanted = {spec.name: spec for spec in specs}
    lines: list[tuple[int, dict[str, tuple[Path, TensorSpec]]]] = []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"calibration data {file}: the input list can't be read: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip()[0] in "#%":
            continue
        subject = f"calibration data {file}, line {number}"
        parts = [part.rpartition(":=") for part in line.split()]
        if any(name for name, _, _ in parts) and not all(name for name, _, _ in parts):
            raise InputError(f"{subject}: mixes name:=path with bare paths: write all of them one way")
        if not parts[0][0] and len(parts) != len(specs):
            raise InputError(f"{subject}: has {len(parts)} files, the model {len(specs)} inputs {list(wanted)}")
        files: dict[str, tuple[Path, TensorSpec]] = {}
        for (given, _, path), spec in zip(parts, specs if not parts[0][0] else [None] * len(parts), strict=True):
            name = given or (spec.name if spec else "")
            if name not in wanted:
                from pytest_qnn.settings import unknown_name

                raise InputError(f"{subject}: {unknown_name('input', name, wanted)}")
            files[name] = (file.parent / path, wanted[name])
        lines.append((number, files))
    if not lines:
        raise InputError(f"calibration data {file}: the input list names no samples")
    return lines


def _load_raw(files: Mapping[str, tuple[Path, TensorSpec]], raw_type: str) -> Sample:
    sample = {}
    for name, (file, spec) in files.items():
        if spec.dtype not in DTYPES:
            raise InputError(f"calibration data {file}: input {spec.describe()}: .raw files of that type can't be read")
        stored = np.dtype(spec.dtype if raw_type == "native" else np.float32)
        elements = math.prod(int(size) for size in spec.shape)
        try:
            size = file.stat().st_size
        except OSError as error:
            raise InputError(f"calibration data {file}: input {name!r}: can't be read: {error.strerror}") from None
        if size != elements * stored.itemsize:
            hint = ""
            if raw_type == "float32" and size == elements * np.dtype(spec.dtype).itemsize:
                hint = f": it looks like {spec.dtype}, pass raw_type='native' (--raw-type native)"
            elif raw_type == "native" and size == elements * 4:
                hint = ": it looks like float32, pass raw_type='float32' (--raw-type float32)"
            raise InputError(
                f"calibration data {file}: {size} bytes, but input {spec.describe()} as {stored} takes "
                f"{elements * stored.itemsize}{hint}"
            )
        sample[name] = np.fromfile(file, stored).reshape([int(s) for s in spec.shape]).astype(spec.dtype, copy=False)
    return sample


def _split_batch(item: object, specs: tuple[TensorSpec, ...]) -> Iterator[object]:
    """``item``, or its parts along the first axis where the model's batch is 1 and all its arrays have the same larger one."""
    arrays: Mapping[str, Any] = item if isinstance(item, Mapping) else {specs[0].name: item} if len(specs) == 1 else {}
    sizes = set()
    for spec in specs:
        array = arrays.get(spec.name)
        if not isinstance(array, np.ndarray) or not spec.shape or spec.shape[0] != 1 or array.ndim != len(spec.shape):
            yield item
            return
        if array.shape[1:] != spec.shape[1:]:
            yield item
            return
        sizes.add(array.shape[0])
    if len(sizes) != 1 or len(arrays) != len(specs) or (size := sizes.pop()) < 2:
        yield item
        return
    for i in range(size):
        yield {name: array[i : i + 1] for name, array in arrays.items()}
