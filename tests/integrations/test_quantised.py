"""Models with quantised weights, in a process of their own: torchao writes to the log of every other."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
APART = Path(sys.prefix) / "quantised"  # where `make test` installs torchao and gguf

FILES = (
    "tests/integrations/quantised_models.py",
    "tests/integrations/language/quantised_models.py",
)


def test_plans_run_on_quantised_models():
    assert (APART / "torchao").is_dir(), (
        f"torchao must be in {APART}: make test installs it, or "
        "pip install --no-deps --target that folder -c constraints.txt torchao gguf"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    done = subprocess.run(
        [*command, *FILES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(APART)])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout
