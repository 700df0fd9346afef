"""Runs `on_pretended_device.py` in a process of its own."""

import subprocess
import sys
from pathlib import Path


def test_what_computes_with_torch_alone_mixes_no_devices():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_pretended_device.py"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
