"""The QNN SDK's own tools: from a float ONNX model to a model library and a context binary.

The tools are Qualcomm's and none of them is part of this package: :func:`find_sdk` finds an installed SDK, the other
functions run its tools, each with a deadline, in a folder of its own, with its log kept.
"""

from pytest_qnn.sdk.build import Built, build
from pytest_qnn.sdk.context import SdkContext, describe_context, make_context
from pytest_qnn.sdk.conversion import Conversion, convert
from pytest_qnn.sdk.installation import ANDROID, HOST, Sdk, find_sdk
from pytest_qnn.sdk.library import ModelLibrary, build_library

__all__ = [
    "ANDROID",
    "HOST",
    "Built",
    "Conversion",
    "ModelLibrary",
    "Sdk",
    "SdkContext",
    "build",
    "build_library",
    "convert",
    "describe_context",
    "find_sdk",
    "make_context",
]
