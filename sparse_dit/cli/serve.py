"""`sparse-dit serve`: a server for generations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Dtype, Size, with_options

if TYPE_CHECKING:
    from ..serve.options import ServeOptions

KEYS = "SPARSE_DIT_API_KEYS"
PROMPT, TEXT_PROMPT = 4096, 1 << 20  # characters that a prompt may have
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


@dataclass(frozen=True)
class Keeping:
    """The options that say what is kept, and for how long."""

    store: Annotated[
        str, typer.Option(help="Folder, or URL of a database such as postgresql+psycopg://....")
    ] = "sparse-dit-store"
    files: Annotated[
        Path | None, typer.Option(help="Folder of the files; default in the store's folder.")
    ] = None
    queue_size: Annotated[int, typer.Option(min=1, help="Jobs that may wait.")] = 64
    ttl: Annotated[
        float, typer.Option(min=0, help="Hours until a job and its files are deleted; 0: never.")
    ] = 168.0
    max_store_gb: Annotated[
        float, typer.Option(min=0, help="Of files, the oldest are deleted; 0: no limit.")
    ] = 20.0
    half_run: Annotated[
        str, typer.Option(help="restart or fail: jobs that ran when the server ended.")
    ] = "restart"


@dataclass(frozen=True)
class Guard:
    """The options that say who may ask for how much."""

    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"One of them must come with each request; repeatable, or in {KEYS}."),
    ] = None
    rate: Annotated[str, typer.Option(help="Submissions of one client.")] = "120/minute"
    max_frames: Annotated[int, typer.Option(min=1, help="Of a video.")] = 512
    max_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 200
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a frame.")] = 1920 * 1088
    max_prompt: Annotated[
        int | None, typer.Option(min=1, help="Characters; default 4096, a million for text.")
    ] = None
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 16 << 20
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts too.")] = False


@dataclass(frozen=True)
class Cluster:
    """The options of a server that is several replicas on Ray."""

    ray: Annotated[
        bool, typer.Option("--ray", help="Replicas on Ray Serve, which share the store.")
    ] = False
    min_replicas: Annotated[int, typer.Option(help="With --ray: at least so many.")] = 1
    max_replicas: Annotated[
        int, typer.Option(help="With --ray: at most so many, one for each job.")
    ] = 1
    replica_cpus: Annotated[float, typer.Option(help="With --ray: processors of each.")] = 1.0


@with_options
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of a diffusers pipeline, folder of a diffusion language model, "
            "tiny-wan or tiny-dlm."
        ),
    ],
    *,
    plan: Annotated[
        list[str] | None, typer.Option(help="A plan that requests may name; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    device: Annotated[
        list[str] | None, typer.Option(help="One worker each; repeatable: cuda:0, cuda:1.")
    ] = None,
    dtype: Dtype = None,
    fps: Annotated[float, typer.Option(help="Frames a second, if a request doesn't say.")] = 8.0,
    size: Size,
    keeping: Keeping,
    guard: Guard,
    cluster: Cluster,
) -> None:
    """Serve generations: /v1/videos in the shape of the OpenAI API, a queue on disk, a page.

    A diffusion language model is served at /v1/completions. The size options are defaults of what requests
    leave out; without them the first plan says.
    """
    from ..serve.command import Served, serve
    from ..serve.replicas import Scaling, serve_on_ray

    settings = {name: value for name, value in vars(size).items() if value is not None}
    served = Served(model, tuple(plan or ()), tuple(device or ("cpu",)), dtype, settings)
    made = _options(keeping, guard, fps, host, TEXT_PROMPT if served.writes else PROMPT)
    if cluster.ray:
        scaling = Scaling(cluster.min_replicas, cluster.max_replicas, cluster.replica_cpus)
        serve_on_ray(served, made, scaling, host=host, port=port)
    else:
        serve(served, made, host=host, port=port)


def _options(keeping: Keeping, guard: Guard, fps: float, host: str, prompt: int) -> ServeOptions:
    from ..outputs import check_writable
    from ..serve.options import Limits, ServeOptions
    from ..serve.tables import database_url

    if keeping.half_run not in ("restart", "fail"):
        raise ValueError(f"--half-run must be restart or fail, got {keeping.half_run!r}")
    if not 0 < fps <= 240:
        raise ValueError(f"--fps must be a number above 0, at most 240, got {fps}")
    is_url = "://" in keeping.store
    files = keeping.files or Path("sparse-dit-store" if is_url else keeping.store, "files")
    if not is_url:
        check_writable(Path(keeping.store, "jobs.sqlite"), "--store")
        Path(keeping.store).mkdir(parents=True, exist_ok=True)
    if keeping.files or is_url:
        check_writable(files / "result", "--files")
    keys = guard.api_key or [key for key in os.environ.get(KEYS, "").split(",") if key]
    return ServeOptions(
        store=database_url(keeping.store),
        files=str(files.absolute()),
        api_keys=tuple(keys),
        hosts=LOOPBACK if host in LOOPBACK else ("*",),
        queue_size=keeping.queue_size,
        ttl=keeping.ttl * 3600 or None,
        max_store_bytes=int(keeping.max_store_gb * (1 << 30)) or None,
        half_run=keeping.half_run,  # pyright: ignore[reportArgumentType]
        log_prompts=guard.log_prompts,
        fps=fps,
        limits=Limits(
            body=guard.max_body,
            prompt=guard.max_prompt or prompt,
            steps=guard.max_steps,
            frames=guard.max_frames,
            pixels=guard.max_pixels,
            rate=guard.rate,
        ),
    )
