"""What the page's tables show of one window, computed once, so that the template only places it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from pytest_sglprof.gate.wording import beside_limit, count, milliseconds, percent, ratio
from pytest_sglprof.metrics import METRICS, metrics_of
from pytest_sglprof.trace.kernels import NOT_COMPUTE

Document = Mapping[str, Any]

# A cell's shade says how far above the group's mean it is, on the same scale in every page.
SHADES = (1.01, 1.02, 1.05, 1.10, 1.20, 1.35, 1.60)
MAX_NAME = 120
MIN_SHADED = 0.01  # of the lost time of all kernels


def shade(ratio: float | None) -> int:
    """0 (at or below the mean) to 7 (1.6 times the mean or more)."""
    return 0 if ratio is None else sum(ratio >= limit for limit in SHADES)


def heat_maps(window: Document) -> list[dict[str, Any]]:
    """For each work group its rank x category table of time relative to the group's mean.

    columns: `scope, compute`; figures: `label, cells`, one a metric, a cell being its `text`, and
    what stands `beside`; rows: `rank, mark, slowest_share, waits, cells`, a cell being `ns, ratio,
    shade, top`. mark: "straggler" where
    arrivals at collectives name this rank, "slowest" where a verdict does, else "": a rank
    that is slowest by chance is not pointed at. span: which time the table is about.
    """
    return [_heat_map(window, finding) for finding in _scopes(window, "compute")]


def _scopes(window: Document, scope: str, group: str | None = None) -> list[Document]:
    return [
        finding
        for finding in window["findings"]
        if finding["scope"] == scope
        and not finding["kernel"]
        and (group is None or finding["group"] == group)
    ]


def _heat_map(window: Document, compute: Document) -> dict[str, Any]:
    group = compute["group"]
    findings = [
        finding
        for finding in window["findings"]
        if finding["group"] == group and not finding["kernel"]
    ]
    whole = compute["compared_steps"] == 0
    ranks = [figure["rank"] for figure in compute["ranks"]]
    waits = _waits(window, group, ranks)
    late = straggler(window, group)
    mark = "straggler" if late else "slowest"
    late = late or _judged_slow(window, group)
    shares = {figure["rank"]: figure["slowest_share"] for figure in compute["ranks"]}
    columns: list[Document] = []
    cells: dict[str, list[dict[str, Any]]] = {rank: [] for rank in ranks}
    for finding in findings:
        totals = _totals(window, finding, whole)
        mean = sum(totals.values()) / len(totals) if totals else 0
        if not mean and finding["scope"] != "compute":
            continue
        columns.append(finding)
        top = max(totals.values(), default=0)
        compared = finding["scope"] not in NOT_COMPUTE
        for rank in ranks:
            ratio = totals[rank] / mean if mean and len(ranks) > 1 else None
            alone = totals[rank] == top and list(totals.values()).count(top) == 1
            cells[rank].append(
                {
                    "ns": totals[rank],
                    "ratio": ratio,
                    "shade": shade(ratio) if compared else 0,
                    "top": alone and compared and ratio is not None and ratio >= SHADES[0],
                }
            )
    return {
        "group": group,
        "reason": compute["reason"],
        "span": _span(compute),
        "columns": [
            {"scope": finding["scope"], "compute": finding["scope"] not in NOT_COMPUTE}
            for finding in columns
        ],
        "figures": _figures(columns),
        "has_waits": bool(waits),
        "rows": [
            {
                "rank": rank,
                "mark": mark if rank == late else "",
                "slowest_share": shares[rank],
                "cells": cells[rank],
                "waits": waits.get(rank),
            }
            for rank in ranks
        ],
    }


def _figures(findings: Sequence[Document]) -> list[dict[str, Any]]:
    """The lines below the ranks: each metric of every column."""
    return [
        {
            "label": metric.label.capitalize(),
            "cells": [
                {
                    "text": metric.format(finding.get(metric.value), finer=1, none="–"),
                    "beside": _beside(metric.name, finding),
                }
                for finding in findings
            ],
        }
        for metric in metrics_of("ranks")
    ]


def _beside(metric: str, finding: Document) -> str:
    """The same thing measured another way."""
    if metric == "lost_share":
        return f"{milliseconds(finding['lost_ns'])} ms"
    known = metric == "imbalance_factor" and finding.get("factor_sync") is not None
    return f"sync {ratio(finding['factor_sync'], 3)}" if known else ""


def _totals(window: Document, finding: Document, whole: bool) -> dict[str, int]:
    totals = {figure["rank"]: figure["busy_ns"] for figure in finding["ranks"]}
    if not whole:
        return totals
    totals = dict.fromkeys(totals, 0)
    for row in window["table"]:
        scope = finding["scope"]
        mine = (
            row["category"] not in NOT_COMPUTE if scope == "compute" else row["category"] == scope
        )
        if mine and row["rank"] in totals:
            totals[row["rank"]] += row["total_ns"]
    return totals


def _waits(window: Document, group: str, ranks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By rank: time waited in matched collectives, its share of communication, its ratio."""
    sums = _arrival_waits(window, ranks) or _series_waits(window, group)
    if not sums:
        return {}
    mean = sum(sums.values()) / len(sums)
    found = next(iter(_scopes(window, "communication", group)), None)
    spent = {f["rank"]: f["total_ns"] for f in found["ranks"]} if found else {}
    least = min(sums, key=lambda rank: sums[rank])
    return {
        rank: {
            "wait_ns": sums[rank],
            "communication_ns": spent.get(rank, 0),
            "ratio": sums[rank] / mean if mean else None,
            "share": sums[rank] / spent[rank] if spent.get(rank) else None,
            # The rank that is late waits least, so the darkest cell is the one with least.
            "shade": shade(mean / max(sums[rank], 1)) if mean else 0,
            "least": rank == least and mean > 0 and sums[rank] < 0.9 * mean,
        }
        for rank in ranks
    }


def _arrival_waits(window: Document, ranks: Sequence[str]) -> dict[str, int]:
    """Waits as the straggler's own analysis tells them, its clocks being brought together."""
    found = {
        figure["rank"]: figure["wait_ns"]
        for group in window.get("stragglers") or ()
        for figure in group.get("ranks") or ()
        # Without a matched collective nothing was measured: its zeros are no waits.
        if figure.get("wait_ns") is not None and group.get("collectives") != 0
    }
    return {rank: found[rank] for rank in ranks} if set(ranks) <= set(found) else {}


def _series_waits(window: Document, group: str) -> dict[str, int]:
    series = next((s for s in window.get("step_times") or () if s["group"] == group), None)
    if series is None or series["wait_ns"] is None:
        return {}
    known = [
        row
        for row, state in zip(series["wait_ns"], series["state"], strict=True)
        if state == "compared"
    ]
    return {rank: sum(row[at] for row in known) for at, rank in enumerate(series["ranks"])}


def straggler(window: Document, group: str) -> str | None:
    """The straggler among the ranks of a work group, by arrivals; None where nobody is."""
    members = next((g["ranks"] for g in window["steps"]["groups"] if g["group"] == group), ())
    named = (found.get("straggler") for found in window.get("stragglers") or ())
    return next((str(rank) for rank in named if rank in members), None)


def _judged_slow(window: Document, group: str) -> str | None:
    """The slowest rank of a judgement that failed; the judgement that decided comes first."""
    judgements = list(window["judgements"])
    if window["decisive"] is not None:
        judgements.insert(0, judgements[window["decisive"]])
    for judgement in judgements:
        finding = judgement["finding"]
        if judgement["verdict"] == "fail" and finding and finding["group"] == group:
            slowest: str | None = finding["slowest"]
            return slowest
    return None


def _span(compute: Document) -> str:
    if compute["compared_steps"] is None:
        return "in the whole window, whose source tells no steps"
    if not compute["compared_steps"]:
        return "in the whole window, since no step could be compared"
    return f"in {count(compute['compared_steps'], 'compared step')}"


def kernel_rows(group: Document) -> list[dict[str, Any]]:
    """The rows of the kernel table of one work group, as they are shown.

    cells: category, lost time, its share of what compute loses, slowest rank, slowdown, mean
    of the ranks, calls a rank; each its `text` and the classes `of` its cell.
    """
    lost = sum(row["lost_ns"] for row in group["rows"] if row["category"] not in NOT_COMPUTE)
    return [_kernel_row(row, group["ranks"], lost) for row in group["rows"]]


def _kernel_row(row: Document, ranks: Sequence[str], lost: int) -> dict[str, Any]:
    """Of communication nobody is called slowest: who takes long there waits for the others."""
    outside = row["category"] in NOT_COMPUTE
    totals = row["total_ns"]
    top = max(range(len(totals)), key=totals.__getitem__)
    others = [ns for at, ns in enumerate(totals) if at != top]
    typical = median(others) if others else 0
    # Kernels that cost nothing are not shaded, however unequal they are.
    telling = not outside and lost > 0 and row["lost_ns"] >= MIN_SHADED * lost
    name = row["name"]
    slowest = None if outside or totals.count(totals[top]) > 1 else ranks[top]
    slowdown = None if outside or not typical else totals[top] / typical
    level = shade(slowdown) if telling else 0
    return {
        "name": name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…",
        "full": name,
        "outside": outside,
        "cells": [
            {"text": row["category"], "of": ""},
            {"text": milliseconds(row["lost_ns"]), "of": "n"},
            {"text": percent(row["lost_ns"] / lost) if lost and not outside else "–", "of": "n"},
            {"text": slowest or "–", "of": ""},
            {"text": "–" if slowdown is None else ratio(slowdown), "of": f"n s{level}"},
            {"text": milliseconds(sum(totals) / len(totals)), "of": "n"},
            {"text": f"{round(sum(row['count']) / len(ranks)):,}", "of": "n"},
        ],
    }


def numbers(judgement: Document) -> list[str]:
    """The figures that decided, as short phrases."""
    finding = judgement["finding"]
    if finding is None:
        return []
    parts = []
    metric = METRICS[judgement["metric"]]
    if judgement["value"] is not None:
        value, limit = beside_limit(metric, judgement["value"], judgement["limit"])
        parts.append(f"{metric.label} {value}{limit}")
    # The metric's own interval: another one beside it would be a wrong number.
    if interval := finding.get(metric.interval):
        low, high = interval
        parts.append(f"95 % interval {metric.format(low)} to {metric.format(high)}")
    if finding.get("p_value") is not None:
        parts.append(f"p {finding['p_value']:.2g}")
    parts += [
        f"{other.label} {other.format(finding[other.value])}"
        for other in metrics_of("ranks")
        if other is not metric and finding.get(other.value) is not None
    ]
    if finding.get("factor_sync") is not None:
        parts.append(f"λ sync {finding['factor_sync']:.2f}")
    if finding["steps"] is not None:
        parts.append(count(finding["steps"], "step"))
    return parts
