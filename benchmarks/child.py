"""Running a benchmark module in a process of its own, and reading its result back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# large blocks stay with the process: no page is ever faulted in twice
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
_RESULT = "result: "


class ChildFailed(Exception):
    """The process ended without a result; the text says why."""


def run_module(
    module: str, *arguments: str, environment: dict[str, str] | None = None, timeout: float
) -> Any:
    """What ``python -m module arguments`` hands to :func:`hand_back`.

    Raises:
        ChildFailed: it took longer than ``timeout`` seconds, failed, or was killed.
    """
    try:
        finished = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **(environment or {})},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"took longer than {timeout:.0f} s") from None
    for line in reversed(finished.stdout.splitlines()):
        if line.startswith(_RESULT):
            return json.loads(line.removeprefix(_RESULT))
    if finished.returncode < 0:
        raise ChildFailed(f"killed by signal {-finished.returncode}, probably out of memory")
    last = finished.stderr.strip().splitlines()[-1:] or ["no output"]
    raise ChildFailed(last[0])


def hand_back(result: Any) -> None:
    """Print a result for the parent."""
    print(_RESULT + json.dumps(result), flush=True)
