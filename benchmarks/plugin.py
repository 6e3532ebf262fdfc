"""What the plugin costs a project that doesn't use it, against ``-p no:qnn`` in the same run."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 15


def seconds(folder: Path, *arguments: str) -> float:
    """Wall time of one pytest run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def compare(folder: Path, *arguments: str) -> tuple[float, float]:
    """Medians with the plugin and without it, alternating."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        times[0].append(seconds(folder, *arguments))
        times[1].append(seconds(folder, "-p", "no:qnn", *arguments))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Print the ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_one.py").write_text("def test_a(): pass\n")
        loaded, without = compare(folder, "--collect-only")
        print(
            f"--collect-only: with {1e3 * loaded:.0f} ms, without {1e3 * without:.0f} ms, "
            f"difference {1e3 * (loaded - without):+.1f} ms"
        )
        (folder / "test_one.py").write_text("".join(f"def test_{i}(): pass\n" for i in range(1000)))
        loaded, without = compare(folder)
        print(f"1,000 trivial tests: with {loaded:.3f} s, without {without:.3f} s, ratio {loaded / without:.3f}")


if __name__ == "__main__":
    main()
