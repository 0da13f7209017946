"""Triggers on figures whose moment is known, and what a marker may not say."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_sglprof._errors import SettingsError
from pytest_sglprof._load.onset import Onset
from pytest_sglprof._load.samples import LoadSample
from pytest_sglprof._load.triggers import (
    ImbalanceOnset,
    QueueGrowth,
    ThroughputDrop,
    as_trigger,
    describe_trigger,
)


def fed(trigger: Any, figures: list[dict[str, float]], every: float = 0.5) -> list[Onset]:
    """Onsets of two ranks that share these sums."""
    detector = as_trigger(trigger).detector(["DP0", "DP1"])
    declared = []
    for number, figure in enumerate(figures):
        now = number * every
        half = {name: value / 2 for name, value in figure.items()}
        samples = [
            LoadSample(
                now,
                rank,
                int(half.get("running", 10)),
                int(half.get("waiting", 0)),
                100,
                0.1,
                half.get("throughput", 0.0),
                source="loads",
            )
            for rank in ("DP0", "DP1")
        ]
        declared += detector.add(samples, now)
    return declared


def test_a_queue_that_grows_and_stays() -> None:
    waiting = [4.0] * 10 + [30.0] * 10
    (onset,) = fed(QueueGrowth(requests=20), [{"waiting": w} for w in waiting])
    assert (onset.time, onset.declared, onset.kind) == (5.0, 7.0, "queue_growth")
    assert onset.sentence == "30 requests wait, 26 more than the fewest before"
    assert fed(QueueGrowth(requests=40), [{"waiting": w} for w in waiting]) == []
    spike = [4.0] * 10 + [30.0] * 3 + [4.0] * 10
    assert fed(QueueGrowth(requests=20), [{"waiting": w} for w in spike]) == []


def test_throughput_that_drops_under_the_same_load() -> None:
    figures = [{"running": 32, "throughput": 1000.0}] * 16
    (onset,) = fed(ThroughputDrop(), [*figures, *[{"running": 32, "throughput": 600.0}] * 16])
    assert (onset.time, onset.declared) == (8.0, 11.0)
    assert onset.factor == pytest.approx(1000 / 600)
    assert fed(ThroughputDrop(), [*figures, *[{"running": 32, "throughput": 800.0}] * 16]) == []
    # The load ends: nothing dropped.
    assert fed(ThroughputDrop(), [*figures, *[{"running": 4, "throughput": 100.0}] * 16]) == []


def test_a_callable_gets_the_newest_sample_of_each_rank() -> None:
    seen = []

    def trigger(loads: Any) -> bool:
        seen.append({rank: load.waiting for rank, load in loads.items()})
        return len(seen) == 3

    (onset,) = fed(trigger, [{"waiting": w} for w in (2, 4, 6, 8)])
    assert seen[0] == {"DP0": 1, "DP1": 1}
    assert (onset.time, onset.kind) == (1.0, "custom")
    assert str(describe_trigger(trigger)).endswith("trigger")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImbalanceOnset(factor=1.0),
        lambda: ImbalanceOnset(hold=0),
        lambda: ImbalanceOnset(within=-1),
        lambda: ImbalanceOnset(source="metrics"),  # type: ignore[arg-type]  # wrong on purpose
        lambda: QueueGrowth(on_no_onset="maybe"),  # type: ignore[arg-type]  # likewise
        lambda: QueueGrowth(requests=True),
        lambda: ThroughputDrop(share=1.0),
        lambda: as_trigger("imbalance"),
        lambda: as_trigger(ImbalanceOnset),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any) -> None:
    with pytest.raises(SettingsError):
        make()


def test_a_trigger_is_told_as_it_was_written() -> None:
    assert str(describe_trigger(QueueGrowth(requests=9))).startswith("QueueGrowth(requests=9, ")
    assert describe_trigger(None) is None
