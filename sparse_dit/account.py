"""The account of what ran in the place of a component's attention."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

logger = logging.getLogger("sparse_dit")


@dataclass(frozen=True)
class Ran:
    """How often one layer ran one way.

    Args:
        layer: The module path of the layer.
        stage: Number of the plan's stage; None if none applied.
        dense_because: Why stock attention ran; None if sparse attention did.
        backend: Name of the backend that sparse attention ran on; None for stock attention.
        calls: How many attention calls did.
        computed: Query-key pairs that were computed (a pooled key counts as one).
        pairs: Query-key pairs that dense attention would have computed.
        tokens: Length of the sequence.
    """

    layer: str
    stage: int | None
    dense_because: str | None
    backend: str | None
    calls: int
    computed: float
    pairs: int
    tokens: int


DECODE = "decoding, one query at a time"

Way = tuple[str, int | None, str | None, str | None]  # the first four fields of Ran


class Account:
    """Counts calls by layer, stage, way of running and length of the sequence.

    Args:
        component: Name of the component, for what is logged.
        planned: Reasons to run stock attention that are nobody's loss, so nothing to warn of.
    """

    def __init__(self, component: str, planned: Collection[str]) -> None:
        self.component = component
        self.planned = planned
        self._calls: Counter[tuple[Way, int]] = Counter()
        self._computed: defaultdict[tuple[Way, int], float | Tensor] = defaultdict(float)
        self._pairs: Counter[tuple[Way, int]] = Counter()
        self._warned: set[str] = set()
        self._decoded: dict[str, list[int]] = {}  # by layer: calls, pairs, tokens
        self._notes: dict[str, None] = {}

    def count(self, way: Way, tokens: int, pairs: int, density: float | Tensor) -> None:
        """Add one call over `tokens` tokens that computed a share `density` of dense attention's `pairs`.

        A density that lies on a device, `[]`, is added up there, until what ran is asked for.
        """
        key = (way, tokens)
        self._calls[key] += 1
        self._computed[key] += density * pairs
        self._pairs[key] += pairs

    def decode(self, layer: str, heads: int, tokens: int) -> None:
        """Add one call of one query that stock attention computes.

        It gets numbers, not tensors, as it is called for every layer and token: asking a tensor for its shape
        takes as long as the rest.

        Args:
            layer: Module path.
            heads: The heads of all batch items together.
            tokens: Keys of each.
        """
        found = self._decoded.get(layer)
        if found is None:
            found = self._decoded[layer] = [0, 0, 0]
        found[0] += 1
        found[1] += heads * tokens
        found[2] = tokens

    def warn(self, reason: str) -> None:
        """Log once why stock attention runs, unless that is as it should be."""
        if reason not in self.planned and reason not in self._warned:
            self._warned.add(reason)
            logger.warning("%s runs dense attention: %s", self.component, reason)

    def tell(self, note: str) -> None:
        """Keep, and log once, what could not be done as planned though sparse attention ran."""
        if note not in self._notes:
            self._notes[note] = None
            logger.warning("%s: %s", self.component, note)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was told, in order."""
        return tuple(self._notes)

    @property
    def ran(self) -> tuple[Ran, ...]:
        """One entry for each layer, stage, way of running and length; one for all decoding of a layer."""
        counted = tuple(
            Ran(*way, calls, float(self._computed[way, tokens]), self._pairs[way, tokens], tokens)
            for (way, tokens), calls in self._calls.items()
        )
        return counted + tuple(
            Ran(layer, None, DECODE, None, calls, pairs, pairs, tokens)
            for layer, (calls, pairs, tokens) in self._decoded.items()
        )
