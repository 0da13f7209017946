"""What runs were made with, beside each other: versions, GPUs, commands, load figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_sglprof.gate.wording import ratio
from pytest_sglprof.report.model import RecordedLoad, RecordedServer, Results

NOT_TOLD = "not recorded"
# Options whose value changes with every run and says nothing about the load or the server.
_PLACES = ("--port", "--host", "--base-url", "--output-file", "--nccl-port", "--dist-init-addr")
_LATENCIES = (("ttft", "TTFT"), ("tpot", "TPOT"))
_STATISTICS = ("mean", "median", "p99")
_RATES = (
    ("request_throughput", "Requests/s"),
    ("output_throughput", "Output tokens/s"),
    ("total_throughput", "All tokens/s"),
)


def environment(runs: Sequence[Results]) -> list[dict[str, Any]]:
    """One row a fact: `name`, its `values` in each run, and whether any `differs`.

    Only what some run tells. GPUs are those of the windows, where clocks were read.
    """
    rows: dict[str, list[str]] = {}
    for name in ("started", "host"):
        rows[name] = [getattr(run.run, name) or NOT_TOLD for run in runs]
    versions = [run.run.versions for run in runs]
    for name in dict.fromkeys(name for one in versions for name, value in one.items() if value):
        rows[f"{name} version"] = [one.get(name) or NOT_TOLD for one in versions]
    rows["GPUs"] = [_gpus(run) for run in runs]
    servers = [{server.key: server for server in run.servers} for run in runs]
    for key in dict.fromkeys(key for one in servers for key in one):
        lives = [one.get(key) for one in servers]
        rows[f"server {key}"] = [_server(life) for life in lives]
        rows[f"server {key}, model"] = [(life.model if life else "") or NOT_TOLD for life in lives]
        rows[f"server {key}, command"] = [
            " ".join(stable(life.command if life else ())) or NOT_TOLD for life in lives
        ]
    expected_to_differ = ("started",)
    return [
        {
            "name": name.replace("_", "-"),
            "values": values,
            "differs": name not in expected_to_differ and len(set(values)) > 1,
        }
        for name, values in rows.items()
    ]


def stable(command: Sequence[str]) -> list[str]:
    """A command without the places that change from run to run (ports, addresses, files)."""
    kept: list[str] = []
    skip = False
    for at, word in enumerate(command):
        name, given, _ = word.partition("=")
        if skip:
            skip = False
        elif name in _PLACES:
            skip = not given
        else:
            kept.append(word.rpartition("/")[2] if at == 0 else word)
    return kept


def load_options(old: RecordedLoad | None, new: RecordedLoad | None) -> list[str]:
    """A sentence where the two loads were not the same; none where they were."""
    if old is None and new is None:
        return []
    if old is None or new is None:
        return [f"Only {'this run' if old is None else 'the baseline'} has a load for it."]
    before, now = _options(old.command), _options(new.command)
    changed = [
        f"{name} {before.get(name, 'absent')} before, {now.get(name, 'absent')} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    found = [f"The loads differ: {'; '.join(changed)}."] if changed else []
    for which, load in (("baseline's", old), ("run's", new)):
        if load.completed < load.requested:
            found.append(
                f"Of the {which} load {load.completed} of {load.requested} requests ended."
            )
    return found


def _options(command: Sequence[str]) -> dict[str, str]:
    """By option its values; "set" where it has none. What stands before the options is left out."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in stable(command):
        if word.startswith("--"):
            name, given, value = word.partition("=")
            values = found.setdefault(name, [])
            if given:
                values.append(value)
        else:
            values.append(word)
    return {name: " ".join(listed) or "set" for name, listed in found.items()}


def load_figures(old: RecordedLoad | None, new: RecordedLoad | None) -> list[dict[str, Any]]:
    """TTFT, TPOT and throughput before and now; rows that neither run has are left out."""
    rows = []
    for key, title in _LATENCIES:
        for statistic in _STATISTICS:
            values = [getattr(load, key).get(statistic) if load else None for load in (old, new)]
            rows.append(_figure(f"{title}, {statistic}, ms", values, better="less"))
    for key, title in _RATES:
        values = [getattr(load, key) if load else None for load in (old, new)]
        rows.append(_figure(title, values, better="more"))
    return [row for row in rows if row is not None]


def _figure(name: str, values: Sequence[float | None], *, better: str) -> dict[str, Any] | None:
    before, now = values
    if before is None and now is None:
        return None
    quotient = now / before if before and now is not None else None
    return {
        "name": name,
        "before": "–" if before is None else f"{before:,.2f}",
        "now": "–" if now is None else f"{now:,.2f}",
        "ratio": ratio(quotient, 3),
        "better": better,
    }


def _server(server: RecordedServer | None) -> str:
    if server is None:
        return "none"
    parts: list[str] = [server.kind, server.version]
    if server.nsys:
        parts.append(f"under nsys {server.nsys}")
    if server.attached:
        parts.append("attached")
    return " ".join(part for part in parts if part)


def _gpus(run: Results) -> str:
    described = {
        gpu.uuid: gpu.uuid
        + (f" ({gpu.power_limit_w:.0f} W)" if gpu.power_limit_w is not None else "")
        for window in run.windows
        for gpu in window.gpus
    }
    return ", ".join(described[uuid] for uuid in sorted(described)) or NOT_TOLD
