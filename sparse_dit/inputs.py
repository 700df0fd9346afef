"""What the command line reads: prompts, and pipelines from a folder or the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .integrations import host_named
from .texts import lines_of, read_text, unfit

MAX_PROMPT_FILE = 1 << 20  # bytes
MAX_TEXT_FILE = 1 << 24
# classes of diffusion language models' pipelines
DENOISERS = ("LLaDA2Pipeline", "DiffusionGemmaPipeline")
DTYPES = ("float32", "bfloat16", "float16")


def read_prompts(texts: list[str], file: Path | None) -> list[str]:
    """Prompts given one by one and in a file, one a line; empty lines and `# ...` are skipped.

    Raises:
        ValueError: If there is no prompt in either, the file isn't text, or a prompt has control characters.
    """
    prompts = [text.strip() for text in texts]
    if not all(prompts):
        raise ValueError("a prompt must not be empty")
    if why := next(filter(None, map(unfit, prompts)), None):
        raise ValueError(f"a prompt {why}")
    if file is not None:
        prompts += _lines(file)
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT (repeatable) or --prompts FILE")
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        text = read_text(file, MAX_PROMPT_FILE)
    except ValueError as error:
        raise ValueError(f"prompt file {error}; one prompt a line is expected") from None
    found = []
    for number, line in enumerate(lines_of(text), 1):
        prompt = line.strip()
        if not prompt or prompt.startswith("#"):
            continue
        if why := unfit(prompt):
            raise ValueError(f"prompt file {file}, line {number}: a prompt {why}")
        found.append(prompt)
    if not found:
        raise ValueError(f"prompt file {file} holds no prompt: write one a line")
    return found


def read_texts(files: list[Path]) -> list[str | dict[str, Tensor]]:
    """The texts of files, whole; of a `.safetensors` file what a VLM's processor made of a prompt.

    Raises:
        ValueError: If one isn't text or is larger than 16 MB, or has no prompt in it.
    """
    return [_prompt(file) if file.suffix == ".safetensors" else _text(file) for file in files]


def _text(file: Path) -> str:
    try:
        return read_text(file, MAX_TEXT_FILE)
    except ValueError as error:
        raise ValueError(f"text file {error}") from None


def _prompt(file: Path) -> dict[str, Tensor]:
    try:
        inputs = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"prompt file {file} can't be read: {error}") from None
    if "input_ids" not in inputs:
        raise ValueError(
            f"prompt file {file} must hold what a VLM's processor makes, input_ids among it, "
            f"got {sorted(inputs)}"
        )
    return inputs


def check_language_model(name: str) -> None:
    """Raise ValueError unless the name is a language model's folder or could be one on the hub."""
    _check_searched(name)
    _check_named(name, ("config.json",), "a transformers model")


def load_language_model(name: str, device: str, dtype: str | None) -> tuple[Any, Any]:
    """A language model or VLM, and its tokenizer.

    Args:
        name: A folder or hub id.
        device, dtype: As `load_pipeline` takes them.

    Raises:
        ValueError: It can't be read, or the device or dtype isn't known here.
    """
    kind = _usable(device, dtype)
    host: Any = host_named("transformers")
    model, tokenizer = host.load(name, kind)
    return model.to(device), tokenizer


def is_denoiser(name: str) -> bool:
    """Whether a folder holds a diffusion language model, by its configuration files; no for a hub id."""
    kind = _config(Path(name) / "model_index.json").get("_class_name")
    config = _config(Path(name) / "config.json")
    return kind in DENOISERS or config.get("is_causal") is False or "canvas_length" in config


def _config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(file))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_denoiser(name: str, device: str, dtype: str | None, *, weights: bool = True) -> Any:
    """The pipeline of a diffusion language model, with its tokenizer.

    Args:
        name: A folder or hub id.
        device, dtype: As `load_pipeline` takes them.
        weights: Whether they are read; without them it can't write, but what it is made of is there.

    Raises:
        ValueError: It can't be read or is of another kind, or the device or dtype isn't known here.
    """
    kind = _usable(device, dtype)
    host: Any = host_named("transformers")
    if not weights:
        return host.outline_denoiser(name, kind)
    return host.load_denoiser(name, kind).to(device)


def check_model(name: str) -> None:
    """Raise ValueError unless the name is a pipeline's folder or could be one on the hub."""
    _check_searched(name)
    files = ("model_index.json", "modular_model_index.json")
    folder = Path(name)
    if "model_type" in _config(folder / "config.json") and not any(
        (folder / file).exists() for file in files
    ):
        raise ValueError(
            f"{name} is a language model, and this takes a diffusers pipeline; a language model is taken by "
            "sparse-dit search, eval and eval frontier, with --text FILE"
        )
    _check_named(name, files, "a diffusers pipeline")


def _check_searched(name: str) -> None:
    """Raise ValueError for a diffusion language model: its plans are rules, which no command searches."""
    if is_denoiser(name):
        raise ValueError(
            f"{name} is a diffusion language model, which takes a rule (online, sparsed, mage) in place of a "
            f"searched plan: sparse-dit eval frontier --model {name} --text FILE measures them"
        )


def _check_named(name: str, files: tuple[str, ...], what: str) -> None:
    """Raise ValueError unless a folder of this name has one of the files, or a hub could know it."""
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in files):
            raise ValueError(f"{name} has no {' or '.join(files)}: it must be {what}")
    elif folder.exists():
        raise ValueError(f"{name} is a file: give the folder of {what}")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"no folder {name}: give {what}'s folder or hub id")


def described(name: str, device: str, dtype: str | None) -> Any | None:
    """The pipeline without its weights, to check before they are read whether it can do what is asked.

    Args:
        name, device, dtype: As `load_pipeline` takes them.

    Returns:
        See `Host.outline`; None where only the loaded pipeline can tell.

    Raises:
        ValueError: It can't be read, or the device or dtype isn't known here.
    """
    kind = _checked(name, device, dtype)
    try:
        return host_named("diffusers").outline(name, kind)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error


def load_pipeline(name: str, device: str, dtype: str | None, *, weights: bool = True) -> Any:
    """A pipeline in inference form.

    Args:
        name: Folder, or hub id (which may download it).
        device: Where it runs.
        dtype: In `DTYPES`; None is float32 on the CPU and bfloat16 elsewhere.
        weights: Whether its transformers are read; see `Host.load`.

    Raises:
        ValueError: If the model can't be read, or the device doesn't exist.
    """
    kind = _checked(name, device, dtype)
    try:
        pipe = host_named("diffusers").load(name, kind, weights)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _unreadable(name, error) from error
    return pipe.to(device)


def _checked(name: str, device: str, dtype: str | None) -> torch.dtype:
    """The dtype that is asked for, or what suits the device, once a model can be read so."""
    check_model(name)
    return _usable(device, dtype)


def _usable(device: str, dtype: str | None) -> torch.dtype:
    """The dtype that is asked for, or what suits the device, if both are known here."""
    check_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))


def _unreadable(name: str, error: Exception) -> ValueError:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ValueError(f"{name} can't be loaded as a diffusers pipeline: {first}")


def check_device(device: str) -> None:
    """Raise ValueError unless torch has this device here."""
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; try cpu or cuda") from None
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {device} here: torch sees {torch.cuda.device_count()} GPUs")
    if parsed.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("no device mps here")
    if parsed.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be cpu, cuda or mps, got {device!r}")
