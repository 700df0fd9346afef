"""What a report says in words: what was found, and what was and wasn't measured."""

from __future__ import annotations

import math

from ..plan.evidence import evidence_lines
from .report import Method, Report
from .sizes import other_size

CLEARLY_DB = 3.0  # above the flat image; less and the video's content may be lost
PROMISED_DB = 0.5  # an advantage in dB that is worth naming


def findings(report: Report) -> list[str]:
    """What the numbers say, the unwelcome things first."""
    quality = report.quality
    caveat = other_size(report.plan, quality.layout)
    found = [caveat] if caveat else []
    if quality.nonfinite:
        found.append(
            f"The sparse videos hold {quality.nonfinite} values that are NaN or infinite: "
            "this plan is broken on this model."
        )
    if quality.psnr_db < quality.psnr_flat_db + CLEARLY_DB:
        found.append(
            f"PSNR {quality.psnr_db:.1f} dB is not clearly above the flat image's "
            f"{quality.psnr_flat_db:.1f} dB: it says little about what the videos show."
        )
    found += _cautions(report)
    if not quality.sparse_calls:
        found.append("No attention call ran sparse here, so there is no speed-up to measure.")
    elif quality.speedup < 1:
        found.append(
            f"Sparse was slower than dense here ({quality.speedup:.2f}x), "
            f"although it computes {quality.density:.0%} of the pairs."
        )
    else:
        found.append(
            f"Sparse took {quality.sparse_seconds:.2f} s where dense took "
            f"{quality.dense_seconds:.2f} s ({quality.speedup:.2f}x), computing "
            f"{quality.density:.1%} of the query-key pairs."
        )
    found += [_against(report, method) for method in report.baselines]
    return found


def limits(report: Report) -> list[str]:
    """What was measured how, and what wasn't."""
    quality = report.quality
    device = report.provenance.get("gpu") or report.provenance.get("cpu") or "one machine"
    said = [
        f"All times are of whole pipeline calls (text, every step, decoding) on {device}. "
        "Nothing here was measured on other hardware, and nothing follows for it.",
        _clock(report),
        "Dense is the stock pipeline with the attention that it uses by default.",
    ]
    count = len(quality.cases)
    if count < 3:
        said.append(f"Means are over {count} case{'s' * (count > 1)} only.")
    if quality.interleaved:
        said.append("Dense and sparse runs took turns.")
    else:
        said.append("Dense times were taken earlier than sparse ones, not in turn.")
    floors = sum(case.psnr_noise_floor_db is not None for case in quality.cases)
    said.append(
        f"The noise floor was measured on {floors} of {count} cases: dense against dense with the "
        "keys in reverse order."
        if floors
        else "The dense-versus-dense noise floor was not measured."
    )
    said.append(
        "PSNR and SSIM are against the dense video of the same seed; they are no judgement of "
        "how good either looks."
    )
    said += [f"Of the search: {line}." for line in evidence_lines(report.plan)]
    absent = _absent(report)
    if absent:
        said.append(f"Not measured: {', '.join(absent)}.")
    return said


def _clock(report: Report) -> str:
    """What the seconds are, and how far the pairs are apart."""
    if "gpu" in report.provenance:
        said = "Seconds are those of the clock, after the GPU has finished."
    else:
        said = "Seconds are CPU time, which other programs disturb less than the clock."
    pairs = report.quality.pairs
    if pairs is None or len(pairs.speedups) < 2:
        return said
    return f"{said} Speed-ups of single cases: {min(pairs.speedups):.2f}x to {max(pairs.speedups):.2f}x."


def _cautions(report: Report) -> list[str]:
    """Why speed-ups say little, those of the plan first."""
    cautions = {"this plan": report.quality.caution}
    cautions |= {f"the {method.name} plan": method.caution for method in report.baselines}
    cautions |= {f"{row.width}x{row.height}x{row.num_frames}": row.caution for row in report.sizes}
    return [f"Speed of {name}: {text}." for name, text in cautions.items() if text]


def _absent(report: Report) -> list[str]:
    names = {method.name for method in report.baselines}
    heads = [c for atlas in report.atlases for cells in atlas.layers.values() for c in cells]
    checks = {
        "a uniform plan": "uniform" in names,
        "a random plan": "random" in names,
        "the teacher-forced error": bool(report.teacher_forced),
        "search time": report.search_seconds is not None,
        "the seam's overhead": report.seam_overhead is not None,
        "error per head": any(cell.error is not None for cell in heads),
        "recall per head": any(cell.recall is not None for cell in heads),
        "the search's front": report.front is not None,
        "SSIM (frames are under 11 pixels)": report.quality.ssim is not None,
    }
    return [name for name, present in checks.items() if not present]


def _against(report: Report, method: Method) -> str:
    """The searched plan against another, whatever the outcome."""
    ours, theirs = report.quality.psnr_db, method.psnr_db
    densities = f"at density {report.quality.density:.3f} against {method.density:.3f}"
    if math.isnan(ours) or math.isnan(theirs):
        return f"The {method.name} plan can't be compared: a PSNR is not a number."
    if ours == theirs:
        return f"The searched plan and the {method.name} plan are equally close {densities}."
    if math.isinf(ours) or math.isinf(theirs):
        exact = "searched" if math.isinf(ours) else method.name
        return f"The {exact} plan gave the dense videos themselves, the other not, {densities}."
    gain = ours - theirs
    if abs(gain) < PROMISED_DB:
        return (
            f"The searched plan is no better than the {method.name} plan in any way that counts "
            f"({gain:+.1f} dB) {densities}."
        )
    word = "closer to" if gain > 0 else "FURTHER from"
    return (
        f"The searched plan is {abs(gain):.1f} dB {word} dense than the {method.name} plan "
        f"{densities}."
    )
