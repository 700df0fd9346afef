"""The plan of SmolLM2-135M-Instruct (made by demos/smollm2/make.py), for its folder in profiles/.

python search/smollm2_135m_instruct.py smollm2 --force
"""

from __future__ import annotations

import argparse
import inspect
import typing
from pathlib import Path

from sparse_dit.inputs import load_language_model
from sparse_dit.search.language import search_language_model

PLAN = Path(__file__).resolve().parent.parent / "profiles" / "smollm2-135m-instruct" / "plan.json"
CALIBRATION = (argparse,)  # modules whose source is read
HELD_OUT = (typing,)
MAX_PPL_INCREASE = 0.02


def main() -> None:
    """Search, verify and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--out", type=Path, default=PLAN)
    parser.add_argument("--force", action="store_true", help="replace the plan that is there")
    options = parser.parse_args()
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} exists already: pass --force to replace it")
    model, tokenizer = load_language_model(options.model, "cpu", "float32")
    plan = search_language_model(
        model,
        [inspect.getsource(module) for module in CALIBRATION],
        tokenizer=tokenizer,
        held_out=[inspect.getsource(module) for module in HELD_OUT],
        max_ppl_increase=MAX_PPL_INCREASE,
        report=print,
    )
    plan.save(options.out, overwrite=options.force)
    print(f"wrote {options.out}: forecast {plan.forecast}, measured {plan.measured}")


if __name__ == "__main__":
    main()
