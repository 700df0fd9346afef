"""Where numbers were measured: versions, device, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .backends.cpu import library
from .version import VERSION

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "scipy")


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """What a number depends on beside the code, as readable text by name."""
    device = torch.device(device)
    found = {
        "sparse_dit": VERSION,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{cpu_name()}, {os.cpu_count()} logical cores",
        "threads": str(torch.get_num_threads()),
        "device": str(device),
        "cpu kernel": library.LIBRARY.running if library.LIBRARY else f"none: {library.PROBLEM}",
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def cpu_name() -> str:
    """The processor's name, as its maker calls it where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
