"""A stand-in of the QNN SDK's command line, for tests: the SDK itself can't be installed where they run.

:func:`install` lays out a folder as the SDK's is. Its tools take the real tools' flags, refuse what those refuse, make the
same files and say in every log, version and text file that they are a stand-in. The C++ and the model library that they make
only carry the ONNX model along; the context binary is a real one, compiled by onnxruntime's QNN execution provider.
What is known of the real tools comes from public manuals and scripts; nothing here was held against the real ones.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from pytest_qnn.testing.sdk_stand_in import wheel_folder

VERSION = "2.51.0"
BUILD = "stand-in"
HOST = "x86_64-linux-clang"
TOOLS = (
    "qnn-onnx-converter",
    "qnn-model-lib-generator",
    "qnn-context-binary-generator",
    "qnn-context-binary-utility",
    "qnn-net-run",
    "qnn-profile-viewer",
)
HOST_LIBRARIES = ("libQnnHtp.so", "libQnnHtpPrepare.so", "libQnnCpu.so", "libQnnSystem.so", "libQnnModelDlc.so")


def install(root: Path, version: str = VERSION) -> Path:
    """Lay out the stand-in in ``root``; returns it, to be ``QNN_SDK_ROOT``."""
    tools, libraries, modules = root / "bin" / HOST, root / "lib" / HOST, root / "lib" / "python"
    for folder in (
        tools,
        libraries,
        modules,
        root / "lib" / "aarch64-android",
        root / "lib" / "hexagon-v75" / "unsigned",
    ):
        folder.mkdir(parents=True)
    (root / "sdk.yaml").write_text(f"name: QNN SDK stand-in\nversion: {version}\nbuild_id: {BUILD}\n")
    shutil.copy(Path(__file__).with_name("tools.py"), modules / "qnn_sdk_stand_in.py")
    for name in TOOLS:
        file = tools / name
        file.write_text(f'#!{sys.executable}\nfrom qnn_sdk_stand_in import main\n\nmain("{name}")\n')
        file.chmod(0o755)
    small = a_small_library()
    for name in HOST_LIBRARIES:
        shutil.copy(small, libraries / name)
    shutil.copy(wheel_folder() / "libQnnHtpNetRunExtensions.so", libraries)  # the real one: its schema is asked
    (root / "lib" / "onnxruntime_qnn.libs").symlink_to(
        wheel_folder().with_name("onnxruntime_qnn.libs")
    )  # it needs them
    for name in ("aarch64-android/libQnnHtp.so", "aarch64-android/libQnnHtpV75Stub.so"):
        (root / "lib" / name).write_bytes(b"QNN SDK stand-in")
    (root / "lib" / "hexagon-v75" / "unsigned" / "libQnnHtpV75Skel.so").write_bytes(b"QNN SDK stand-in")
    return root


def a_small_library() -> Path:
    """A small real shared library that needs the C library: one of the onnxruntime-qnn wheel's own."""
    return next(wheel_folder().with_name("onnxruntime_qnn.libs").glob("libunwind-*"))


def needs_a_missing_library(library: Path) -> str:
    """Change ``library`` so that it needs one that doesn't exist, as a host without libc++ has it; returns its name."""
    before, after = b"libc.so.6\0", b"libZ.so.6\0"
    content = library.read_bytes()
    assert content.count(before) >= 1
    mode = os.stat(library).st_mode
    library.write_bytes(content.replace(before, after))
    library.chmod(mode)
    return after[:-1].decode()
