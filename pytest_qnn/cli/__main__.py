"""``python -m pytest_qnn.cli``."""

from pytest_qnn.cli import main

raise SystemExit(main())
