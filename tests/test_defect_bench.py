"""A small part of the defect bench: the gate catches what it must on a real net, and passes the net's healthy runs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.defects.__main__ import main
from benchmarks.defects.rules import RULES
from tests.conftest import SKIPS_ALLOWED, needs_simulator


@pytest.mark.slow
def test_the_gate_catches_what_is_visible_and_passes_what_is_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_simulator()
    if find_spec("livekit") is None and SKIPS_ALLOWED:
        pytest.skip("livekit-wakeword is not installed: pip install -r example_project/requirements.txt")
    figures = tmp_path / "figures.json"
    arguments = ["--folder", str(tmp_path), "--inputs", "4", "--socs", "SM8650", "--nets", "speech-embedding"]
    arguments += ["--precisions", "A8W8"]
    assert main([*arguments, "--json", str(figures)]) == 0
    told = json.loads(figures.read_text())

    healthy = [told["healthy"][group] for group in ("tuned", "other inputs")]
    assert [tally["cases"] for tally in healthy] == [1, 1]
    assert [tally["caught_all"]["pytest-qnn"] for tally in healthy] == [0, 0]
    assert all(
        tally["caught_all"]["rtol 1e-3 atol 1e-5"] == 1 for tally in healthy
    )  # the table has others, and they cry wolf

    defects = told["output defects"]["tuned"]
    always = (
        "zeros",
        "constant",
        "sign",
        "gain 2",
        "previous input's output",
        "exchanged batch rows",
        "one NaN",
        "wrong dtype",
    )
    for name in always:
        assert defects[name]["caught"]["pytest-qnn"] == defects[name]["visible"] == 1, name
    assert defects["gain 2"]["caught"]["cosine 0.95"] == 0  # blind to it

    broken = {(d["pair"], d["defect"]): d for d in told["model defects"]}
    for defect in ("weight scale +10%", "bias dropped", "two weight channels swapped"):
        assert broken["speech-embedding-A8W8", defect]["layers"], defect
    printed = capsys.readouterr().out
    assert "Defects in the model" in printed

    assert main([*arguments, "--json", str(figures)]) == 0  # all kept: nothing is run again
    assert json.loads(figures.read_text()) == told


def test_the_peers_rules_are_what_their_sources_say(tmp_path: Path) -> None:
    assert {"onnxruntime QDQ", "cosine 0.99", "PSNR 30 dB", "Polygraphy simple", "Polygraphy L2", "chipwright"} <= set(
        RULES
    )


@pytest.mark.parametrize("arguments", [["--nets", "nosuch"], ["--inputs", "1"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    assert refusal.value.code == 2
    assert arguments[0] in capsys.readouterr().err
