"""Every code block of the documentation and the README that a reader could run is run.

In a page, ``python`` and ``toml`` blocks with a ``title="..."`` become files of a project of that page, and ``console`` blocks
are typed into it: each line after ``$`` is run, must end with exit code 0 (or the one in ``exit=N``), and must print the
lines below it, where ``…`` stands for anything. Python blocks without a title are parsed only.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.conftest import needs_simulator

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[tuple[str, dict[str, str], str]]:
    """(language, attributes, text) of each fenced block."""
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            language, _, rest = token.info.partition(" ")
            found.append((language, dict(re.findall(r'(\w+)="?([^"\s]+)"?', rest)), token.content))
    return found


def runnable(page: Path) -> bool:
    return any(language == "console" for language, _, _ in blocks(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: p.name)
def test_the_commands_of_a_page_do_what_it_says(page: Path, tmp_path: Path) -> None:
    needs_simulator()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTEST_ADDOPTS", None)
    for language, attributes, text in blocks(page):
        if "title" in attributes:
            (tmp_path / attributes["title"]).write_text(text, encoding="utf-8")
        if language != "console":
            continue
        for command, expected in commands(text):
            if command.startswith("make"):
                continue  # the targets of the Makefile are what runs this test
            done = subprocess.run(
                command,
                shell=True,
                cwd=tmp_path,
                env={**environment, "COLUMNS": "200"},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            output = done.stdout + done.stderr
            assert done.returncode == int(attributes.get("exit", 0)), f"{command}\n{output}"
            missing = unmatched(expected, output.splitlines())
            assert missing is None, f"{command}: no line like {missing!r} in\n{output}"


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each command of a console block with the lines it shows."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found and line.strip():
            found[-1][1].append(line)
    return found


def unmatched(expected: list[str], lines: list[str]) -> str | None:
    """The first expected line that doesn't follow, in order; spaces count as one."""
    squeezed = iter([" ".join(line.split()) for line in lines])
    for line in expected:
        pattern = re.sub(r"\s*…\s*", "*", " ".join(line.split()).replace("[", "[[]"))
        if pattern != "*" and not any(fnmatch.fnmatchcase(got, pattern) for got in squeezed):
            return line
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_of_a_page_is_valid(page: Path) -> None:
    for language, _, text in blocks(page):
        if language == "python":
            assert ast.parse(text)
        elif language == "toml":
            assert tomllib.loads(text)


def test_the_settings_page_lists_every_setting_and_soc() -> None:
    from pytest_qnn.devices.soc import SOCS
    from pytest_qnn.settings import SETTINGS

    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    names = [f"`{s.name}`" if s.ini else f"--qnn-{s.name}" for s in SETTINGS] + list(SOCS)
    assert [name for name in names if name not in text] == []


def test_the_pages_name_no_error_that_does_not_exist() -> None:
    import pytest_qnn

    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+Error)`", text):
        assert getattr(pytest_qnn, name)
