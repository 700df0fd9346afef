"""What each head of a language model may do."""

from __future__ import annotations

from ...patterns import Budget, Dense, Pattern, PooledBlocks, SinkWindow, VerticalSlash

SHARES = (0.02, 0.035, 0.06, 0.1, 0.17, 0.3)  # beta of budgets: keys a row for each key
LEAST = 128  # keys a row, at any length
DENSE = Pattern(Dense())


def candidates() -> tuple[Pattern, ...]:
    """Patterns of all heads alike, dense first; budgets grow with the length (MoA's rule with alpha 0)."""
    found = [DENSE]
    for beta in SHARES:
        budget = Budget(beta=beta, least=LEAST)
        found.append(Pattern(SinkWindow(budget=budget)))
        found += [Pattern(VerticalSlash(rows=rows, budget=budget)) for rows in ("both", "last")]
        found.append(Pattern(PooledBlocks(budget=budget)))
    return tuple(found)
