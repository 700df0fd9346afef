"""Starts a server of a model: what `sparse-dit serve` does."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import uvicorn

from ..generation import GenerationSettings
from ..inputs import check_device, check_model, described
from ..patch import patch
from ..resources import shipped
from .app import create_app
from .card import Card, checker
from .engine import LoadPipeline
from .files import Files
from .options import ServeOptions
from .plans import Plans, load_plans
from .service import Service
from .store import Store
from .worker import WorkerOptions

EMBEDDED = "tiny-wan"  # the model that the package carries, and its plan
FALLBACK = {"steps": 20, "guidance": 5.0}


@dataclass(frozen=True)
class Served:
    """What is served.

    Args:
        model: Folder or hub id of a pipeline, or `"tiny-wan"`.
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
        return str(shipped("tiny_wan")) if self.model == EMBEDDED else self.model


def prepared(served: Served, options: ServeOptions) -> tuple[Service, list[WorkerOptions]]:
    """The service, and its workers' options; all that can be wrong shows here, before weights are read.

    Raises:
        ValueError, TypeError, NotImplementedError: If the model, a plan, a device or the store won't do.
    """
    for device in served.devices:
        check_device(device)
    check_model(served.path)
    plans = load_plans(served.plans)
    outline = described(served.path, served.devices[0], served.dtype)
    if outline is not None:
        for one in plans.values():
            with patch(outline, one.plan):  # raises if it isn't for this pipeline
                pass
    card = card_of(served, plans, outline, options)
    service = Service(Store(options.store), Files(Path(options.files)), card, options)
    load = LoadPipeline(served.path, served.dtype, served.plans)
    workers = [
        WorkerOptions(
            load, device, card.name, options.store, options.files, options.limits.input_pixels
        )
        for device in served.devices
    ]
    return service, workers


def card_of(served: Served, plans: Plans, outline: Any, options: ServeOptions) -> Card:
    """What is known of the model before it is loaded.

    Raises:
        ValueError: If no plan and no option says a size.
    """
    name = served.model.rstrip("/").rpartition("/")[2]
    known: dict[str, Any] = next((p.settings for p in plans.values() if p.settings), {})
    given = dict(served.settings or {})
    values = {**FALLBACK, **known, **given}
    if missing := [f"--{side}" for side in ("height", "width") if side not in values]:
        raise ValueError(f"give {' and '.join(missing)}: no plan says a size")
    kind, image = _makes(outline)
    settings = GenerationSettings.from_dict(values)
    kind = kind or ("video" if settings.num_frames > 1 else "image")
    return Card(name, kind, settings, options.fps, plans, image, checker(outline))


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
