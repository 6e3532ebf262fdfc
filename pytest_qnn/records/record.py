"""One record per judged run: plain JSON data, described by ``schema.json`` beside this file."""

from __future__ import annotations

import datetime
import json
import math
import shlex
import sys
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qnn.records.folding import keep_record

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench
    from pytest_qnn.session import Session

SCHEMA_VERSION = 1
Record = dict[str, Any]


def schema() -> dict[str, Any]:
    """The published JSON schema of ``--qnn-json`` files."""
    text = resources.files("pytest_qnn.records").joinpath("schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def plain(value: Any) -> Any:
    """``value`` as JSON data: numpy numbers become numbers, infinities and NaN null, enums their values."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def make_record(
    bench: Bench, session: Session, kind: str, verdict: str, blame: str, reason: str, **more: Any
) -> Record:
    """A record of the running test. Within a property-based test the list of records may keep another in its place.

    Args:
        kind: "accuracy", "layers", "placement", "latency", "task metric" or "robustness".
        verdict: "pass", "fail", "undecided" or "not judged".
        blame: whose fault a failure is; "none" for none.
        reason: one line.
    """
    test = bench.test
    record = {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "test": test.nodeid,
        "subject": session.subject,
        "worker": test.worker or None,
        "time": now(),
        "verdict": verdict,
        "blame": blame,
        "reason": reason,
        "repeat": repeat_command(bench),
        "provenance": session.provenance,
        "retries": list(test.retries),
        **more,
    }
    result: Record = plain(record)
    keep_record(test.records, result)
    return result


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.fromtimestamp(time.time(), datetime.UTC).isoformat(timespec="milliseconds")


def repeat_command(bench: Bench, *, anywhere: bool = False) -> str:
    """The command that shows a result again, from pytest's root folder; empty outside of a test.

    Args:
        anywhere: it can be pasted in any folder and without the environment's ``bin`` on the path.
    """
    if not bench.test.nodeid:
        return ""
    python = sys.executable if anywhere else "python"
    command = shlex.join([python, "-m", "pytest", bench.test.nodeid, *bench.test.options])
    here = Path.cwd() == bench.root and not anywhere
    return command if here else f"cd {shlex.quote(str(bench.root))} && {command}"
