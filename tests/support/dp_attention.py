"""A real server with DP attention, whose ranks get the requests that a test wants.

`record` runs a project of a user (`tests.support.real_project`) whose test sends routed
requests while a torch window is open. The unit of the load is one request of one DP rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_sglprof._config.load import Settings
from pytest_sglprof._run.measure import WindowFiles, read_recorded
from pytest_sglprof._trace.table import KernelTable
from tests.support.real_env import RealSglang
from tests.support.real_project import Outcome, run_project, write_project

MODEL = "qwen3moe"
RANKS = 2
ARGS = ("--tp", "2", "--dp", "2", "--enable-dp-attention", "--boundary-reduction", "ar")
METRICS = ("--enable-metrics",)  # of waits only with the environment below
WAITS = {"SGLANG_ENABLE_METRICS_DP_ATTENTION": "1"}
EXPERTS = ("--ep-size", "2", "--expert-distribution-recorder-mode", "per_pass")
LIMIT_S = 120.0  # s for the answers to all requests


@dataclass(frozen=True)
class Request:
    """One request: its DP rank, tokens of its prompt, and tokens that it generates.

    late: sent once the window is open, so that its prefill is in the window.
    """

    dp_rank: int
    prompt: int
    output: int
    late: bool = False


@dataclass(frozen=True)
class Load:
    """The requests of a window of so many passes."""

    load: tuple[Request, ...]
    steps: int = 60


# Each request has a prompt of its own, so that none shares a prefix. The window opens once all of
# them run that are not late; what still runs at its end is aborted.
BODY = """
import json
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

LOADS = json.loads(pathlib.Path("load.json").read_text())


def send(client, number, request):
    tokens = [10 + (7 * number + place) % 900 for place in range(request["prompt"])]
    sampling = dict(max_new_tokens=request["output"], ignore_eos=True, temperature=0)
    client.post(
        "/generate",
        json=dict(input_ids=tokens, sampling_params=sampling, routed_dp_rank=request["dp_rank"]),
    ).raise_for_status()


@pytest.mark.parametrize("name", list(LOADS))
def test_routed_load(sglang_server, profile_window, name):
    client = httpx.Client(base_url=sglang_server.url, timeout={limit}, trust_env=False)
    load, steps = LOADS[name]["load"], LOADS[name]["steps"]
    numbered = list(enumerate(load))
    early = [each for each in numbered if not each[1]["late"]]
    with client, ThreadPoolExecutor(len(load)) as pool:
        sent = [pool.submit(send, client, *each) for each in early]
        over = time.monotonic() + {limit}
        while sum(load.running for load in sglang_server.client.loads()) < len(early):
            assert time.monotonic() < over
            assert not any(answer.done() for answer in sent), "a request ended before the window"
            time.sleep(0.05)
        with profile_window(name, num_steps=steps, with_stack=False) as window:
            late = [each for each in numbered if each[1]["late"]]
            sent += [pool.submit(send, client, *each) for each in late]
            window.wait()
            client.post("/abort_request", json=dict(rid="", abort_all=True)).raise_for_status()
    if sglang_server.info["enable_metrics"]:
        pathlib.Path(name + ".metrics").write_text(sglang_server.client.metrics())
"""


@dataclass(frozen=True)
class Recorded:
    """A window of DP attention: its kernel table, its folder, and the load that was sent.

    metrics: the server's answer of `/metrics` after it; "" if it has none.
    """

    name: str
    table: KernelTable
    folder: Path
    load: tuple[Request, ...]
    outcome: Outcome
    metrics: str = ""

    def requests(self, dp_rank: int) -> int:
        """How many requests a DP rank was sent."""
        return sum(request.dp_rank == dp_rank for request in self.load)


def record(
    folder: Path,
    sglang: RealSglang,
    loads: Mapping[str, Load],
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> dict[str, Recorded]:
    """Starts a server with DP attention, sends each load, and records a window of each."""
    body = BODY.replace("{limit}", str(LIMIT_S))
    write_project(folder, sglang, body, model=MODEL, args=(*ARGS, *args), ranks=RANKS, env=env)
    documents = {name: asdict(load) for name, load in loads.items()}
    (folder / "load.json").write_text(json.dumps(documents))
    outcome = run_project(folder)
    assert outcome.windows(), outcome.output
    recorded = {}
    for name, load in loads.items():
        window = outcome.windows()[name]
        paths = [outcome.folder / artifact["path"] for artifact in window["artifacts"]]
        assert len(paths) == RANKS, window["state_reason"]
        table = read_recorded(WindowFiles(tuple(paths)), Settings(folder))
        kept = folder / f"{name}.metrics"
        metrics = kept.read_text() if kept.is_file() else ""
        recorded[name] = Recorded(name, table, paths[0].parent, load.load, outcome, metrics)
    return recorded
