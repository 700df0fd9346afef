"""A server of a tiny random diffusion language model, with a worker in this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from sparse_dit.serve.app import create_app
from sparse_dit.serve.command import Served, prepared
from sparse_dit.serve.options import ServeOptions
from sparse_dit.serve.service import Service
from tests.helpers.serve_cases import MODEL, store_url
from tests.helpers.tiny_canvases import bytes_writer, canvas_writer


def save_writer(folder: Path) -> Path:
    """A folder of a model whose tokens are bytes."""
    pipe, model = bytes_writer(), folder / MODEL
    pipe.save_pretrained(model)
    pipe.tokenizer.save_pretrained(model / "tokenizer")
    return model


def save_canvas_writer(folder: Path) -> Path:
    """The same of DiffusionGemma's pipeline."""
    model = folder / MODEL
    canvas_writer().save_pretrained(model)
    return model


def text_service(folder: Path, model: Path, plans: Any = (), **options: Any) -> tuple[Service, Any]:
    """What a server has before it is asked, and what loads its engine."""
    made = ServeOptions(store=store_url(folder), files=str(folder / "files"), **options)
    service, (worker,) = prepared(Served(str(model), tuple(plans)), made)
    return service, worker.load


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """The address of a server that listens beside the block; no test client can close a stream early."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(service), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
