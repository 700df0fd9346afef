"""The kernel's C++ without Python: under sanitizers, and as Arm code in an emulator.

`native/driver.cpp` checks random problems against sums in double, and breaks indices and calls.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_dit.backends.cpu import library

ROOT = Path(__file__).resolve().parents[2]
NATIVE = Path(__file__).parent / "native"
CSRC = ROOT / "sparse_dit" / "backends" / "cpu" / "csrc"
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"
SANITIZERS = "-fsanitize=address,undefined"
SANITIZE = ["-O0", "-g1", SANITIZERS, "-fno-sanitize-recover=undefined"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux and GNU tools")


def build(folder: Path, compiler: str, flags: list[str], linked: list[str]) -> Path:
    """The driver, linked with the kernel as `setup.py` builds it.

    Args:
        folder: Where all of it is written.
        compiler: The command that compiles.
        flags: Compiles the kernel with these too; the driver checks, and is not itself checked.
        linked: Links the driver with these too.
    """
    environment = {**os.environ, "CXX": compiler, "CXXFLAGS": " ".join(flags)}
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    built = run(command, cwd=ROOT, env=environment)
    libraries = list(folder.rglob("libsparse_dit_cpu.so"))
    assert libraries, f"the kernel was not built:\n{built}"
    driver = folder / "driver"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *linked]
    command += [f"-I{CSRC}", str(NATIVE / "driver.cpp"), str(libraries[0]), "-pthread"]
    run([*command, f"-Wl,-rpath,{libraries[0].parent}", "-o", str(driver)])
    return driver


def run(command: list[str], **options: object) -> str:
    """What a command says; it must succeed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, (
        f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    )
    return done.stdout


def has_sanitizers(folder: Path) -> bool:
    """Whether the compiler makes programs with sanitizers that run here."""
    program, source = folder / "probe", folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = ["g++", *SANITIZE, str(source), "-o", str(program)]
    return (
        subprocess.run(command, capture_output=True).returncode == 0
        and subprocess.run([program], capture_output=True).returncode == 0
    )


def without_what_cannot_run(folder: Path) -> str:
    """g++ that refuses the flags of variants that this machine can't run: they are not compiled then."""
    runs = library.LIBRARY.runnable if library.LIBRARY else []
    lacks = [
        f for name, f in (("avx512_bf16", "avx512bf16"), ("avx512", "avx512f")) if name not in runs
    ]
    refused = "".join(f'case " $* " in *" -m{flag} "*) exit 1;; esac\n' for flag in lacks)
    compiler = folder / "g++"
    compiler.write_text(f'#!/bin/sh\n{refused}exec g++ "$@"\n')
    compiler.chmod(0o755)
    return str(compiler)


def test_no_step_outside_of_memory(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if not has_sanitizers(tmp_path):
        pytest.skip("g++ can't build for AddressSanitizer and UndefinedBehaviorSanitizer here")
    driver = build(tmp_path, without_what_cannot_run(tmp_path), SANITIZE, [SANITIZERS])
    said = run([str(driver), "20", "15"])
    assert "passed portable" in said
    if library.LIBRARY is not None:
        assert all(f"passed {name}\n" in said for name in library.LIBRARY.runnable)


def test_on_arm(tmp_path):
    missing = [x for x in (ARM_COMPILER, ARM_EMULATOR) if shutil.which(x) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}")
    driver = build(tmp_path, ARM_COMPILER, [], [])
    said = run([ARM_EMULATOR, "-L", ARM_LIBRARIES, str(driver), "12", "1"])
    assert "passed neon" in said and "passed portable" in said
