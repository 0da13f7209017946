"""Windows of one test and name over several runs: a table, and the charts above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_sglprof.analysis.stratum_change import compare_strata
from pytest_sglprof.metrics import metrics_of
from pytest_sglprof.report.baseline import not_comparable, paired_by
from pytest_sglprof.report.strata import strata_of

Document = Mapping[str, Any]


def history(
    documents: Sequence[Document], windows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Every test and window name that stands in more than one run, oldest run first.

    windows: what the page holds of each window (`doc`, `run`, `anchor`, `load`). points: one a
    run; `rows` are its work groups, `work` the ratio of equal work to the first run by stage
    (None where it is inconclusive). charts: `title`, `better` and `series` over the points.
    """
    on_page = {id(window["doc"]): window for window in windows}
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for document in documents:
        for key, window in paired_by(document).items():
            found.setdefault(key, []).append(on_page[id(window)])
    several = {key: same for key, same in found.items() if len(same) > 1}
    return [_one(key, sorted(same, key=_opened)) for key, same in several.items()]


def _opened(window: Mapping[str, Any]) -> str:
    return str(window["doc"]["opened"])


def _one(key: tuple[str, str, int], windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    nodeid, name, _ = key
    first = next((w["doc"] for w in windows if w["doc"].get("strata")), windows[0]["doc"])
    points = [_point(window, first) for window in windows]
    return {
        "nodeid": nodeid,
        "name": name,
        "points": points,
        "stages": list(dict.fromkeys(stage for point in points for stage in point["work"])),
        "drawn": {"runs": [_about(point) for point in points], "charts": _charts(points)},
    }


def _point(window: Mapping[str, Any], first: Document) -> dict[str, Any]:
    doc, load = window["doc"], window["load"] or {}
    rows = [
        {
            "group": finding["group"],
            "slowest": finding["slowest"],
            **{metric.value: finding.get(metric.value) for metric in metrics_of("ranks")},
            "compute_ns": _compute_of_a_step(finding),
        }
        for finding in doc["findings"]
        if finding["scope"] == "compute" and not finding["kernel"] and not finding["stage"]
    ]
    return {
        "run": window["run"]["run"]["id"],
        "anchor": window["anchor"],
        "opened": doc["opened"] or "",
        "verdict": doc["verdict"],
        "rows": rows,
        "work": _equal_work(first, doc),
        "ttft": load.get("ttft", {}).get("mean"),
        "tpot": load.get("tpot", {}).get("mean"),
        "output": load.get("output_throughput"),
    }


def _compute_of_a_step(finding: Document) -> float | None:
    """Mean of steps and ranks, ns."""
    if not finding["compared_steps"] or not finding["ranks"]:
        return None
    total = sum(figure["total_ns"] for figure in finding["ranks"])
    return float(total) / len(finding["ranks"]) / float(finding["compared_steps"])


def _equal_work(first: Document, window: Document) -> dict[str, float | None]:
    """By stage, compute of equal work over that of `first`: of groups the largest ratio."""
    if window is not first and not_comparable(first, window):
        return {}
    found: dict[str, float | None] = {}
    for stage in compare_strata(strata_of(first), strata_of(window)):
        name = stage.stage or "all"
        ratio = stage.compute.ratio if stage.compute else None
        known = [value for value in (found.get(name), ratio) if value is not None]
        found[name] = max(known, default=None)
    return found


def _about(point: Mapping[str, Any]) -> dict[str, str]:
    return {key: point[key] for key in ("run", "opened", "verdict")}


def _charts(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Charts with fewer than two known figures are left out."""
    stages = dict.fromkeys(stage for point in points for stage in point["work"])
    groups = max(len(point["rows"]) for point in points)
    worst = ", worst group" if groups > 1 else ""
    work = [(stage, [point["work"].get(stage) for point in points]) for stage in stages]
    slowdown = [
        max((row["slowdown"] for row in point["rows"] if row["slowdown"] is not None), default=None)
        for point in points
    ]
    charts = [
        (f"Compute of equal work / first run{worst}", "less", work),
        (f"Slowdown of compute, slowest rank{worst}", "less", [("", slowdown)]),
        ("TTFT, mean, ms", "less", [("", [point["ttft"] for point in points])]),
        ("TPOT, mean, ms", "less", [("", [point["tpot"] for point in points])]),
        ("Output tokens/s", "more", [("", [point["output"] for point in points])]),
    ]
    kept = []
    for title, better, series in charts:
        lines = [(label, values) for label, values in series if _known(values) > 1]
        if lines:
            listed = [{"label": label, "values": values} for label, values in lines]
            kept.append({"title": title, "better": better, "series": listed})
    return kept


def _known(values: Sequence[float | None]) -> int:
    return sum(value is not None for value in values)
