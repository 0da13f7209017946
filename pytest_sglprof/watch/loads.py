"""`LoadsSource`: load of every DP rank from `/v1/loads`, which needs no flag of the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_sglprof.values import LoadSample
from pytest_sglprof.watch.http_source import HttpSource
from pytest_sglprof.watch.log_lines import Sample

INTERVAL = 0.5  # s; a rank refreshes its figures every 15 decode steps


class LoadsSource(HttpSource):
    """Samples of all ranks at one moment, the moment of the answer."""

    path = "/v1/loads?include=core"

    async def poll(self) -> list[Sample]:
        """The newest load of each rank; nothing where the server does not answer."""
        response = await self.ask()
        if response is None:
            return []
        try:
            found = response.json()["loads"]
            return loads_samples(found, self._clock())
        except (ValueError, KeyError, TypeError) as error:
            self.failed(f"not the load of an SGLang server ({error!r})")
            return []

    def without(self) -> str:
        """Older servers have none."""
        return "follow the server's log instead: sglprof watch LOG --follow"


def loads_samples(loads: list[Mapping[str, Any]], now: float) -> list[Sample]:
    """`loads` of an answer as samples; labels have no DP part where there is one DP rank."""
    single = len(loads) == 1
    return [
        LoadSample(
            time=now,
            rank="" if single else f"DP{int(load['dp_rank'])}",
            running=int(load["num_running_reqs"]),
            waiting=int(load.get("num_waiting_reqs") or 0),
            tokens=int(load.get("num_used_tokens") or 0),
            token_usage=float(load.get("token_usage") or 0.0),
            throughput=float(load.get("gen_throughput") or 0.0),
            source="loads",
        )
        for load in loads
    ]
