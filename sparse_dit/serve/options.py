"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field

from .claims import Policy


@dataclass(frozen=True)
class Limits:
    """What requests may ask for at most.

    Attributes:
        body: Bytes of a request.
        prompt: Characters of a prompt, and of a negative prompt.
        steps: Denoising steps.
        frames: Frames of video.
        pixels: Pixels of a frame.
        input_pixels: Pixels of an uploaded image.
        rate: Submissions of one client, as the package limits writes it.
    """

    body: int = 16 << 20
    prompt: int = 4096
    steps: int = 200
    frames: int = 512
    pixels: int = 1920 * 1088
    input_pixels: int = 4096 * 4096
    rate: str = "120/minute"


@dataclass(frozen=True)
class ServeOptions:
    """What a server is started with.

    Attributes:
        store: The database's URL.
        files: Folder of what jobs make.
        api_keys: One of them must come with each request, if there is any.
        hosts: Names that requests may call the server by, against pages that have it called by theirs;
            `"*"` for any.
        queue_size: Jobs that may wait.
        ttl: Seconds from its submission until a job and its files are deleted; None keeps them.
        max_store_bytes: Most bytes of all files; those of jobs that ended first are deleted. None: no limit.
        half_run: What becomes of a job that ran when the server ended.
        log_prompts: Whether the log holds prompts.
        fps: Frames a second of a video, if the request doesn't say.
        limits: See there.
    """

    store: str
    files: str
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("*",)
    queue_size: int = 64
    ttl: float | None = 7 * 24 * 3600
    max_store_bytes: int | None = 20 << 30
    half_run: Policy = "restart"
    log_prompts: bool = False
    fps: float = 8
    limits: Limits = field(default_factory=Limits)
