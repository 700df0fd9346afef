"""Grid heads: their lines against plain loops over a softmax, and that planted ones are found."""

import dataclasses

import pytest
import torch

from sparse_dit.attention import sparse_attention
from sparse_dit.estimate import Budget, Grid, VerticalSlash, estimated_index
from sparse_dit.estimate.grid import bin_lines, frame_distance, key_lines
from sparse_dit.estimate.rows import call_rows, sample_rows
from sparse_dit.intervals import RowIntervals
from sparse_dit.modalities import Modalities, Part
from tests.estimate.cases import covers, probabilities, tensors

SMALL = Budget(beta=0.1, least=16)


def video(frames, height, width, at, kind="video", clip=0, row_tokens=0):
    stop = at + frames * height * (width + row_tokens)
    return Part(kind, at, stop, (frames, height, width), row_tokens, clip)


def split(frames, height, width, at, gap, clip=0):
    """Frames with text between, as Qwen3-VL has them; times grow longer by a token."""
    parts = []
    for frame in range(frames):
        parts.append(video(1, height, width, at, clip=clip))
        at = parts[-1].stop + gap + (frame >= frames // 2)
    return parts


CASES = {
    "one video": Modalities(400, (video(5, 6, 10, 20),)),
    "frames apart": Modalities(500, tuple(split(6, 6, 9, 11, 4))),
    "an image and a video": Modalities(
        420, (video(1, 6, 10, 5, "image", 0), video(4, 8, 8, 80, clip=1))
    ),
    "rows with breaks": Modalities(300, (video(1, 9, 11, 40, "image", row_tokens=1),)),
    "cut by a chunk": Modalities(260, (dataclasses.replace(video(5, 6, 10, 20), stop=250),)),
}
SHAPES = {
    "all lines": Grid(sampled=16, budget=SMALL, sinks=3, horizontal=True),
    "both": Grid(sampled=20, budget=Budget(beta=0.3, least=16), sinks=3),
    "vertical": Grid(slash=False, rows="last", sampled=16, budget=SMALL, sinks=0, local=64),
    "slash": Grid(vertical=False, rows="spread", sampled=16, budget=SMALL, sinks=3, local=70),
}


def lines_by_hand(where, stride, bins):
    """The name of the line of each key, then of each bin of 64 offsets."""
    names = [("text", j) for j in range(where.length)]
    for part in where.media:
        width = part.grid[2] + part.row_tokens
        for j in range(part.start, part.stop):
            place = (j - part.start) % (part.grid[1] * width)
            names[j] = ("media", part.clip, place % width if stride == "row" else place)
            if stride == "none":
                names[j] = ("media", j)
    distance = 0 if stride == "none" else frame_distance(where)
    repeats = [(64 * b + 63) % distance // 64 if distance >= 128 else b for b in range(bins)]
    return names + [("bin", repeat) for repeat in repeats]


def by_hand(q, k, shape, where, rows=None, scale=0.25):
    """What each head's rows see, by loops: bool `[H, N, M]`."""
    n, m = q.shape[2], k.shape[2]
    bins, near, own = -(-m // 64), -(-shape.local // 64), torch.arange(n) + m - n
    call = call_rows(n, m, rows)
    start, stop = (x.long().expand(len(q), -1) for x in (call.start, call.stop))
    key, offset = torch.arange(m), own[:, None] - torch.arange(m)
    inside = (key >= start[..., None]) & (key < stop[..., None])  # [B, N, M]
    far = inside & (offset >= 64 * near)
    p = probabilities(q, k, scale, start, stop)  # of all rows, of which some are sampled
    sample = sample_rows(call, shape.rows, shape.sampled)
    picked = sample.rows.long().expand(len(q), -1)
    sound = (sample.stop > sample.start).expand(len(q), -1)

    def of_candidates(weights, chosen_rows, beyond=far, all_keys=inside):
        """Sums over chosen rows, of each key that isn't near and of each bin."""
        total = torch.zeros(m + bins, dtype=torch.float64)
        for b, row in chosen_rows:
            total[:m] += weights[b, row] * beyond[b, row]
            binned = offset[row].clamp_min(0) // 64 + m
            total.index_add_(0, binned, weights[b, row] * all_keys[b, row])
        return total

    ones = torch.ones(len(q), n, m, dtype=torch.float64)
    every = [(b, row) for b in range(len(q)) for row in range(n)]
    cost = of_candidates(ones, every)
    cost[m:] = cost[m:] * 80 // 64
    sinks = call.sinks(shape.sinks)
    forced = torch.cat([sinks, torch.arange(bins) < near])
    seen = torch.zeros(q.shape[1], n, m, dtype=torch.bool)

    def fold(values, names):
        found = {}
        for value, name, is_forced in zip(values.tolist(), names, forced, strict=True):
            if not is_forced:
                found[name] = found.get(name, 0.0) + value
        return found

    def rows_of(step):
        at = range(0, picked.shape[1], step)
        return [(b, int(picked[b, i])) for b in range(len(q)) for i in at if sound[b, i]]

    def scores(head, names, chosen_rows):
        count = of_candidates(ones, chosen_rows)
        count[m:] /= 64
        mean = of_candidates(p[:, head], chosen_rows) / count.clamp_min(1)
        mean[m:] /= 80
        price = fold(cost, names)
        gain = fold(mean * cost, names)
        return {name: gain[name] / max(1, price[name]) for name in gain}, price, mean

    def on(line, names):
        return torch.tensor([names[j] == line for j in own.tolist()])

    def best_line(score):
        return max((name for name in score if name[0] == "media"), key=lambda name: score[name])

    def choose(head, names, chosen_rows):
        left = call.budget(shape.budget.keys(m)) - cost[forced].sum()
        if shape.horizontal:  # what the dearest of the heads' best lines costs
            best = [best_line(scores(h, names, chosen_rows)[0]) for h in range(q.shape[1])]
            left -= max(((stop - start) * on(line, names)).sum() for line in best)
        score, price, mean = scores(head, names, chosen_rows)
        out = {("media", shape.vertical), ("bin", shape.slash)}
        banned = {kind for kind, offered in out if not offered}
        taken = forced.clone()
        for name in sorted(score, key=lambda name: -score[name]):
            if name[0] not in banned:
                if price[name] > left:
                    break
                left -= price[name]
                taken |= torch.tensor([other == name for other in names]) & ~forced
        for at in mean.argsort(descending=True, stable=True).tolist():  # the rest, one by one
            if not taken[at] and names[at][0] not in banned:
                if cost[at] > left:
                    break
                left -= cost[at]
                taken[at] = True
        return taken, best_line(score)

    for head in range(q.shape[1]):
        options = []
        for stride in ("row", "frame", "none")[: 2 if shape.horizontal else 3]:
            names = lines_by_hand(where, stride, bins)
            tried, _ = choose(head, names, rows_of(2))
            others = [row for row in rows_of(1) if row not in rows_of(2)]
            kept = float(of_candidates(p[:, head], others)[tried].sum())
            options.append((kept, names, *choose(head, names, rows_of(1))))
        _, names, chosen, line = max(options, key=lambda option: option[0])
        for g in range(0, n, 64):
            keys = chosen[:m].clone()
            for b in range(bins):
                low, high = int(own[g]) - 64 * (b + 1), int(own[g]) + 64 * (1 - b)
                keys[max(0, low) : max(0, high)] |= chosen[m + b]
            seen[head, g : g + 64] = keys
        if shape.horizontal:
            seen[head, on(line, names)] = True
    return seen & (key <= own[:, None])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", SHAPES)
def test_lines_are_those_of_plain_loops(name, kind):
    where, shape = CASES[name], SHAPES[kind]
    for n in (where.length, where.length - 90):
        q, k = tensors(n, where.length, heads=2, kv_heads=1)
        q = q * 2
        found = covers(estimated_index(q, k, [shape] * 2, scale=0.25, modalities=where))
        want = by_hand(q, k, shape, where)
        assert torch.equal(found, want), (found != want).double().mean()


def test_lines_of_a_padded_batch(way):
    where, shape = CASES["frames apart"], SHAPES["all lines"]
    q, k = tensors(500, 500, batch=2, heads=2, kv_heads=1)
    start = torch.zeros(2, 500)
    start[1] = 70
    rows = RowIntervals(start=start.int())
    index = estimated_index(q, k, [shape] * 2, scale=0.25, rows=rows, modalities=where)
    assert torch.equal(covers(index), by_hand(q, k, shape, where, rows))


def planted(where, n=None):
    """Heads 0 and 1 look at one place in every frame; 2 and 3 at their own place in every frame."""
    m = where.length
    q, k = tensors(n or m, m, dim=64)
    q, k = q * 0.1, k * 0.1
    lines = key_lines(where, "frame")
    place = lines[where.media[0].start + 17]
    k[:, 0, lines == place] = 3
    q[:, :2] += 0.5
    turn = torch.randn(int(lines.max()) + 1, 64, generator=torch.Generator().manual_seed(3))
    k[:, 1] = turn[lines]
    q[:, 2:] = turn[lines[m - (n or m) :]]
    return q, k, lines, place


@pytest.mark.parametrize("where", [
    Modalities(1800, (video(6, 16, 18, 30),)),
    Modalities(1800, tuple(split(6, 16, 17, 30, 8))),
], ids=["one run", "frames apart"])  # fmt: skip
@pytest.mark.parametrize("n", [1800, 700])
def test_planted_lines_are_found(where, n, way):
    q, k, lines, place = planted(where, n)
    shape = Grid(budget=Budget(beta=0.3, least=1), sinks=0)
    index = estimated_index(q, k, [shape] * 4, modalities=where)
    seen = covers(index)
    on = (lines == place).nonzero()[:, 0]
    late = torch.arange(n - 300, n)
    later = on > (late + 1800 - n)[:, None]
    assert (seen[:2, late][:, :, on] | later).all()
    rows = (lines[1800 - n :] != lines[0]).nonzero()[:, 0]
    inside = [
        r for r in rows.tolist() if where.media[0].start <= r + 1800 - n < where.media[-1].stop
    ]
    for row in inside[::37]:
        same = (lines == lines[row + 1800 - n]).nonzero()[:, 0]
        same = same[same <= row + 1800 - n]
        assert seen[2:, row, same].all(), "the same place in every frame before"
    assert index.density < 0.65


def test_rows_on_a_line_see_everything():
    where = Modalities(900, (video(8, 8, 12, 30),))
    q, k, lines, place = planted(where)
    shape = Grid(slash=False, horizontal=True, budget=Budget(beta=0.1, least=1), sinks=0)
    seen = covers(estimated_index(q, k, [shape] * 4, modalities=where))
    rows = (lines == place).nonzero()[:, 0]
    assert all(seen[0, row, : row + 1].all() for row in rows.tolist())
    out = sparse_attention(q, k, k, index := estimated_index(q, k, [shape] * 4, modalities=where))
    want = sparse_attention(q, k, k, index, backend="reference")
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_without_images_it_is_a_vertical_slash():
    q, k = tensors(300, 300)
    sizes = {"sampled": 16, "budget": SMALL}
    found = covers(estimated_index(q, k, [Grid(**sizes)] * 4, modalities=Modalities(300)))
    assert torch.equal(found, covers(estimated_index(q, k, [VerticalSlash(**sizes)] * 4)))


def test_strides_come_from_the_layout():
    (one,) = CASES["one video"].media
    rows, frames = (key_lines(CASES["one video"], stride) for stride in ("row", "frame"))
    assert rows[one.start] == rows[one.start + 10] != rows[one.start + 1]
    assert frames[one.start] == frames[one.start + 60] != frames[one.start + 10]
    assert len(rows[: one.start].unique()) == one.start, "text is alone"
    broken = key_lines(CASES["rows with breaks"], "row")
    assert broken[40] == broken[52] and len(broken[40:148].unique()) == 12
    assert frame_distance(CASES["one video"]) == 60
    assert frame_distance(CASES["frames apart"]) == 54 + 4
    assert frame_distance(Modalities(9)) == 0
    both = Modalities(2000, (video(2, 10, 13, 0), *split(6, 10, 15, 500, 7, clip=1)))
    assert frame_distance(both) == 157
    assert bin_lines(both, 5).tolist() == [0, 1, 0, 1, 0], (
        "offsets 0, 157 and 314 are in bins 0, 2 and 4"
    )


def test_what_it_refuses():
    q, k = tensors(90, 90)
    with pytest.raises(ValueError, match="of the call's 90 keys, got those of 400 tokens"):
        estimated_index(q, k, [Grid()] * 4, modalities=CASES["one video"])
    with pytest.raises(ValueError, match="got none of them"):
        Grid(vertical=False, slash=False)
