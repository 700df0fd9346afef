"""Tests marked `fresh` run in the warm process, in a thread that has run nothing, in such a process.

What is set up or compiled at first use may differ from later use, and a warm process hides that.
"""

import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pytest

PLACES = ("here", "new thread", "new process")
SECONDS = 120  # that one test may take in a process of its own
FRESH = multiprocessing.get_context("forkserver")

# imported once, by a server that each process is a fork of; it has run nothing, so it has no threads
FRESH.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo.testing",
        "sparse_dit.integrations.diffusers",
        "diffusers.hooks.context_parallel",
        *(
            f"diffusers.pipelines.{name}"
            for name in (
                "wan.pipeline_wan",
                "flux.pipeline_flux",
                "ltx.pipeline_ltx",
                "cogvideo.pipeline_cogvideox",
                "hunyuan_video.pipeline_hunyuan_video",
            )
        ),
    ]
)


class Alone:
    """A plugin by whose presence a test knows that it runs in a process of its own."""


def in_thread(run) -> None:
    """`run()` in a new thread; raises what it raises."""
    errors: list[BaseException] = []

    def body():
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def in_process(test: str, root: Path, log: Path) -> None:
    """One test by its node id in a process that has only imported; raises with what pytest printed there."""
    process = FRESH.Process(target=_alone, args=(test, root, log))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
    if process.exitcode != 0:
        raise AssertionError(f"in a process of its own {test} fails:\n{log.read_text()}")


def _alone(test: str, root: Path, log: Path) -> None:
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(root)
    sys.exit(pytest.main([test, "-q", "-p", "no:cacheprovider"], plugins=[Alone()]))
