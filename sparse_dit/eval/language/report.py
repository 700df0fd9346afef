"""The report of a language model's plan: one offline HTML page, the same numbers as JSON, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...outputs import check_free
from ...plan import Plan
from ...whole_file import uninterrupted, write_text
from ...words import option
from ..figures import save_figure
from ..page import environment
from ..pictures import data_uri
from .atlas import TextHead, as_image, heads_figure
from .quality import NOISE_FLOOR, LanguageQuality, QuestionQuality

FILES = ("report.html", "report.json", "atlas.png")
KNOWN = 0.1  # nats a token above the floor: less, and dense attention can't do the task either


@dataclass(frozen=True)
class LanguageReport:
    """All that a report shows.

    Attributes:
        title: Heading of the page.
        plan: What was measured.
        quality: What came out.
        heads: Every head of the plan on the first text.
        provenance: `environment()` and the command, as text by name.
    """

    title: str
    plan: Plan
    quality: LanguageQuality
    heads: Sequence[TextHead]
    provenance: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskRow:
    """Means over the questions of one kind and length; `known` says that dense attention can answer them."""

    kind: str
    tokens: int
    count: int
    dense_found: float
    sparse_found: float
    dense_log_prob: float
    sparse_log_prob: float
    floor: float
    known: bool


def task_rows(quality: LanguageQuality) -> list[TaskRow]:
    """A row for each kind and length, in the order in which they were asked."""
    keys = dict.fromkeys((q.question.kind, q.tokens) for q in quality.questions)
    return [_row(kind, tokens, quality) for kind, tokens in keys]


def _row(kind: str, tokens: int, quality: LanguageQuality) -> TaskRow:
    asked = [q for q in quality.of_kind(kind) if q.tokens == tokens]

    def mean(value: Any) -> float:
        return sum(map(value, asked)) / len(asked)

    dense, floor = mean(lambda q: q.dense.log_prob), mean(lambda q: q.dense.floor)
    return TaskRow(
        kind,
        tokens,
        len(asked),
        mean(lambda q: q.dense.found),
        mean(lambda q: q.sparse.found),
        dense,
        mean(lambda q: q.sparse.log_prob),
        floor,
        dense > floor + KNOWN,
    )


def findings(report: LanguageReport) -> list[str]:
    """What the numbers say, the unwelcome things first."""
    quality, found = report.quality, []
    if quality.pairs.caution:
        found.append(f"Speed: {quality.pairs.caution}.")
    if not quality.sparse_calls:
        found.append("No attention call ran sparse here, so there is no speed-up to measure.")
    lost = [q for q in quality.questions if q.dense.exact and not q.sparse.exact]
    for kind in dict.fromkeys(q.question.kind for q in lost):
        what = [q for q in lost if q.question.kind == kind]
        of = sum(q.dense.exact for q in quality.of_kind(kind))
        found.append(f"The plan loses {len(what)} of {of} answers that dense finds: {kind}.")
    if not lost and quality.questions:
        of = sum(q.dense.exact for q in quality.questions)
        found.append(f"The plan loses none of the {of} answers that dense finds.")
    found.append(
        f"Divergence from dense is {quality.kl:.4f} nats a token; rounding alone makes "
        f"{max(text.kl_floor for text in quality.texts):.6f}."
    )
    return found


def limits(report: LanguageReport) -> list[str]:
    """What was measured how, and what wasn't."""
    rows = task_rows(report.quality)
    unable = [f"{row.kind} ({row.tokens} tokens)" for row in rows if not row.known]
    device = report.provenance.get("gpu") or report.provenance.get("cpu") or "one machine"
    clock = "the clock's" if "gpu" in report.provenance else "CPU time"
    said = [
        f"Seconds are {clock}, of whole prefills on {device}, dense and sparse in turn. Nothing here was "
        "measured on other hardware.",
        "Dense is the stock model with the attention that it uses by default.",
        f"The noise floor is {NOISE_FLOOR}.",
        "Perplexity and divergence are of up to 512 places in a text's second half.",
        "The tasks are of RULER's kinds with texts of our own, and can't be compared with its scores. "
        "Questions are read in one prefill and answered by stock decoding. The floor is what the dense model "
        "holds of another question's answer.",
    ]
    if unable:
        said.append(
            f"Dense attention holds the right answer no likelier than the floor, so nothing can be lost: "
            f"{', '.join(unable)}."
        )
    return said


def to_json(report: LanguageReport) -> dict[str, Any]:
    """`report.json` as a dict of JSON's own types."""
    quality = report.quality
    return {
        "title": report.title,
        "speedup": quality.pairs.speedup if quality.sparse_calls else None,
        "speedup_pairs": quality.pairs.speedups,
        "speedup_caution": quality.pairs.caution,
        "density": quality.density,
        "kl": quality.kl,
        "texts": [
            {
                **asdict(text),
                "dense_perplexity": text.dense_perplexity,
                "sparse_perplexity": text.sparse_perplexity,
            }
            for text in quality.texts
        ],
        "tasks": [asdict(row) for row in task_rows(quality)],
        "questions": [_question(asked) for asked in quality.questions],
        "heads": [{**vars(head), "pattern": str(head.pattern)} for head in report.heads],
        "noise_floor": NOISE_FLOOR,
        "ran": quality.summary,
        "provenance": dict(report.provenance),
        "notes": [*findings(report), *limits(report)],
    }


def _question(asked: QuestionQuality) -> dict[str, Any]:
    return {
        "kind": asked.question.kind,
        "tokens": asked.question.prompt.shape[1],
        "depth": asked.question.depth,
        "answers": list(asked.question.answers),
        "dense": asdict(asked.dense),
        "sparse": asdict(asked.sparse),
    }


def write_report(
    folder: str | Path, report: LanguageReport, *, overwrite: bool = False
) -> list[Path]:
    """Write `report.html`, `report.json` and the atlas as a picture.

    Args:
        folder: Made if it isn't there.
        report: What was measured.
        overwrite: Whether files of these names may be replaced.

    Raises:
        FileExistsError: A file is there already and `overwrite` is False; nothing is written then.
    """
    folder = Path(folder)
    if not overwrite:
        check_free("folder", [folder / n for n in FILES], option("overwrite=True"))
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers, figure = render_page(report), to_json(report), heads_figure(report.heads)
    with uninterrupted():  # files of two reports side by side would be wrong
        save_figure(figure, folder / "atlas.png")
        write_text(folder / "report.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")
        write_text(folder / "report.html", page)
    return [folder / name for name in FILES]


def render_page(report: LanguageReport) -> str:
    """The page's HTML."""
    picture = as_image(heads_figure(report.heads))
    return (
        environment()
        .get_template("language.html.j2")
        .render(
            report=report,
            quality=report.quality,
            tasks=task_rows(report.quality),
            findings=findings(report),
            limits=limits(report),
            atlases=[],
            picture=data_uri(picture),
        )
    )
