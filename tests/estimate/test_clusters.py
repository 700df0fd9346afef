"""Clusters of queries and keys: k-means, and what clusters see, against plain restatements."""

import pytest
import torch

from sparse_dit.backends.reference import token_mask
from sparse_dit.estimate.clusters import FIRST, cluster_entries, clustered, nearest
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Budget, Cluster, Pattern, Share
from tests.estimate.cases import tensors

LAYOUT = TokenLayout.video(3, 9, 9, text_before=6, text_after=9)
SHAPES = (
    Cluster(Share(0.5, 1)),
    Cluster(Share(0.0, 1), queries=2, keys=9, least=0.3),
    Cluster(Budget(beta=0.3, least=1), least=0.0),
)


def test_clouds_far_apart_are_found_and_kept():
    torch.manual_seed(0)
    centres = torch.randn(4, 6) * 50
    owner = torch.arange(80) // 20
    x = centres[owner] + torch.randn(80, 6)
    found = clustered(x, 4)
    assert [len(found.labels[owner == c].unique()) for c in range(4)] == [1] * 4
    assert len(found.labels.unique()) == 4
    for c in range(4):
        torch.testing.assert_close(found.centroids[c], x[found.labels == c].mean(0))
    moved = clustered(x + 0.1, 4, found.centroids)
    assert torch.equal(moved.labels, found.labels)
    torch.testing.assert_close(moved.centroids, found.centroids + 0.1)


def test_every_token_is_in_the_cluster_that_is_nearest():
    x, centroids = torch.randn(300, 5), torch.randn(17, 5)
    assert torch.equal(nearest(x, centroids), torch.cdist(x, centroids).argmin(1))
    alike = clustered(torch.ones(30, 4), 6)
    assert torch.equal(alike.labels, torch.zeros(30, dtype=torch.int64))
    assert torch.equal(alike.centroids, torch.ones(6, 4)), "empty ones stay where they are"
    assert clustered(torch.randn(2, 4), 1).centroids.shape == (1, 4)
    other = clustered(x, 10, torch.randn(3, 5))  # centroids of another size
    assert torch.equal(other.centroids, clustered(x, 10).centroids) and FIRST > 2


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clusters_see_what_a_plain_restatement_says(shape, sinks, far):
    n, known = LAYOUT.seq_len, {}
    q, k = tensors(n, n, batch=2, heads=4, kv_heads=2)
    pattern = Pattern(shape, far=far, sink_frames=sinks)
    found = cluster_entries(q, k, {1: pattern, 3: pattern}, LAYOUT, 0.3, known)
    assert list(found) == [1, 3] == list(known)
    text = torch.ones(n, dtype=torch.bool)
    text[6:-9] = False
    sink = text.clone()
    sink[6 : 6 + 81 * sinks] = True
    for head, estimate in found.items():
        exact, pooled = token_mask(estimate.entry)
        assert estimate.sound and exact[text].all() and exact[:, sink].all()
        rows, columns = (x[:, h].transpose(0, 1).flatten(1) for x, h in ((q, head), (k, head // 2)))
        mine, keys = (
            clustered(x, min(count, -(-len(x) // size)))
            for x, count, size in (
                (rows[~text], shape.queries, 64),
                (columns[~sink], shape.keys, 16),
            )
        )
        sizes = torch.bincount(keys.labels, minlength=len(keys.centroids))
        d = q.shape[3]
        p = torch.stack(
            [mine.centroids[:, b] @ keys.centroids[:, b].T * 0.3 + sizes.log()
             for b in (slice(0, d), slice(d, None))]
        ).softmax(-1).mean(0)  # fmt: skip
        for c in mine.labels.unique().tolist():
            seen = exact[~text][mine.labels == c][:, ~sink]
            assert (seen == seen[0]).all()
            wanted = plain_choice(p[c], sizes, shape)
            assert torch.equal(seen[0], wanted[keys.labels])
        assert (pooled is None) != far
        if pooled is not None:
            assert not pooled[text].any()
            assert estimate.entry.far is not None
            cells = estimate.entry.far.cell_offsets.diff().float()
            count = (exact.sum(1) + pooled.float() @ cells)[~text]
            assert (count == n).all()


def plain_choice(p, sizes, shape):
    """The clusters of keys that a cluster of queries sees."""
    there = int((sizes > 0).sum())
    ranked = p.argsort(descending=True).tolist()
    chosen = set(ranked[: round(shape.least * there)])
    if isinstance(shape.keep, Share):
        total = 0.0
        for c in ranked:
            if total < shape.keep.gamma:
                chosen.add(c)
            total += p[c].item()
    else:
        left = shape.keep.keys(int(sizes.sum()))
        for c in (p / sizes.clamp_min(1)).argsort(descending=True).tolist():
            if sizes[c] and (left := left - int(sizes[c])) >= 0:
                chosen.add(c)
            elif sizes[c]:
                break
    return torch.tensor([c in chosen for c in range(len(sizes))])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_heads_with_nan_are_dense_and_start_anew(bad):
    n, known = LAYOUT.seq_len, {}
    q, k = tensors(n, n)
    patterns = dict.fromkeys(range(3), Pattern(SHAPES[0]))
    cluster_entries(q, k, patterns, LAYOUT, 0.3, known)
    q[0, 1, 40, 3] = bad
    found = cluster_entries(q, k, patterns, LAYOUT, 0.3, known)
    assert [estimate.sound for estimate in found.values()] == [True, False, True]
    assert [estimate.entry.is_dense for estimate in found.values()] == [False, True, False]
    assert list(known) == [0, 2]


def test_constant_keys_one_token_only_sinks_and_budgets_of_nothing_and_of_all():
    n = LAYOUT.seq_len
    q, k = tensors(n, n)
    found = cluster_entries(q, torch.ones_like(k), {0: Pattern(SHAPES[0])}, LAYOUT, 0.3, {})
    assert found[0].sound and found[0].recall == pytest.approx(1, abs=1e-5)
    one, layout = torch.ones(1, 1, 1, 8), TokenLayout.sequence(1)
    assert cluster_entries(one, one, {0: Pattern(Cluster())}, layout, 1.0, {})[0].entry.is_dense
    sinks = Pattern(Cluster(), sink_frames=3)
    assert cluster_entries(q, k, {0: sinks}, LAYOUT, 0.3, {})[0].entry.is_dense
    for keep, density in ((Share(0.0, 1), 0.0), (Share(1.0, 1), 1.0), (Budget(beta=1.0), 1.0)):
        pattern = Pattern(Cluster(keep, least=0.0))
        exact, _ = token_mask(cluster_entries(q, k, {0: pattern}, LAYOUT, 0.3, {})[0].entry)
        assert exact[6:-9, 6:-9].float().mean() == pytest.approx(density, abs=0.15)


def test_clusters_have_an_order_of_their_own():
    with pytest.raises(ValueError, match=r"has an order of its own, and takes no \['tile'\]"):
        Pattern(Cluster(), tile=(1, 8, 8))
    with pytest.raises(ValueError, match="takes no"):
        Pattern(Cluster(), far=True, pool=16)
    assert str(Pattern(Cluster(), far=True)) == "cluster far=True"
