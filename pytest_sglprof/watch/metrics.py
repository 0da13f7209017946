"""`MetricsSource`: the balances that a server measures itself, from `/metrics`."""

from __future__ import annotations

import re

from pytest_sglprof.values import BalanceSample
from pytest_sglprof.watch.http_source import HttpSource
from pytest_sglprof.watch.log_lines import Sample

INTERVAL = 2.0  # s; the server gathers all series of all its processes for each answer

_LINE = re.compile(
    r"^sglang:(dp_attention_token_imbalance_ratio|eplb_balancedness)_(sum|count)"
    r"(?:\{[^}]*\})? (\S+)",
    re.M,
)


class MetricsSource(HttpSource):
    """Means between two answers of what happened once a step.

    Needs `--enable-metrics`, and SGLANG_ENABLE_METRICS_DP_ATTENTION=1 for `dp_tokens` or
    an expert recorder with `--expert-balancedness-report-mode` for `experts`; without
    these series it gives nothing.
    """

    path = "/metrics"
    _before: dict[str, tuple[float, float]] | None = None

    async def poll(self) -> list[Sample]:
        """At most one sample of each kind: the mean over the steps since the last call."""
        response = await self.ask()
        if response is None:
            return []
        now, before = read_metrics(response.text), self._before
        self._before = now
        if before is None:
            return []
        moment = self._clock()
        samples: list[Sample] = []
        for name, (total, count) in now.items():
            old_total, old_count = before.get(name, (0.0, 0.0))
            steps = count - old_count
            if steps <= 0 or total <= old_total:
                continue
            mean = (total - old_total) / steps
            if name == "eplb_balancedness":
                samples.append(BalanceSample(moment, "", "experts", 1 / mean, source="metrics"))
            else:
                samples.append(BalanceSample(moment, "", "dp_tokens", mean, source="metrics"))
        return samples

    def without(self) -> str:
        """The endpoint is a switch of the server."""
        return "start the server with --enable-metrics"


def read_metrics(text: str) -> dict[str, tuple[float, float]]:
    """Name -> (sum, count) of the series that tell a balance, over all their labels."""
    found: dict[str, list[float]] = {}
    for name, part, value in _LINE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        found.setdefault(name, [0.0, 0.0])[part == "count"] += number
    return {name: (total, count) for name, (total, count) in found.items()}
