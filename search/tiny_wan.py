"""The plan of the embedded model: the demo's search and verification, written to profiles/tiny-wan."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_dit.demo.run import CALIBRATION, HELD_OUT, SETTINGS, TUNING_PSNR, verified
from sparse_dit.eval.quality import evaluate
from sparse_dit.inputs import load_pipeline
from sparse_dit.resources import shipped
from sparse_dit.search import search

PLAN = Path(__file__).resolve().parent.parent / "profiles" / "tiny-wan" / "plan.json"


def main() -> None:
    """Search, verify and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PLAN)
    parser.add_argument("--force", action="store_true", help="replace the plan that is there")
    options = parser.parse_args()
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} exists already: pass --force to replace it")
    pipe = load_pipeline(str(shipped("tiny_wan")), "cpu", "float32")
    plan = search(
        pipe,
        CALIBRATION,
        settings=SETTINGS,
        min_psnr=TUNING_PSNR,
        tune_on="calibration",
        report=print,
    )
    plan = verified(plan, evaluate(pipe, plan, HELD_OUT, SETTINGS, noise_cases=0, progress=print))
    plan.save(options.out, overwrite=options.force)
    print(f"wrote {options.out}: forecast {plan.forecast}, measured {plan.measured}")


if __name__ == "__main__":
    main()
