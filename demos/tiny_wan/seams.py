"""How visible the borders of 8x8 patches are in the model's videos, and a picture of them.

    python -m demos.tiny_wan.seams demos/tiny_wan/model --vae another_vae --sheet seams.png

The same generated latents, and the same drawn clips, go through the folder's decoder and those of `--vae`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from demos.tiny_wan.measure import Size, arguments, eval_prompts, parse_size
from demos.tiny_wan.vae import PATCH, PatchEncoder
from sparse_dit.eval.draw import draw_prompt
from sparse_dit.eval.metrics import psnr

SIDE = 384  # pixels of a picture's side on the sheet


def seam_ratio(videos: Sequence[Tensor]) -> float:
    """How much more brightness steps at patch borders than elsewhere; videos are `[3, T, H, W]`.

    The step from a pixel to its neighbour, less the mean of the steps before and after it, so that a slope
    counts nothing: the mean of its absolute values at borders over their mean within patches, along rows and
    columns alike. In drawn clips it is about 1.
    """
    border, within = [], []
    for video in videos:
        gray = video.float().mean(0)
        for lines in (gray, gray.mT):
            steps = lines.diff(dim=-1)
            before, step, after = steps[..., :-2], steps[..., 1:-1], steps[..., 2:]
            bend = (step - (before + after) / 2).abs()
            at_border = torch.arange(1, bend.shape[-1] + 1) % PATCH == PATCH - 1
            border.append(bend[..., at_border].mean())
            within.append(bend[..., ~at_border].mean())
    return (torch.stack(border).mean() / torch.stack(within).mean()).item()


def psnr_of(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Mean PSNR in dB of videos `[3, T, H, W]` in -1..1."""
    pairs = [[(x.movedim(0, -1) + 1) / 2 for x in pair] for pair in zip(found, true, strict=True)]
    return fmean(psnr(*pair) for pair in pairs)


@torch.no_grad()
def decoded(vae: AutoencoderKLWan, latents: Sequence[Tensor]) -> list[Tensor]:
    """Videos of the pipeline's normalised latents `[1, 16, T, h, w]`."""
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return [vae.decode(x * std).sample[0].clamp(-1, 1) for x in latents]


def generated(pipe: WanPipeline, size: Size, steps: int, guidance: float) -> list[Tensor]:
    """Latents of the first of `eval_prompts`; prompt number i has seed i."""
    given = arguments(size, steps, guidance)
    seeded = [
        (torch.Generator().manual_seed(n), p) for n, p in enumerate(eval_prompts(size.samples))
    ]
    return [pipe(p, generator=g, output_type="latent", **given).frames for g, p in seeded]


def sheet(columns: Sequence[Sequence[Tensor]]) -> Image.Image:
    """The middle frame of every video, a row a video, a column a source, without smoothing."""
    picture = Image.new("RGB", (SIDE * len(columns), SIDE * len(columns[0])))
    for x, column in enumerate(columns):
        for y, video in enumerate(column):
            frame = ((video[:, video.shape[1] // 2] + 1) * 127.5).round().clamp(0, 255).byte()
            image = Image.fromarray(frame.permute(1, 2, 0).numpy())
            large = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            picture.paste(large, (x * SIDE, y * SIDE))
    return picture


def main(argv: list[str] | None = None) -> None:
    """Print the PSNR of drawn clips after the VAE, and seams of drawn, coded and generated videos."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="pipeline folder to measure")
    parser.add_argument("--vae", type=Path, nargs="*", default=[], help="other VAEs, as folders")
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        default=[parse_size("192x192x15:4"), parse_size("256x256x17:2")],
        help="HEIGHTxWIDTHxFRAMES:SAMPLES with an odd number of frames",
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path, help="PNG file: coded and generated, a pair a VAE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    pipe = WanPipeline.from_pretrained(args.folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    vaes = {args.folder / "vae": pipe.vae}
    vaes |= {path: AutoencoderKLWan.from_pretrained(path).to(torch.float32) for path in args.vae}
    print("| size | decoder | coded, dB | seams drawn | coded | generated |")
    print("|---" * 6 + "|", flush=True)
    for size in args.sizes:
        pixels = size.num_frames + 1, size.height, size.width
        prompts = eval_prompts(size.samples)
        drawn = [draw_prompt(text, *pixels, Random(seed)) for seed, text in enumerate(prompts)]
        made, columns = generated(pipe, size, args.steps, args.guidance), []
        for path, vae in vaes.items():
            coded = decoded(vae, [PatchEncoder(vae)(video[None]) for video in drawn])
            columns += [coded, decoded(vae, made)]
            ratios = " | ".join(f"{seam_ratio(videos):.2f}" for videos in (drawn, *columns[-2:]))
            print(f"| {size} | {path} | {psnr_of(coded, drawn):.1f} | {ratios} |", flush=True)
        if args.sheet:
            path = args.sheet.with_stem(f"{args.sheet.stem}-{size}")
            sheet(columns).save(path, optimize=True)


if __name__ == "__main__":
    main()
