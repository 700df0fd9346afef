"""`sparse-dit doctor`: versions, devices and backends here, and whether they compute what they should."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..outputs import Outputs
from ..tables import out
from .options import Force, say

if TYPE_CHECKING:
    from ..doctor import Checkup, VariantCheckup

COLUMNS = ("against reference", "4,096 tokens", "SDPA", "density")


def doctor(
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
    force: Force = False,
) -> int:
    """Versions, devices and backends here, and whether they compute what they should."""
    from ..doctor import checkups, devices, packages, variant_checkups
    from ..environment import environment
    from ..whole_file import write_text

    outputs = Outputs(replace=force, say=say)
    if json_file is not None:
        outputs.expect("--json", json_file, ".json")
    here, versions, seen = environment(), packages(), devices()
    for name, value in {**here, **versions}.items():
        out.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"devices: {', '.join(seen)}", highlight=False)
    found, variants = checkups(), variant_checkups()
    _show(found, variants)
    if json_file is not None:
        report = {
            "version": 1, "environment": here, "packages": versions, "devices": seen,
            "backends": [asdict(check) for check in found],
            "cpu_kernel": [asdict(variant) for variant in variants],
        }  # fmt: skip
        text = json.dumps(report, indent=1) + "\n"
        lies = outputs.write(json_file, lambda path: write_text(path, text))
        say(f"wrote {lies}")
    tried = [variant.checkup for variant in variants if variant.checkup]
    return outputs.code or int(any(check.problem for check in found + tried))


def _show(found: list[Checkup], variants: list[VariantCheckup]) -> None:
    table = Table("backend", "device", *COLUMNS)
    for check in found:
        table.add_row(check.backend, check.device, *_checked(check))
    out.print(table)
    if not variants:
        return
    table = Table("CPU kernel", *COLUMNS)
    for variant in variants:
        name = f"{variant.name} (used)" if variant.used else variant.name
        check = variant.checkup
        table.add_row(name, *(_checked(check) if check else [variant.untested, "-", "-", "-"]))
    out.print(table)


def _checked(check: Checkup) -> list[str]:
    """A doctor's row: verdict, times and density."""
    verdict = f"error {check.error or 0:.1e}"
    if check.absent or check.problem:
        verdict = f"not here: {check.absent}" if check.absent else f"BROKEN: {check.problem}"
    times = [f"{1e3 * s:.1f} ms" if s else "-" for s in (check.seconds, check.dense_seconds)]
    return [verdict, *times, "-" if check.density is None else f"{check.density:.1%}"]
