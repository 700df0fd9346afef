"""Make the finished job that the server's page shows on the first visit: dense beside sparse.

    python -m demos.tiny_wan.example

It is a job of a real server's worker, on this machine, which should have nothing else to do: the page shows
its seconds. Written to sparse_dit/serve/static.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import tempfile
from pathlib import Path

import torch

from sparse_dit.environment import cpu_name
from sparse_dit.serve.answers import video_of
from sparse_dit.serve.claims import Claims, Worker
from sparse_dit.serve.command import Served, prepared
from sparse_dit.serve.example import FILE, SHOWN, STATIC, Example, example_name
from sparse_dit.serve.media import VARIANTS
from sparse_dit.serve.options import ServeOptions
from sparse_dit.serve.requests import VideoRequest
from sparse_dit.serve.running import Runner
from sparse_dit.serve.tables import database_url

NAME = "tiny-wan"  # the model, and its plan
PROMPT, SEED = "a red square moves up over gray checks", 7


def main() -> None:
    """Run the job, and keep its two videos and what is said of it."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = ServeOptions(store=database_url(folder), files=str(Path(folder) / "files"))
        service, (worker,) = prepared(Served(NAME, (NAME,)), options)
        engine = worker.load(worker.device)
        claims = Claims(service.store)
        here = Worker("here", worker.model, worker.device, engine.plans.names)
        runner = Runner(engine, claims, service.files, worker.most_pixels)
        for steps in (1, None):  # the first job builds what the second one finds
            asked = VideoRequest(prompt=PROMPT, seed=SEED, compare=True, num_inference_steps=steps)
            id = service.submit(asked, None, None).id
            job = claims.claim(here)
            assert job is not None and job.id == id
            runner.run(job)
        job = service.job(id, "video")
        assert job.status == "completed", job.error
        for variant in SHOWN:
            file = service.files.file(job, VARIANTS[variant][0])
            assert file is not None
            shutil.copy(file, STATIC / example_name(variant))
        video = video_of(job).model_copy(update={"previews": [], "variants": list(SHOWN)})
        service.store.close()
    threads = torch.get_num_threads()
    machine = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    today = datetime.datetime.now(datetime.timezone.utc).date()
    made = Example(video=video, machine=machine, made=today)
    FILE.write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(f"{video.psnr_db} dB, {video.inference_time_s} s sparse, {video.dense_time_s} s dense")


if __name__ == "__main__":
    main()
