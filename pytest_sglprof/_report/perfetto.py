"""A kernel table as events that Perfetto shows: summary rows, findings, kernels."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_sglprof._analysis.imbalance import ImbalanceFinding, all_findings
from pytest_sglprof._files import atomic_write
from pytest_sglprof._report.page.jinja import template
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._verdict.wording import duration, ratio, shorten

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable


Event = dict[str, Any]

SUMMARY_PID = 1  # ranks' own processes begin at 1000
NOTABLE = 1.05  # slowdown from which a finding gets an instant event
MAX_FINDINGS = 20
MAX_NAME = 200
CATEGORY_OF_KIND = {"memcpy": "gpu_memcpy", "memset": "gpu_memset", "op": "cpu_op"}


def summary_events(table: KernelTable, base_ns: int) -> Iterator[Event]:
    """Rows of all ranks, one below the other: step, compute, communication; then findings.

    Each row has one slice per step, from the first start to the last end of its activities;
    their kernel time (sum of durations) is in the arguments. Findings are instant events on
    the compute row of the slowest rank. base_ns: Unix ns of the trace's time 0.
    """
    yield from _process(SUMMARY_PID, "ranks side by side", 0)
    frame = table.frame
    category = frame["category"].astype(object)
    kinds: dict[str, Any] = {
        "compute": ~category.isin(NOT_COMPUTE),
        "communication": category == "communication",
    }
    yield from _step_rows(table, base_ns)
    for place, (name, chosen) in enumerate(kinds.items(), start=1):
        spans = _spans(frame[chosen])
        for at, rank in enumerate(table.ranks):
            tid = _tid(place, at)
            yield from _row(tid, f"{rank} {name}")
            rank_spans = spans[spans["rank"] == rank].to_dict("records")
            yield from _slices(rank_spans, name, tid, base_ns)
    yield from _finding_events(table, base_ns)


def kernel_events(table: KernelTable, base_ns: int) -> Iterator[Event]:
    """Every activity of the table: a process a rank, a row a stream.

    The event's name is the full name; its category that of a torch trace.
    """
    frame = table.frame
    for at, rank in enumerate(table.ranks):
        yield from _process(_rank_pid(at), str(rank), 1000 + at)
    pids = frame["rank"].cat.codes.to_numpy()
    streams = frame["stream"].to_numpy()
    for at, stream in np.unique(np.stack([pids, streams], 1), axis=0).tolist():
        name = f"{table.ranks[at]} stream {stream}" if stream >= 0 else f"{table.ranks[at]} cpu"
        yield _meta("thread_name", _rank_pid(at), stream, {"name": name})
        yield _meta("thread_sort_index", _rank_pid(at), stream, {"sort_index": stream})
    columns = [frame[key].tolist() for key in ("full_name", "name", "category", "kind", "step")]
    times = (frame["start_ns"] - base_ns).tolist(), frame["dur_ns"].tolist()
    rows = zip(pids.tolist(), streams.tolist(), *columns, *times, strict=True)
    for at, stream, full_name, name, category, kind, step, start, dur in rows:
        yield {
            "ph": "X",
            "cat": CATEGORY_OF_KIND.get(kind, kind),
            "name": full_name,
            "pid": _rank_pid(at),
            "tid": stream,
            "ts": start / 1e3,
            "dur": dur / 1e3,
            "args": {"kernel": name, "category": category, "step": step},
        }


def side_by_side(tables: Mapping[str, KernelTable]) -> KernelTable:
    """One table of several windows: each begins at 0, its ranks are `TP0 before`, `TP0 at`.

    tables: by what to call each. The windows of one rank follow each other. What does not belong
    to single kernels, such as steps, is that of the first window.
    """
    import pandas as pd

    first = next(iter(tables.values()))
    ranks = dict.fromkeys(rank for table in tables.values() for rank in table.ranks)
    labels = [
        f"{rank} {name}" for rank in ranks for name, table in tables.items() if rank in table.ranks
    ]
    frames = []
    for name, table in tables.items():
        frame = table.frame.astype(dict.fromkeys(table.frame.select_dtypes("category"), object))
        begin = frame["start_ns"].min() if len(frame) else 0
        frame["rank"] = frame["rank"] + f" {name}"
        frame["start_ns"] -= begin
        frames.append(frame)
    joined = pd.concat(frames, ignore_index=True)
    joined["rank"] = pd.Categorical(joined["rank"], categories=labels)
    notes = [f"{name}: {note}" for name, table in tables.items() for note in table.notes]
    return replace(first, frame=joined, ranks=tuple(labels), notes=tuple(notes))


def streams_of(table: KernelTable) -> dict[str, frozenset[int]]:
    """Rank → its streams, without the unknown one."""
    pairs = table.frame.loc[table.frame["stream"] >= 0, ["rank", "stream"]].drop_duplicates()
    streams: dict[str, set[int]] = {}
    for rank, stream in zip(pairs["rank"], pairs["stream"], strict=True):
        streams.setdefault(str(rank), set()).add(int(stream))
    return {rank: frozenset(each) for rank, each in streams.items()}


def _rank_pid(at: int) -> int:
    return 1000 + at


def _tid(place: int, at: int) -> int:
    """Id of a row: all rows of one kind are adjacent, in the order of the ranks."""
    return 1 + place * 1000 + at


def _process(pid: int, name: str, place: int) -> Iterator[Event]:
    yield _meta("process_name", pid, 0, {"name": name})
    yield _meta("process_sort_index", pid, 0, {"sort_index": place})


def _row(tid: int, name: str) -> Iterator[Event]:
    yield _meta("thread_name", SUMMARY_PID, tid, {"name": name})
    yield _meta("thread_sort_index", SUMMARY_PID, tid, {"sort_index": tid})


def _meta(what: str, pid: int, tid: int, args: Mapping[str, object]) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": dict(args)}


def _step_rows(table: KernelTable, base_ns: int) -> Iterator[Event]:
    steps = table.steps
    for at, rank in enumerate(table.ranks):
        tid = _tid(0, at)
        yield from _row(tid, f"{rank} step")
        rank_steps = steps[steps["rank"] == rank].sort_values("start_ns").to_dict("records")
        for step in rank_steps:
            args = {key: int(step[key]) for key in ("step", "batch_size", "tokens")}
            name = f"{step['stage']} {step['step']}"
            yield _slice(name, "step", tid, step["start_ns"] - base_ns, _length(step), args)


def _length(step: Mapping[Any, Any]) -> int:
    return max(0, int(step["end_ns"]) - int(step["start_ns"]))


def _spans(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per rank and step. Activities outside steps count only if there are no steps."""
    if (rows["step"] >= 0).any():
        rows = rows[rows["step"] >= 0]
    timed = rows.assign(end_ns=rows["start_ns"] + rows["dur_ns"])
    spans: pd.DataFrame = (
        timed.groupby(["rank", "step"], observed=True)
        .agg(
            start_ns=("start_ns", "min"),
            end_ns=("end_ns", "max"),
            kernel_ns=("dur_ns", "sum"),
            kernels=("dur_ns", "size"),
        )
        .reset_index()
        .sort_values("start_ns")
    )
    return spans


def _slices(spans: list[Any], what: str, tid: int, base_ns: int) -> Iterator[Event]:
    """Slices that never overlap: Perfetto drops slices that do."""
    free = None
    for span in spans:
        start = span["start_ns"] if free is None else max(span["start_ns"], free)
        free = max(span["end_ns"], start)
        name = f"{what} {duration(span['kernel_ns'])}"
        args = {"step": span["step"], "kernel_ns": span["kernel_ns"], "kernels": span["kernels"]}
        yield _slice(name, what, tid, start - base_ns, free - start, args)


def _slice(name: str, cat: str, tid: int, start: int, dur: int, args: Mapping[str, Any]) -> Event:
    return {
        "ph": "X",
        "cat": f"sglprof {cat}",
        "name": name,
        "pid": SUMMARY_PID,
        "tid": tid,
        "ts": int(start) / 1e3,
        "dur": int(dur) / 1e3,
        "args": {key: int(value) for key, value in args.items()},
    }


def _finding_events(table: KernelTable, base_ns: int) -> Iterator[Event]:
    if not len(table.frame):
        return
    notable = [
        finding
        for finding in all_findings(table)
        if finding.slowest is not None
        and (finding.one_sided or (finding.slowdown or 0.0) >= NOTABLE)
        and finding.scope not in NOT_COMPUTE
    ]
    notable.sort(key=lambda finding: -finding.lost_ns)
    for finding in notable[:MAX_FINDINGS]:
        at = table.ranks.index(str(finding.slowest))
        yield {
            "ph": "i",
            "s": "t",
            "cat": "sglprof finding",
            "name": _text(finding),
            "pid": SUMMARY_PID,
            "tid": _tid(1, at),
            "ts": (_worst_moment(table, finding) - base_ns) / 1e3,
            "args": {
                "rank": finding.slowest,
                "slowdown": finding.slowdown,
                "lost_ns": finding.lost_ns,
                "steps": finding.steps,
            },
        }


def _text(finding: ImbalanceFinding) -> str:
    what = shorten(finding.kernel or finding.scope, MAX_NAME)
    if finding.one_sided:
        return f"{finding.slowest}: only this rank has {what}"
    times, lost = ratio(finding.slowdown), duration(finding.lost_ns)
    return f"{finding.slowest} is {times}x slower than its peers in {what}, {lost} lost"


def _worst_moment(table: KernelTable, finding: ImbalanceFinding) -> int:
    """Start of the step in which the slowest rank is furthest above the mean, Unix ns."""
    frame = table.frame
    if finding.kernel:
        chosen = frame["name"] == finding.kernel
    elif finding.scope == "compute":
        chosen = ~frame["category"].isin(NOT_COMPUTE)
    else:
        chosen = frame["category"] == finding.scope
    group = [figure.rank for figure in finding.ranks]
    rows = frame[chosen & frame["rank"].isin(group)]
    wide = rows.pivot_table(
        index="step", columns="rank", values="dur_ns", aggfunc="sum", observed=True, fill_value=0
    )
    above_mean = wide[finding.slowest] - wide.mean(axis=1)
    worst = above_mean.idxmax()
    slowest = rows[(rows["rank"] == finding.slowest) & (rows["step"] == worst)]
    return int(slowest["start_ns"].min())


# `X.open.html` opens the trace `X.json.gz` in the Perfetto UI and pins the ranks' kernel rows, as
# docs/visualization/deep-linking-to-perfetto-ui.md of Perfetto describes: a window on
# ui.perfetto.dev with `startupCommands` in its address, PING until it answers PONG, then the
# trace as an ArrayBuffer. The page itself loads nothing from the network.

EMBED_BYTES = 24 * 2**20  # a larger trace is chosen by hand, or fetched where a server is
PERFETTO = "https://ui.perfetto.dev"
_REGEX_SPECIAL = re.compile(r"([\\^$.|?*+()\[\]{}])")


def open_page_of(trace: Path) -> Path:
    """The page that opens a trace: `merged.open.html` beside `merged.json.gz`."""
    return trace.with_name(re.sub(r"(\.trace)?\.json(\.gz)?$", "", trace.name) + ".open.html")


def write_open_page(trace: Path, ranks: Sequence[str], *, gpu: bool = True) -> Path:
    """Writes the page beside `trace`; its path. gpu: pin kernel rows, else summary rows."""
    embedded = ""
    if trace.stat().st_size <= EMBED_BYTES:
        embedded = base64.b64encode(trace.read_bytes()).decode()
    page = open_page_of(trace)
    html = template("open.html").render(
        name=trace.name,
        page=page.name,
        perfetto=PERFETTO,
        commands=json.dumps(startup_commands(ranks, gpu=gpu)),
        embedded=embedded,
        ranks=ranks,
    )
    atomic_write(page, html)
    return page


def startup_commands(ranks: Sequence[str], *, gpu: bool = True) -> list[dict[str, object]]:
    """Perfetto's stable automation commands: collapse all, pin the rows of each rank."""
    names = "|".join(_REGEX_SPECIAL.sub(r"\\\1", rank) for rank in ranks)
    rows = r"stream \d+" if gpu else "(step|compute|communication)"
    return [
        {"id": "dev.perfetto.CollapseTracksByRegex", "args": [".*"]},
        {"id": "dev.perfetto.PinTracksByRegex", "args": [f"^({names}) {rows}"]},
    ]
