"""Measure the embedded model: validation loss, and how well its videos follow their prompts.

    python -m demos.tiny_wan.measure demos/tiny_wan/model --sheet samples.png

Prompts, seeds, clips and noise are fixed and none is selected, so two folders compare like for
like. Recognition is by the rules of `recognise.py`; its score on drawn clips that went through the
VAE is printed as the ceiling.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from demos.tiny_wan.recognise import Reading, read_video
from demos.tiny_wan.text import encode
from demos.tiny_wan.vae import PatchEncoder
from sparse_dit.eval.draw import Scene, all_prompts, draw, draw_prompt, parse_prompt

TEXT_LEN = 32
WORDS = tuple(field.name for field in fields(Scene))


@dataclass(frozen=True)
class Size:
    """`num_frames` as given to the pipeline (odd; it returns one more), and how many samples."""

    height: int
    width: int
    num_frames: int
    samples: int

    @property
    def tokens(self) -> int:
        return (self.num_frames + 1) // 2 * (self.height // 8) * (self.width // 8)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames + 1}"


def parse_size(text: str) -> Size:
    """A size such as `128x128x15:12`: height, width, num_frames, number of samples."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTHxFRAMES:SAMPLES, got {text!r}")
    return Size(*map(int, match.groups()))


def eval_prompts(count: int) -> list[str]:
    """The first `count` of all prompts in a fixed, random order."""
    return Random(7).sample(all_prompts(), len(all_prompts()))[:count]


@torch.no_grad()
def validation_loss(pipe: WanPipeline, size: Size, sigma: float, clips: int = 4) -> float:
    """Mean squared error of the velocity on drawn clips; clips and noise are always the same."""
    rng, generator = Random(2026), torch.Generator().manual_seed(2026)
    encode_video = PatchEncoder(pipe.vae)
    total = 0.0
    for _ in range(clips):
        video, prompt = draw(size.num_frames + 1, size.height, size.width, rng)
        latents = encode_video(video[None])
        noise = torch.randn(latents.shape, generator=generator)
        text, _ = encode(pipe.tokenizer, pipe.text_encoder, [prompt], TEXT_LEN)
        velocity = pipe.transformer(
            torch.lerp(latents, noise, sigma),
            torch.tensor([1000 * sigma]),
            text,
            return_dict=False,
        )[0]
        total += (velocity - (noise - latents)).square().mean().item()
    return total / clips


def arguments(size: Size, steps: int, guidance: float) -> dict[str, Any]:
    """What a pipeline is called with, beside the prompt."""
    return {
        "height": size.height,
        "width": size.width,
        "num_frames": size.num_frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "max_sequence_length": TEXT_LEN,
    }


def sample(pipe: WanPipeline, size: Size, steps: int, guidance: float) -> list[Tensor]:
    """One video `[3, T, H, W]` in -1..1 for each prompt; prompt number i has seed i."""
    prompts = eval_prompts(size.samples)
    at_once = max(1, 2048 // size.tokens)
    videos: list[Tensor] = []
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        seeds = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
        given = arguments(size, steps, guidance)
        result = pipe(prompt=part, generator=seeds, output_type="pt", **given)
        videos.extend(video.transpose(0, 1) * 2 - 1 for video in result.frames)
    return videos


@torch.no_grad()
def drawn_videos(pipe: WanPipeline, size: Size) -> list[Tensor]:
    """The same prompts, drawn, through the VAE: the best that a perfect model could do."""
    videos = []
    for seed, prompt in enumerate(eval_prompts(size.samples)):
        frames = (size.num_frames + 2) // 4 * 4 + 1  # the encoder drops what is not 4 n + 1
        video = draw_prompt(prompt, frames, size.height, size.width, Random(seed))
        latents = pipe.vae.encode(video[None]).latent_dist.mode()
        videos.append(pipe.vae.decode(latents).sample[0].clamp(-1, 1))
    return videos


def score(videos: list[Tensor], prompts: list[str]) -> dict[str, float]:
    """Share of right words per attribute, of all five right at once, and the mean template fit."""
    readings = [read_video(video) for video in videos]
    pairs = [
        tuple(a == b for a, b in zip(astuple(reading.scene), astuple(asked), strict=True))
        for reading, asked in zip(readings, map(parse_prompt, prompts), strict=True)
    ]
    result = {word: sum(p[i] for p in pairs) / len(pairs) for i, word in enumerate(WORDS)}
    result["all five"] = sum(all(p) for p in pairs) / len(pairs)
    result["fit"] = _mean_fit(readings)
    return result


def _mean_fit(readings: list[Reading]) -> float:
    return sum(reading.fit for reading in readings) / len(readings)


def contact_sheet(videos: list[Tensor], columns: int = 5, height: int = 96) -> Image.Image:
    """One row a video, frames from the first to the last from left to right."""
    rows = []
    for video in videos:
        picks = torch.linspace(0, video.shape[1] - 1, columns).round().long()
        strip = torch.cat(list(video[:, picks].unbind(1)), 2)  # [3, H, columns * W]
        pixels = ((strip + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
        image = Image.fromarray(pixels.numpy())
        rows.append(image.resize((round(image.width * height / image.height), height)))
    sheet = Image.new("RGB", (max(r.width for r in rows), height * len(rows)))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * height))
    return sheet


def print_losses(pipe: WanPipeline, sizes: list[Size], sigmas: tuple[float, ...]) -> None:
    print("| size | tokens | " + " | ".join(f"loss at sigma {s}" for s in sigmas) + " |")
    print("|---" * (2 + len(sigmas)) + "|", flush=True)
    for size in sizes:
        clips = 8 if size.tokens <= 2048 else 2
        losses = [f"{validation_loss(pipe, size, sigma, clips):.4f}" for sigma in sigmas]
        print(f"| {size} | {size.tokens} | " + " | ".join(losses) + " |", flush=True)


def print_scores(
    pipe: WanPipeline, sizes: list[Size], settings: dict[str, float], sheet: Path | None
) -> None:
    print("\n| size | samples | source | " + " | ".join((*WORDS, "all five", "fit")) + " |")
    print("|---" * (5 + len(WORDS)) + "|", flush=True)
    for size in sizes:
        prompts = eval_prompts(size.samples)
        sources = {"model": partial(sample, **settings), "ceiling": drawn_videos}
        for name, source in sources.items():
            videos = source(pipe, size)
            shares = " | ".join(f"{x:.2f}" for x in score(videos, prompts).values())
            print(f"| {size} | {size.samples} | {name} | {shares} |", flush=True)
            if sheet and name == "model":
                path = sheet.with_stem(f"{sheet.stem}-{size}") if len(sizes) > 1 else sheet
                contact_sheet(videos).save(path, optimize=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="pipeline folder to measure")
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="*",
        default=[parse_size("64x64x15:24"), parse_size("128x128x15:12")],
        help="what to sample, as HEIGHTxWIDTHxFRAMES:SAMPLES with an odd number of frames",
    )
    parser.add_argument(
        "--loss-sizes",
        type=parse_size,
        nargs="*",
        default=[
            parse_size(f"{side}x{side}x{frames}:0")
            for side, frames in ((64, 7), (64, 15), (128, 15), (192, 15), (256, 17))
        ],
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--shift", type=float, help="scheduler shift instead of the folder's")
    parser.add_argument("--sheet", type=Path, help="PNG file for the sampled frames")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # the pipeline remarks on every odd number of frames
    logging.disable_progress_bar()
    pipe = WanPipeline.from_pretrained(args.folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.shift is not None:
        config = {**pipe.scheduler.config, "shift": args.shift}
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    if args.loss_sizes:
        print_losses(pipe, args.loss_sizes, (0.3, 0.6, 0.9))
    if args.sizes:
        settings = {"steps": args.steps, "guidance": args.guidance}
        print_scores(pipe, args.sizes, settings, args.sheet)


if __name__ == "__main__":
    main()
