"""Compile the CPU kernel, and put the shipped plans and the embedded model inside of the package.

The kernel is plain C++ without Python or torch, so the compiler at hand is called directly: each
`variant_*.cpp` with the flags of its instruction set, all linked into one library beside
`library.py`, which opens it through ctypes. A wheel so made fits any Python 3 of its platform.
Where there is no compiler the package installs without the library, and says so when it runs.

Plans and model lie at the top of the repository, where a reader looks for them; an installed package
carries them as `sparse_dit/_profiles`, `sparse_dit/_tiny_wan` and `sparse_dit/_tiny_dlm` (see
`sparse_dit/resources.py`).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
SHIPPED = {
    "_profiles": HERE / "profiles",
    "_tiny_wan": HERE / "demos" / "tiny_wan" / "model",
    "_tiny_dlm": HERE / "demos" / "tiny_dlm" / "model",
}
IGNORED = shutil.ignore_patterns(".*", "__pycache__")

LIBRARY = Path("sparse_dit/backends/cpu/libsparse_dit_cpu")
CSRC = Path("sparse_dit/backends/cpu/csrc")
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # or comparisons of floats aren't vectorised
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")
# Weakest first, and linked in this order: where two units hold the same inline function, the linker
# keeps the first, which must not use instructions that the machine may lack.
VARIANTS = {
    "portable": (None, []),
    "neon": (ARM, []),
    "avx2": (X86, AVX2),
    "avx512": (X86, AVX512),
    "avx512_bf16": (X86, [*AVX512, "-mavx512bf16"]),
}


class BuildKernel(build_ext):
    """Calls the compiler; the "extension" that setuptools sees is a plain shared library."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + SUFFIX

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            self.warn(
                "no C++ compiler (CXX, c++, g++, clang++): sparse_dit is installed without its "
                "native CPU kernel, and attention on the CPU will be several times slower"
            )
            return
        library, objects = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "kernel"
        shutil.rmtree(objects, ignore_errors=True)
        objects.mkdir(parents=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        units = compile_plan(compiler)
        self.announce(
            f"compiling the CPU kernel with {shlex.join(compiler)}: {', '.join(units)}", 2
        )
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))

        def compile_unit(unit: str) -> str:
            target = str(objects / f"{unit}.o")
            source = str(HERE / CSRC / f"{unit}.cpp")
            run([*compiler, *FLAGS, *units[unit], *extra, "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            linked = list(pool.map(compile_unit, units))
        linked += shlex.split(os.environ.get("LDFLAGS", ""))
        run([*compiler, "-shared", "-pthread", *extra, *linked, "-o", str(library)])


def find_compiler() -> list[str] | None:
    """Command of the C++ compiler; None if there is none."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def compile_plan(compiler: list[str]) -> dict[str, list[str]]:
    """Units to compile, each with its own flags: those of the target that the compiler knows."""
    target = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True).stdout
    machine = target.partition("-")[0].strip().lower() or platform.machine().lower()
    variants = {
        name: flags
        for name, (machines, flags) in VARIANTS.items()
        if (HERE / CSRC / f"variant_{name}.cpp").exists()
        and (machines is None or machine in machines)
        and accepts(compiler, flags)
    }
    units = {
        path.stem: []
        for path in sorted((HERE / CSRC).glob("*.cpp"))
        if not path.stem.startswith("variant_")
    }
    units["variants"] = [f"-DSPARSE_DIT_{name.upper()}" for name in variants]
    return units | {f"variant_{name}": flags for name, flags in variants.items()}


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows the flags."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return not flags or subprocess.run(command, input=b"", capture_output=True).returncode == 0


def run(command: list[str]) -> None:
    """Run a compiler; what it says goes into the error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


class PlatformWheel(bdist_wheel):
    """With the library a wheel fits one platform and any Python 3; without it, everything."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()[2].replace("universal2", platform.machine())
        built = Path(self.get_finalized_command("build_ext").build_lib) / LIBRARY
        return "py3", "none", tag if built.with_suffix(SUFFIX).exists() else "any"


class BuildWithShippedFolders(build_py):
    """Copies the shipped folders into a wheel; an editable install reads the checkout's own."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        target = Path(self.build_lib) / "sparse_dit"
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left is not this wheel's
        super().run()
        for name, source in SHIPPED.items():
            if not source.is_dir():
                raise FileNotFoundError(f"the build needs the folder {source}: check it out again")
            shutil.copytree(source, target / name, ignore=IGNORED)


setup(
    cmdclass={
        "bdist_wheel": PlatformWheel,
        "build_ext": BuildKernel,
        "build_py": BuildWithShippedFolders,
    },
    ext_modules=[
        Extension(
            ".".join(LIBRARY.parts),
            sources=[str(p.relative_to(HERE)) for p in sorted((HERE / CSRC).glob("*.cpp"))],
            depends=[str(p.relative_to(HERE)) for p in sorted((HERE / CSRC).glob("*.[hi]*"))],
            optional=True,
        )
    ],
)
