"""What ranks with different input cost each other, for people: the lines of `check`.

The page draws the same parts (`_report/page/sync.py`); the order of the ranks and what is known
of them stand here.
"""

from __future__ import annotations

from collections.abc import Sequence

from pytest_sglprof._analysis.load_split import Part
from pytest_sglprof._analysis.sync import RankSplit, SyncCost, SyncFinding
from pytest_sglprof._analysis.sync_words import HeadWait
from pytest_sglprof._ranks import short_labels
from pytest_sglprof._verdict.wording import count, percent, text_table

MAX_RANKS = 8
NOT_KNOWN = "not known"
COST_PARTS = (
    ("waiting", "waiting in collectives"),
    ("idle", "idle at the head of a pass"),
    ("padding", "padding"),
)
"""The parts of a `SyncCost`, and what they are called."""


def sync_lines(finding: SyncFinding) -> list[str]:
    """Lines: the sentence, the parts of the cost, the passes, and a row for each rank.

    Of more than 8 ranks those that the others wait for most.
    """
    title = f"{finding.group}: " if finding.group else ""
    if finding.reason:
        return [f"{title}ranks with different input are not compared: {finding.reason}"]
    lines = [
        f"{title}{finding.sentence}",
        f"lost {cost_words(finding.cost)}",
        passes_words(finding),
    ]
    ranks = in_order(finding.ranks)
    names = short_labels([each.rank for each in ranks])
    if finding.heads:
        lines.append(heads_words(finding.heads))
    lines += ["", "compute beside the mean of the other ranks, µs a pass"]
    head = ("rank", "difference", "load", "", "speed", "rest", "not known", "at the same work",
            "may be", "waited for")  # fmt: skip
    rows = [_row(each, names) for each in ranks[:MAX_RANKS]]
    lines += text_table(head, rows)
    if len(ranks) > MAX_RANKS:
        more = count(len(ranks) - MAX_RANKS, "rank")
        lines.append(f"and {more} more, for which the others wait less")
    return lines


def in_order(ranks: Sequence[RankSplit]) -> list[RankSplit]:
    """The rank first that the others wait for most, else the one that computes longest."""
    return sorted(ranks, key=lambda each: (-(each.waits_for or 0.0), -each.difference_ns))


def cost_words(cost: SyncCost | None) -> str:
    """`18.2 % of GPU time (17.1 to 19.2 %): waiting in collectives 12.1 %, …`."""
    if cost is None:
        return f"{NOT_KNOWN}: no times of GPUs whose clocks can be compared"
    parts = [f"{what} {share_words(getattr(cost, name))}" for name, what in COST_PARTS]
    interval = ""
    if cost.interval is not None:
        low, high = cost.interval
        interval = f" ({100 * low:.1f} to {100 * high:.1f} %)"
    return f"{share_words(cost.lost)} of GPU time{interval}: {', '.join(parts)}"


def heads_words(heads: Sequence[HeadWait]) -> str:
    """`before a pass, µs: DP0 idles 12 and waits 14 by SGLang's measure; …`."""
    names = short_labels([each.rank for each in heads])
    largest = sorted(heads, key=lambda each: -max(each.idle_ns, each.waited_ns))[:MAX_RANKS]
    words = [
        f"{names[each.rank]} idles {each.idle_ns / 1e3:,.0f}, its scheduler waits "
        f"{each.waited_ns / 1e3:,.0f}"
        + (f" ({count(each.long_waits, 'wait')} above 0.1 s)" if each.long_waits else "")
        for each in largest
    ]
    if len(heads) > len(largest):
        words.append(f"{len(heads) - len(largest)} others less")
    first = heads[0]
    return (
        f"before a pass, µs: {'; '.join(words)} (means of {first.passes:,} traced passes, and of "
        f"{first.waited_passes:,} by SGLang's own measure)"
    )


def share_words(share: float | None) -> str:
    """`12.1 %`."""
    return percent(share, 1, none=NOT_KNOWN)


def passes_words(finding: SyncFinding) -> str:
    """`100 passes: 86 decode, 14 prefill beside decode; gather regime; …`."""
    every = sum(finding.kinds.values())
    words = [f"{count(every, 'pass', 'passes')}: {_kinds(finding)}"]
    words.append(f"{finding.regime or 'unknown'} regime")
    if finding.pushed_out:
        words.append(f"{finding.pushed_out} decode beside a prefill, so without a graph")
    words.append(f"{finding.same_work:,} with the same work on all ranks")
    if finding.missing:
        words.append(f"{finding.missing} not recorded on all ranks")
    return "; ".join(words)


def _kinds(finding: SyncFinding) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in finding.kinds.items())


def microseconds(ns: float | None) -> str:
    """`+1,204`, `−87`, `0`; `-` for None."""
    if ns is None:
        return "-"
    shown = f"{ns / 1e3:+,.0f}"
    return "0" if shown in ("+0", "-0") else shown.replace("-", "−")


def reach_words(part: Part) -> str:
    """`± 4`, µs."""
    low, high = part.bounds
    return f"± {(high - low) / 2e3:,.0f}"


def ratio_words(rank: RankSplit) -> tuple[str, str]:
    """`1.10x` and `1.09 to 1.12`: how long it takes at the same work."""
    if rank.speed_ratio is None:
        return NOT_KNOWN, ""
    interval = rank.speed_interval
    reach = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
    return f"{rank.speed_ratio:.2f}x", reach


def _row(rank: RankSplit, names: dict[str, str]) -> tuple[str, ...]:
    has_load = rank.is_load_known
    return (
        names[rank.rank],
        microseconds(rank.difference_ns),
        microseconds(rank.load.ns if has_load else None),
        reach_words(rank.load) if has_load else "",
        microseconds(rank.speed.ns if rank.is_speed_known else None),
        microseconds(rank.rest.ns if has_load else None),
        microseconds(rank.unknown_ns),
        *ratio_words(rank),
        percent(rank.waits_for),
    )
