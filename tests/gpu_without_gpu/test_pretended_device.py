"""Runs `on_pretended_device.py` in a process of its own."""

import subprocess
import sys
from pathlib import Path


def test_what_computes_with_torch_alone_mixes_no_devices():
    file = "tests/gpu_without_gpu/on_pretended_device.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
