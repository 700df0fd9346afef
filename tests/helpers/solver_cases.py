"""Made-up problems for the solvers' tests: shaped like real ones, small enough for brute force."""

import itertools

import torch

from sparse_dit.patterns import Dense, Pattern, Skip, Window
from sparse_dit.plan import Stage
from sparse_dit.search.solve import Problem, evaluate


def patterns(count):
    """So many distinct patterns, dense first."""
    listed = [Pattern(Dense()), Pattern(Skip())]
    listed += [Pattern(Window(n // 2), far=bool(n % 2)) for n in range(count - 2)]
    return listed[:count]


def random_problem(
    stages=2, layers=2, heads=2, candidates=4, *, seed=0, dense_head=1.1, other=0.5, own=0
):
    """Sparser is faster and worse, with noise; a dense head beside sparse ones costs `dense_head`.

    The last `own` candidates of each unit are patterns that no other unit has.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    units = list(
        itertools.product(range(stages), [f"blocks.{n}.attn1" for n in range(layers)], range(heads))
    )
    count = len(units)
    density = draw(count, candidates).clamp_min(0.02)
    density[:, 0] = 1
    importance = (6 * draw(count) - 6).exp() * (3 * draw(stages) - 3).exp().repeat_interleave(
        layers * heads
    )
    error = (1 - density) ** 3 * (0.2 + draw(count, candidates)) / 3
    seconds = (0.05 + 1.1 * density) * (0.9 + 0.2 * draw(count, candidates))
    seconds[:, 0] = dense_head
    shared = patterns(candidates - own)
    listed = [[*shared, *(Pattern(Window(50 + u, n)) for n in range(own))] for u in range(count)]
    edges = [1 - n / stages for n in range(stages + 1)]
    return Problem(
        units,
        listed,
        importance,
        seconds,
        torch.ones(count, dtype=torch.float64),
        error,
        density,
        1 - error,
        torch.full((count,), 1 / count, dtype=torch.float64),
        tuple(Stage(high, low) for high, low in itertools.pairwise(edges)),
        other * count,
    )


def all_choices(task):
    """Every choice of a tiny problem."""
    units, count = task.density.shape
    for picks in itertools.product(range(count), repeat=units):
        yield evaluate(task, torch.tensor(picks))
