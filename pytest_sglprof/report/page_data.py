"""What the page's scripts draw of one window, packed so that a large page opens at once."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_sglprof.report.plain import unix_ns
from pytest_sglprof.trace.kernels import CATEGORIES

Document = Mapping[str, Any]

COLOURS = {row.name: row.colour for row in CATEGORIES}
DIGITS = 4  # significant ones of a time; the page shows three


def embedded(value: Any) -> str:
    """JSON, packed by gzip, as base64: no letter of a name can end the element that holds it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def unpacked(text: str) -> Any:
    """The value that `embedded` packed."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def drawn(window: Document) -> dict[str, Any]:
    """Steps, kernels and lanes of a window, times cut after four significant digits.

    Starts in lanes stand as gaps, ns from the end of the activity before, exactly.
    """
    return {
        "id": window["id"],
        "series": [
            {
                **series,
                "compute_ns": _short(series["compute_ns"]),
                "wait_ns": _short(series["wait_ns"]),
            }
            for series in window.get("step_times") or ()
        ],
        "kernels": [
            {
                "ranks": group["ranks"],
                "numbers": group["numbers"],
                "rows": [
                    {
                        "name": row["name"],
                        **{key: _short(row[key]) for key in _MATRICES if key in row},
                    }
                    for row in group["rows"]
                ],
            }
            for group in window.get("kernels") or ()
        ],
        "lanes": _lanes(window.get("lanes")),
        "onset": _onset(window),
        "load": window.get("load_samples") or [],
    }


_MATRICES = ("quantiles", "by_step", "by_call")


def _short(value: Any) -> Any:
    """Integers of a nested list, cut after four significant digits.

    Cut, not rounded: then the three that the page shows are those of the exact value.
    """
    if isinstance(value, list):
        return [_short(item) for item in value]
    if value is None or abs(value) < 10**DIGITS:
        return value
    size = 10 ** (len(str(abs(value))) - DIGITS)
    return value - value % size


def _lanes(lanes: Document | None) -> dict[str, Any] | None:
    if lanes is None:
        return None
    steps = []
    for picture in lanes["steps"]:
        packed = [
            {
                "rank": lane["rank"],
                "stream": lane["stream"],
                "name": lane["name"],
                "gap_ns": _gaps(lane["start_ns"], lane["dur_ns"]),
                "dur_ns": lane["dur_ns"],
                "match": lane["match"],
            }
            for lane in picture["lanes"]
        ]
        steps.append({**picture, "lanes": packed})
    return {**lanes, "colours": COLOURS, "steps": steps}


def _gaps(starts: Sequence[int], durations: Sequence[int]) -> list[int]:
    ends = [0, *(start + dur for start, dur in zip(starts, durations, strict=True))]
    return [start - end for start, end in zip(starts, ends, strict=False)]


def _onset(window: Document) -> dict[str, Any] | None:
    """Unix time of the onset in ms, and its sentence."""
    onset = window.get("onset")
    if not onset or onset.get("time") is None:
        return None
    return {"ms": unix_ns(onset["time"]) / 1e6, "sentence": onset.get("sentence") or ""}
