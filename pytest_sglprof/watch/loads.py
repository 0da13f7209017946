"""`LoadsSource`: load of every DP rank from `/v1/loads`, which needs no flag of the server."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_sglprof.analysis.unequal import seem_unequal
from pytest_sglprof.server.client import LOADS, DpLoad, read_loads
from pytest_sglprof.values import LoadSample
from pytest_sglprof.watch.http_source import HttpSource

INTERVAL = 0.5  # s; a rank refreshes its figures every 15 decode steps
CLOSER = 0.1  # s; between two looks while the ranks seem unequal
CLOSER_LOOKS = 50  # in a row: what has lasted for 5 s is not chance


class LoadsSource(HttpSource):
    """Samples of all ranks at one moment, the moment of the answer.

    Short requests that begin together make waves, and four looks in 2 s can all fall into
    the moments between two of them. So it looks closer as soon as the ranks seem unequal.
    """

    path = LOADS
    _unequal_looks = 0

    async def poll(self) -> Sequence[LoadSample]:
        """The newest load of each rank; nothing where the server does not answer."""
        response = await self.ask()
        if response is None:
            return []
        try:
            loads = read_loads(response.json())
        except ValueError as error:
            self.failed(f"not the load of an SGLang server: {error}")
            return []
        samples = load_samples(loads, self._clock())
        self._unequal_looks = self._unequal_looks + 1 if seem_unequal(samples) else 0
        if 1 <= self._unequal_looks <= CLOSER_LOOKS:
            self.delay = min(CLOSER, self.delay)
        return samples

    def without(self) -> str:
        """Older servers have none."""
        return "follow the server's log instead: sglprof watch LOG --follow"


def load_samples(loads: Sequence[DpLoad], now: float) -> list[LoadSample]:
    """The loads at one moment; labels have no DP part where there is one DP rank."""
    return [
        LoadSample(
            time=now,
            rank="" if len(loads) == 1 else f"DP{load.dp_rank}",
            running=load.running,
            waiting=load.waiting,
            tokens=load.tokens,
            token_usage=load.token_usage,
            throughput=load.throughput,
            source="loads",
        )
        for load in loads
    ]
