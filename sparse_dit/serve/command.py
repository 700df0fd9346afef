"""Starts a server of a model: what `sparse-dit serve` does."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import uvicorn

from ..denoising import canvas_length
from ..eval.denoising.writing import CANVAS_STEPS, Writing
from ..generation import GenerationSettings
from ..inputs import check_device, check_model, described, is_denoiser, load_denoiser
from ..patch import patch
from ..resources import shipped
from .app import create_app
from .card import Card, checker
from .engine import load_engine
from .files import Files
from .options import ServeOptions
from .plans import Plans, load_plans
from .service import Service
from .store import Store
from .text.card import TextCard
from .text.engine import load_text_engine, text_plans
from .worker import WorkerOptions

EMBEDDED = {"tiny-wan": "tiny_wan", "tiny-dlm": "tiny_dlm"}  # models that the package carries
FALLBACK = {"steps": 20, "guidance": 5.0}


@dataclass(frozen=True)
class Served:
    """What is served.

    Args:
        model: Folder or hub id of a pipeline, a folder of a diffusion language model, or `"tiny-wan"` or
            `"tiny-dlm"`.
        plans: Names of plans.
        devices: One worker each.
        dtype: See `load_pipeline`.
        settings: Size, steps and guidance, as far as they were given.
    """

    model: str
    plans: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    dtype: str | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def path(self) -> str:
        """The folder or hub id."""
        return str(shipped(EMBEDDED[self.model])) if self.model in EMBEDDED else self.model

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.model.rstrip("/").rpartition("/")[2]

    @property
    def writes(self) -> bool:
        """Whether it is a diffusion language model; no for a hub id, whose files aren't read for it."""
        return is_denoiser(self.path)


def prepared(served: Served, options: ServeOptions) -> tuple[Service, list[WorkerOptions]]:
    """The service, and its workers' options; all that can be wrong shows here, before weights are read.

    Raises:
        ValueError, TypeError, NotImplementedError: If the model, a plan, a device or the store won't do.
    """
    for device in served.devices:
        check_device(device)
    if served.writes:
        card = text_card_of(served)
        load = load_text_engine
    else:
        check_model(served.path)
        plans = load_plans(served.plans)
        outline = described(served.path, served.devices[0], served.dtype)
        if outline is not None:
            _check_plans(outline, plans)
        card = card_of(served, plans, outline, options)
        load = load_engine
    service = Service(Store(options.store), Files(Path(options.files)), card, options)
    workers = [
        WorkerOptions(
            functools.partial(load, served.path, served.dtype, served.plans),
            device,
            card.name,
            options.store,
            options.files,
            options.limits.input_pixels,
        )
        for device in served.devices
    ]
    return service, workers


def card_of(served: Served, plans: Plans, outline: Any, options: ServeOptions) -> Card:
    """What is known of the model before it is loaded.

    Raises:
        ValueError: If no plan and no option says a size.
    """
    known: dict[str, Any] = next((p.settings for p in plans.values() if p.settings), {})
    given = dict(served.settings or {})
    values = {**FALLBACK, **known, **given}
    if missing := [f"--{side}" for side in ("height", "width") if side not in values]:
        raise ValueError(f"give {' and '.join(missing)}: no plan says a size")
    kind, image = _makes(outline)
    settings = GenerationSettings.from_dict(values)
    kind = kind or ("video" if settings.num_frames > 1 else "image")
    return Card(served.name, kind, settings, options.fps, plans, image, checker(outline))


def text_card_of(served: Served) -> TextCard:
    """What is known of a diffusion language model before its weights are read.

    Raises:
        ValueError, TypeError, NotImplementedError: If it can't be read, or a plan or option isn't for it.
    """
    given = dict(served.settings or {})
    steps = given.pop("steps", None)
    if given:
        raise ValueError(
            f"--{sorted(given)[0].replace('_', '-')} is for videos and images: leave it out, as "
            f"{served.name} writes text"
        )
    outline = load_denoiser(served.path, served.devices[0], served.dtype, weights=False)
    plans = text_plans(outline, served.plans)
    _check_plans(outline, plans)
    canvas = canvas_length(outline.model)
    writing = Writing() if canvas is None else Writing(block=canvas, steps=CANVAS_STEPS)
    if steps is not None:
        writing = replace(writing, steps=steps)
    return TextCard(served.name, plans, writing, outline)


def _check_plans(outline: Any, plans: Plans) -> None:
    """Raise what `patch` does if a plan isn't for this pipeline."""
    for one in plans.values():
        with patch(outline, one.plan):
            pass


def serve(
    served: Served, options: ServeOptions, *, host: str, port: int, log: str = "info"
) -> None:
    """Serve until stopped.

    Raises:
        ValueError, TypeError, NotImplementedError, OSError: If it can't be started.
    """
    configure_log(log)
    service, workers = prepared(served, options)
    app = create_app(service, workers)
    uvicorn.run(app, host=host, port=port, log_level=log, server_header=False)


def configure_log(level: str) -> None:
    """Let the server's own lines be seen beside uvicorn's."""
    logging.basicConfig(format="%(levelname)s:     %(message)s")
    logging.getLogger("sparse_dit").setLevel(level.upper())


def _makes(outline: Any) -> tuple[Literal["video", "image"] | None, Literal["no", "may", "must"]]:
    """What a pipeline makes, None if it isn't known, and whether it takes an image."""
    if outline is None:
        return None, "may"
    parameters = inspect.signature(type(outline).__call__).parameters
    kind = "video" if "num_frames" in parameters else "image"
    if "image" not in parameters:
        return kind, "no"
    return kind, "must" if parameters["image"].default is inspect.Parameter.empty else "may"
