"""Write prompts about drawn clips, with their answers, as files that commands read.

python -m demos.tiny_vlm.prompts prompts --size 64x8:3
sparse-dit search demos/tiny_vlm/model --text prompts/0-colour.safetensors ... --max-kl 0.03 --out plan.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from demos.tiny_vlm.inputs import video_inputs
from demos.tiny_vlm.measure import clips_of, parse_size
from demos.tiny_vlm.questions import QUESTIONS, tokens


def main(argv: list[str] | None = None) -> None:
    """One file for each clip and kind of question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--size", type=parse_size, required=True, help="PICTURESxSIDE:CLIPS")
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    for number, clips in enumerate(clips_of(given.size)):
        for kind, (known, right) in QUESTIONS.items():
            text = torch.cat([tokens((kind, "?")), tokens(known)[right(clips)]])
            inputs = video_inputs(clips.pixels, text[None])
            save_file(
                {name: x.contiguous() for name, x in inputs.items()},
                given.folder / f"{number}-{kind}.safetensors",
            )
    print(f"wrote {given.size.clips * len(QUESTIONS)} prompts to {given.folder}")


if __name__ == "__main__":
    main()
