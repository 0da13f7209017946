"""What a server measures of itself: the series of `/metrics` that explain a window.

Names, labels and flags are those of `observability/metrics_collector.py` in SGLang 0.5.23. The
balance of experts needs `--expert-balancedness-report-mode prometheus` (or `both`), the waits of
the schedulers SGLANG_ENABLE_METRICS_DP_ATTENTION=1; all need `--enable-metrics`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_sglprof._errors import ServerError
from pytest_sglprof._server.log_lines import ServerFacts, SyncWait

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server

BALANCEDNESS = "eplb_balancedness"
SYNC_WAIT = "dp_attention_sync_wait_seconds"
LONG_WAIT = 0.1  # s; a bound of the buckets of SYNC_WAIT

_LINE = re.compile(
    rf"^sglang:(dp_attention_token_imbalance_ratio|{BALANCEDNESS}|{SYNC_WAIT})"
    r"_(sum|count|bucket)(?:\{([^}]*)\})? (\S+)",
    re.M,
)
_DP_RANK = re.compile(r'\bdp_rank="(\d{1,9})"')
_BOUND = re.compile(r'\ble="([^"]*)"')


@dataclass(frozen=True)
class Total:
    """A series since the server began. short: how many observations are up to `LONG_WAIT`."""

    sum: float = 0.0
    count: float = 0.0
    short: float = 0.0


Totals = Mapping[tuple[str, int | None], Total]


def read_totals(text: str) -> Totals:
    """Maps name and DP rank (None where there is one engine) to the total over other labels."""
    totals: dict[tuple[str, int | None], Total] = {}
    for name, part, labels, value in _LINE.findall(text):
        bound = _BOUND.search(labels)
        if part == "bucket":
            if name != SYNC_WAIT or bound is None or _number(bound[1]) != LONG_WAIT:
                continue
            part = "short"
        number = _number(value)
        if not math.isfinite(number):
            continue
        dp_rank = _DP_RANK.search(labels)
        key = (name, int(dp_rank[1]) if dp_rank else None)
        total = totals.setdefault(key, Total())
        totals[key] = replace(total, **{part: getattr(total, part) + number})
    return totals


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def between(before: Totals, after: Totals) -> ServerFacts:
    """The means over the passes between two answers of a server."""
    more = {key: _less(total, before.get(key, Total())) for key, total in after.items()}
    known = {key: total for key, total in more.items() if total.count > 0 and total.sum >= 0}
    balances = [total for (name, _), total in known.items() if name == BALANCEDNESS]
    passes = sum(total.count for total in balances)
    return ServerFacts(
        balancedness=sum(total.sum for total in balances) / passes if passes else None,
        sync_waits=tuple(
            SyncWait(dp, total.sum / total.count, round(total.count), _long(total))
            for (name, dp), total in known.items()
            if name == SYNC_WAIT and dp is not None
        ),
    )


def _less(total: Total, before: Total) -> Total:
    return Total(total.sum - before.sum, total.count - before.count, total.short - before.short)


def _long(total: Total) -> int:
    return max(0, round(total.count - total.short))


class SeriesWatch:
    """Asks for the series when it is made and when it ends. Nothing here raises `ServerError`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._problem = ""
        self._before = self._ask()

    def finish(self) -> tuple[ServerFacts, tuple[str, ...]]:
        """What the series say about the time since then, and a note if they were not readable."""
        after = {} if self._problem else self._ask()
        if self._problem:
            return ServerFacts(), (f"the server's metrics are left out: {self._problem}",)
        return between(self._before, after), ()

    def _ask(self) -> Totals:
        try:
            return read_totals(self._server.client.metrics())
        except ServerError as error:
            self._problem = error.what
            return {}


def watch_series(server: Server) -> SeriesWatch | None:
    """A watch of a server that may have one of these series; else None, and no request."""
    info = server.info
    reports = info.get("expert_balancedness_report_mode") in ("prometheus", "both")
    has_any = info.get("enable_metrics") and (info.get("enable_dp_attention") or reports)
    return SeriesWatch(server) if has_any else None
