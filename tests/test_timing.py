"""Figures of speed: what a busy machine does to them, and what is said of it."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from sparse_dit.bench.measure import interleaved
from sparse_dit.generation import GenerationSettings
from sparse_dit.search.options import SearchOptions
from sparse_dit.search.provenance import measured_of
from sparse_dit.search.verify import Verified
from sparse_dit.timing import (
    LEAST_SHARE,
    QUEUED,
    Pairs,
    Stopwatch,
    Taken,
    Timer,
    timed,
    timing_of,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def busy(seconds):
    """Computes for so much CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def pairs(dense, sparse, wall=1.0):
    """Pairs of these seconds, by the clock `wall` times as long."""
    return Pairs(
        *([Taken(seconds, wall * seconds) for seconds in side] for side in (dense, sparse))
    )


def test_what_waits_takes_no_seconds_and_shows():
    """As if another program had the processor for a while."""
    timer = Timer(CPU)
    busy(0.05)
    time.sleep(0.3)
    taken = timer.stop()
    assert 0.05 <= taken.seconds < 0.2 and taken.wall > 0.35
    assert taken.share < LEAST_SHARE
    assert timed(lambda: time.sleep(0.2), CPU) < 0.1
    watch = Stopwatch()
    assert watch.run(lambda: busy(0.05), CPU) is None and watch.run(lambda: 3, CPU) == 3
    watch.run(lambda: time.sleep(0.2), CPU)
    assert 0.05 <= watch.seconds < 0.2


def test_a_gpu_is_timed_by_its_own_clock_over_calls_that_are_queued(monkeypatch):
    queue = []

    class Event:
        def __init__(self, device, enable_timing):
            assert device == GPU and enable_timing

        def record(self):
            queue.append(self)

        def synchronize(self):
            queue.append("wait")

        def elapsed_time(self, end):
            return 2.0 * (queue.index(end) - queue.index(self) - 1)

    monkeypatch.setattr(torch, "Event", Event)
    assert timed(lambda: queue.append("call"), GPU) == pytest.approx(2e-3)
    assert [entry if isinstance(entry, str) else "event" for entry in queue] == [
        "call", "event", *["call"] * QUEUED, "event", "wait"
    ]  # fmt: skip
    (one,) = interleaved({"call": lambda: None}, clock="wall", rounds=1, device=GPU).values()
    assert one.samples == 1 and queue.count("wait") == 2


def test_what_other_threads_compute_counts_too(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    worker = threading.Thread(target=busy, args=(0.1,))
    timer = Timer(CPU)
    worker.start()
    worker.join()
    assert timer.stop().seconds >= 0.1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert timer.stop().seconds < 0.1  # of which this thread did nothing


def test_pairs_say_what_they_are_worth():
    quiet = pairs([12.0, 13.0], [8.0, 9.0])
    assert quiet.speedup == pytest.approx(25 / 17)
    assert quiet.speedups == pytest.approx([1.5, 13 / 9])
    assert quiet.spread == pytest.approx((1.5 - 13 / 9) / ((1.5 + 13 / 9) / 2))
    assert quiet.caution is None
    assert timing_of(quiet) == {"speedup_least": 1.4444, "speedup_most": 1.5, "timed_pairs": 2}
    apart = pairs([10.0, 10.0], [5.0, 8.0])
    assert apart.caution and "differ by 46%" in apart.caution
    crowded = pairs([12.0, 13.0], [8.0, 9.0], wall=2.0)
    assert crowded.speedup == quiet.speedup
    assert crowded.caution and "too busy" in crowded.caution and "50%" in crowded.caution
    assert timing_of(crowded)["caution"] == crowded.caution
    single = pairs([12.0], [8.0])
    assert single.spread is None and single.caution is None
    assert timing_of(single) == {"timed_pairs": 1}


def test_a_plan_keeps_what_its_speedup_is_worth():
    options = SearchOptions(settings=GenerationSettings(64, 64), min_psnr=30)
    found = pairs([12.0, 13.0], [8.0, 9.0], wall=2.0)
    verified = Verified({"psnr_db": 31.0}, 1.47, 17.0, found)
    measured = measured_of(options, verified, "psnr_db", 2)
    assert measured["speedup"] == 1.47 and measured["speedup_least"] == 1.4444
    assert "too busy" in measured["caution"]
    assert "psnr_db_least" not in measured
    by_case = [{"psnr_db": 33.0004}, {"psnr_db": 29.0}]
    several = measured_of(options, replace(verified, by_case=by_case), "psnr_db", 2)
    assert (several["psnr_db_least"], several["psnr_db_most"]) == (29.0, 33.0)
    dense = measured_of(options, Verified({"psnr_db": 100.0}, 1.0, 17.0), "psnr_db", 2)
    assert dense["speedup"] == 1.0 and dense["timing"] == "dense; not measured"
    assert not {"timed_pairs", "caution"} & set(dense)
