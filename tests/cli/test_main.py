import subprocess
import sys

MISSING = "import sys; sys.modules['typer'] = None; from sparse_dit.__main__ import main; main()"


def test_a_missing_extra_is_one_line_that_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: the command line needs typer, which isn't installed: pip install 'sparse_dit[all]'"
    ]


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "sparse_dit", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "search" in done.stdout
