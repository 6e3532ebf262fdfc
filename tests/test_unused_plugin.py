"""A project that doesn't use the plugin must not pay for it."""

from __future__ import annotations

import sys

import pytest

REPORT = """
import sys
def pytest_unconfigure():
    ours = [m for m in sys.modules if m.split(".")[0] == "pytest_qnn"]
    others = {m.split(".")[0] for m in sys.modules}
    print("OURS", *sorted(ours))
    print("OTHERS", *sorted(others))
"""


def modules(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[set[str], set[str]]:
    pytester.makeconftest(REPORT)
    pytester.makepyfile("def test_a(): ...")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    result = pytester.runpytest_subprocess("--collect-only", *arguments)
    assert result.ret == 0
    lines = {line.split()[0]: set(line.split()[1:]) for line in result.outlines if line.startswith(("OURS", "OTHERS"))}
    return lines["OURS"], lines["OTHERS"]


def test_an_unused_plugin_imports_the_standard_library_only(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, without = modules(pytester, monkeypatch)
    ours, with_plugin = modules(pytester, monkeypatch, "-p", "pytest_qnn.plugin")
    added = with_plugin - without - {"pytest_qnn"}
    assert added <= set(sys.stdlib_module_names), "imports something that isn't in the standard library"
    assert ours <= {
        "pytest_qnn",
        "pytest_qnn.fixtures",
        "pytest_qnn.interface",
        "pytest_qnn.plugin",
    }


def test_the_package_itself_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, pytest_qnn; print('numpy' in sys.modules, 'onnx' in sys.modules, 'pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3


def test_every_public_name_can_be_imported() -> None:
    import pytest_qnn

    for name in pytest_qnn.__all__:
        assert getattr(pytest_qnn, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pytest_qnn.nothing
