"""Collected only where Triton interprets: see tests/triton/test_interpreter.py."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
