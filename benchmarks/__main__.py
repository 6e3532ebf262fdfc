"""Run all benchmarks, or those named: ``python -m benchmarks isolation metrics``."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = (
    "metrics",
    "isolation",
    "context_load",
    "plugin",
    "quantizing",
    "adb_transport",
    "net_run",
    "device_agent",
    "properties",
    "judging",
    "operators",
)

for name in sys.argv[1:] or NAMES:
    print(f"== {name}")
    import_module(f"benchmarks.{name}").main()
