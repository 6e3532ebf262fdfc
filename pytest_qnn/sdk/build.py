"""The whole chain: ONNX model, C++ and weights, model library, context binary."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_qnn.devices.soc import find_soc
from pytest_qnn.sdk.context import SdkContext, make_context
from pytest_qnn.sdk.conversion import Conversion, convert
from pytest_qnn.sdk.installation import HOST, Sdk
from pytest_qnn.sdk.library import ModelLibrary, build_library
from pytest_qnn.targets.backend_config import backend_extensions
from pytest_qnn.targets.options import check_options, compile_options


@dataclass(frozen=True)
class Built:
    """What each step made."""

    conversion: Conversion
    library: ModelLibrary
    contexts: tuple[SdkContext, ...]


def build(
    sdk: Sdk,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    socs: list[str],
    *,
    options: Mapping[str, object] | None = None,
    timeout: float = 1800,
    **conversion: Any,
) -> Built:
    """Take a model to a context binary for each of ``socs``; what the steps before it made stays in ``output`` too.

    Args:
        options: of the ``htp`` backend, for the context binaries.
        timeout: seconds for each step.
        **conversion: further arguments of :func:`pytest_qnn.sdk.convert`.

    Raises:
        QnnError: as for :func:`convert`, :func:`build_library` and :func:`make_context`.
    """
    for soc in socs:  # before minutes go into the steps that come first
        backend_extensions("htp", find_soc(soc), compile_options("htp", check_options("htp", options or {})), ["graph"])
    folder = Path(output)
    converted = convert(sdk, model, folder, timeout=timeout, **conversion)
    library = build_library(sdk, converted.cpp, folder, weights=converted.weights, target=HOST, timeout=timeout)
    contexts = [
        make_context(sdk, library.path, folder, soc, options=options, graph=converted.graph, timeout=timeout)
        for soc in socs
    ]
    return Built(converted, library, tuple(contexts))
