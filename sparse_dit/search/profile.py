"""Profile: what the search knows of a model's heads, measured through the stock pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..generation import GenerationSettings
from ..layout import Tile, TokenLayout
from .candidates import all_candidates
from .nested import Candidates
from .ranking import BEYOND, runs_each
from .sampling import parallel_map
from .statistics import HeadStatistics, LayerStatistics, of_head
from .verify import Reference

HALF, LATER = "half", "later"  # of the finding runs' rows; the scoring runs' rows


def bounds_of(sigmas: Sequence[float]) -> list[float]:
    """What cuts 1..0 into a range around each recorded noise level: halfway between neighbours."""
    return [1.0, *((a + b) / 2 for a, b in itertools.pairwise(sigmas)), 0.0]


@dataclass
class ComponentProfile:
    """One transformer's heads at one layout; S recorded noise levels, H heads.

    Args:
        model_class, config_hash: The transformer's class, and the hash of its configuration.
        heads: For each of its self-attention layers, by module path, `(num_heads, head_dim)`: its heads H
            and the channels of one.
        layout: The token layout at calibration, with the longest text that was recorded.
        sigmas: Noise levels recorded, falling, `[S]`.
        layers: Module paths, in order of execution.
        found: For `(level, layer)` the heads' statistics (discovery), see `statistics.discover`.
        beyond: For a layer those of a larger video, of its names in `ranking.BEYOND` alone; they hold at all
            levels. Empty if none was looked at.
        scores: For `(level, layer)` the accumulators `error`, `error_squared`, `recall` `[H, K]` and
            `norm`, `rows` `[H]` (scoring); see `statistics.score`.
        pictures: For `(layer, token order)`, `[H, R, C]`: attention of the sampled rows (in that order)
            over its tiles, at the middle level.
        looks: For `(kind, level, layer)`, of `HALF` and `LATER`, the sums by which heads' attention is
            compared between prompts: `offset_far` and `column`, `[H, ...]`, and `offset_count`; see
            `dependence`.
    """

    model_class: str
    config_hash: str
    heads: dict[str, tuple[int, int]]
    layout: TokenLayout | None = None
    sigmas: list[float] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    found: dict[tuple[int, str], LayerStatistics] = field(default_factory=dict)
    beyond: dict[str, LayerStatistics] = field(default_factory=dict)
    scores: dict[tuple[int, str], dict[str, Tensor]] = field(default_factory=dict)
    pictures: dict[tuple[str, Tile], Tensor] = field(default_factory=dict)
    looks: dict[tuple[str, int, str], dict[str, Tensor]] = field(default_factory=dict)
    _candidates: dict[tuple[int, str], list[Candidates]] = field(default_factory=dict, repr=False)

    @property
    def head_sizes(self) -> list[tuple[int, int]]:
        """The different `(num_heads, head_dim)` of the recorded layers."""
        return list(dict.fromkeys(self.heads[layer] for layer in self.layers))

    @property
    def total_heads(self) -> int:
        """Heads of all recorded layers together."""
        return sum(self.heads[layer][0] for layer in self.layers)

    @property
    def num_heads(self) -> int:
        """The heads H of every recorded layer.

        Raises:
            NotImplementedError: If layers differ in it.
        """
        counts = {num_heads for num_heads, _ in self.head_sizes}
        if len(counts) != 1:
            raise NotImplementedError(
                f"this is for models whose layers have equally many heads, got {sorted(counts)}"
            )
        return counts.pop()

    @property
    def known_layout(self) -> TokenLayout:
        """The layout; ValueError before anything was recorded."""
        if self.layout is None:
            raise ValueError(
                f"no self-attention call of {self.model_class} could be recorded: its token grid "
                "is unknown at these arguments, or it asks for more than plain attention"
            )
        return self.layout

    def note_layout(self, layout: TokenLayout) -> None:
        """Take up the layout of a recorded call: one grid, text of any length and place.

        Text always attends and is attended to densely, so statistics of all lengths can be added up.

        Raises:
            ValueError: If the grid is another one than that of the calls before.
        """
        known = self.layout or layout
        if layout.without_global() != known.without_global():
            raise ValueError(f"a profile is of one size, got {layout} after {known}")
        self.layout = layout if layout.num_global > known.num_global else known

    def nearest_level(self, sigma: float) -> int:
        """Number of the recorded noise level whose range holds sigma."""
        return sum(bound >= sigma for bound in bounds_of(self.sigmas)[1:-1])

    def candidates(self, level: int, layer: str) -> list[Candidates]:
        """Candidates of each head of a layer at a noise level: `[H]`, of K patterns each."""
        key = (level, layer)
        if key not in self._candidates:
            runs = runs_each(sum(self.heads[name][0] for _, name in self.found))
            layout, (count, _) = self.known_layout, self.heads[layer]
            made: dict[int, Candidates] = {}

            def make(head: int) -> None:
                made[head] = all_candidates(self.statistics(level, layer, head), layout, runs)

            make(0)  # and with it what all heads have
            parallel_map(lambda number: make(number + 1), count - 1)
            self._candidates[key] = [made[head] for head in range(count)]
        return self._candidates[key]

    def statistics(self, level: int, layer: str, head: int) -> HeadStatistics:
        """What was found of a head at a noise level, with what a larger video gave under `ranking.BEYOND`."""
        result = {tile: of_head(found, head) for tile, found in self.found[level, layer].items()}
        for tile, found in self.beyond.get(layer, {}).items():
            result[tile] |= {BEYOND[name]: value for name, value in of_head(found, head).items()}
        return result

    def add(self, other: ComponentProfile) -> None:
        """Add what other runs gave, of the same noise levels, layers and size."""
        pairs = [(self.found, other.found), (self.beyond, other.beyond)]
        for mine, more in pairs:
            for key, found in more.items():
                known = mine.setdefault(key, {})
                for tile, statistics in found.items():
                    _add_to(known.setdefault(tile, {}), statistics)
        for key, values in other.scores.items():
            _add_to(self.scores.setdefault(key, {}), values)
        for key, values in other.looks.items():
            _add_to(self.looks.setdefault(key, {}), values)
        if other.found:
            self._candidates.clear()

    def drop_unscored(self) -> None:
        """Forget noise levels that no scored forward came near; pictures then have no level."""
        scored = sorted({level for level, _ in self.scores})
        if len(scored) == len(self.sigmas):
            return
        place = {level: number for number, level in enumerate(scored)}
        self.sigmas = [self.sigmas[level] for level in scored]
        self.found = {(place[i], layer): v for (i, layer), v in self.found.items() if i in place}
        self.scores = {(place[i], layer): v for (i, layer), v in self.scores.items() if i in place}
        self.looks = {
            (kind, place[level], layer): v
            for (kind, level, layer), v in self.looks.items()
            if level in place
        }
        self.pictures.clear()
        self._candidates.clear()

    def relative_error(self, level: int, layer: str) -> Tensor:
        """Squared relative L2 error of each head's output for each candidate, `[H, K]`."""
        scores = self.scores[level, layer]
        return scores["error"] / scores["norm"][:, None].clamp_min(1e-20)

    def standard_error(self, level: int, layer: str) -> Tensor:
        """One standard error of `relative_error`, from the spread over sampled rows, `[H, K]`."""
        scores = self.scores[level, layer]
        rows = scores["rows"][:, None]
        variance = (scores["error_squared"] / rows - (scores["error"] / rows).square()).clamp_min(0)
        return (variance * rows).sqrt() / scores["norm"][:, None].clamp_min(1e-20)


def _add_to(known: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        known[name] = known[name] + value if name in known else value


@dataclass
class Profile:
    """A pipeline's profile: one `ComponentProfile` a transformer, and how it was made.

    Args:
        components: The profile of each transformer, by component name.
        settings: The size, steps and guidance of the profiling runs.
        rows: The sampled query rows for each head, layer, step and run.
        done: The labels of the runs that are in it, in order.
        seconds: What these runs took together.
        reference: The last case's whole dense generation, if it was asked for.
    """

    components: dict[str, ComponentProfile]
    settings: GenerationSettings
    rows: int
    done: list[str] = field(default_factory=list)
    seconds: float = 0.0
    reference: Reference | None = None
