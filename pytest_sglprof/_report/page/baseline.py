"""What the page shows of runs against a baseline: one run against one run, never a verdict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pytest_sglprof._analysis.compare import (
    Change,
    StageChange,
    StratumChange,
    compare_strata,
)
from pytest_sglprof._analysis.strata import UNKNOWN, StepWork
from pytest_sglprof._report.model import (
    RecordedLoad,
    RecordedServer,
    RecordedWindow,
    Results,
    Run,
    WindowHead,
)
from pytest_sglprof._report.page.figures import shortened
from pytest_sglprof._report.page.jinja import NONE, in_microseconds, in_percent
from pytest_sglprof._report.stored import heads_of, whole
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._verdict.wording import percent, ratio

SHOWN_KERNELS = 20  # of a stage, those that change compute most
# What is recorded besides kernels slows a server down, each in its own way.
RECORDED = ("with_stack", "record_shapes", "activities", "detailed_annotations")
EQUAL = "="  # instead of a difference
MIN_CHANGE = 0.0005  # of a figure; smaller ones have no bar


@dataclass(frozen=True)
class ChangeRow:
    """A kernel or a category before and now, as texts; times in µs, the share in %.

    name: cut where it is long. outside: its time is no compute. share: of compute. bar: -1 to 1,
    of the longest bar of the table; slower is to the right. direction: "slower", "faster" or
    None where it hardly changed.
    """

    name: str
    full: str
    category: str
    outside: bool
    before: str
    now: str
    ratio: str
    difference: str
    share: str
    bar: float
    direction: str | None


@dataclass(frozen=True)
class StratumRow:
    """Compute of one kind of step before and now. bar: as in `ChangeRow`."""

    work: str
    before_steps: int | None
    now_steps: int | None
    before: str
    now: str
    ratio: str
    bar: float


@dataclass(frozen=True)
class ComparedStage:
    """One stage of a work group. reason: why it is inconclusive, "" where it is not.

    matched: the share of equal work before and now. most: the kernel that adds most to compute.
    others: a sentence about the kernels that are not listed, None where all are.
    """

    title: str
    unit: str
    reason: str
    matched: tuple[str, str]
    cautions: tuple[str, ...]
    compute: ChangeRow | None
    most: ChangeRow | None
    strata: list[StratumRow]
    categories: list[ChangeRow]
    kernels: list[ChangeRow]
    others: str | None


@dataclass(frozen=True)
class LoadFigure:
    """A figure of the load before and now. better: "less" or "more"."""

    name: str
    before: str
    now: str
    ratio: str
    better: str


@dataclass(frozen=True)
class Pair:
    """A window and the baseline's of the same test and name.

    run: id of the window's run. reason: why they are not compared, None where they are.
    """

    window: WindowHead
    run: str
    reason: str | None
    warnings: list[str]
    stages: list[ComparedStage]
    load: list[LoadFigure]


@dataclass(frozen=True)
class Unpaired:
    """A window of one run only. where: which run has it."""

    window: WindowHead
    where: str


@dataclass(frozen=True)
class EnvironmentRow:
    """A fact about the runs. values: one a run."""

    name: str
    values: list[str]
    differs: bool


@dataclass(frozen=True)
class Against:
    """Runs against a baseline. run: the run of the baseline. environment: of all runs."""

    run: Run
    warnings: list[str]
    environment: list[EnvironmentRow]
    pairs: list[Pair]
    unpaired: list[Unpaired]


def against_baseline(baseline: Results, runs: Sequence[Results]) -> Against:
    """What the section "Against the baseline" of a page of `runs` shows."""
    old = paired_by(baseline)
    pairs: list[Pair] = []
    unpaired: list[Unpaired] = []
    for run in runs:
        new = paired_by(run)
        loads = (loads_of(baseline), loads_of(run))
        for key, window in new.items():
            if key in old:
                pairs.append(_pair(old[key], window, baseline, run, loads))
            else:
                unpaired.append(Unpaired(window, f"only in {run.run.id}"))
        unpaired += [
            Unpaired(window, "only in the baseline")
            for key, window in old.items()
            if key not in new
        ]
    return Against(
        run=baseline.run,
        warnings=list(_run_warnings(baseline, runs)),
        environment=environment([baseline, *runs]),
        pairs=pairs,
        unpaired=unpaired,
    )


def paired_by(run: Results) -> dict[tuple[str, str, int], WindowHead]:
    """The heads of the windows of a run that are compared with those of other runs.

    By test, name, and how many windows of that name the test had before. Of attempts the last
    one, of repeats the typical one.
    """
    last = {test.nodeid: max(one.number for one in test.attempts) for test in run.tests}
    paired: dict[tuple[str, str, int], WindowHead] = {}
    earlier: Counter[tuple[str, str]] = Counter()
    for window in heads_of(run):
        if window.attempt != last.get(window.nodeid, window.attempt) or (
            window.repeats is not None and window.repeats.typical != window.id
        ):
            continue
        key = (window.nodeid, window.name)
        paired[(*key, earlier[key])] = window
        earlier[key] += 1
    return paired


def _run_warnings(baseline: Results, runs: Sequence[Results]) -> Iterator[str]:
    if baseline.summary.standin:
        yield "The baseline has stand-in windows: they say nothing about SGLang."
    for run in runs:
        name = run.run.id
        if name == baseline.run.id:
            yield f"{name} is the baseline itself."
        elif (run.run.started or "") < (baseline.run.started or ""):
            yield f"{name} is older than the baseline."


def _pair(
    before: WindowHead,
    now: WindowHead,
    baseline: Results,
    run: Results,
    loads: tuple[Mapping[str, RecordedLoad], Mapping[str, RecordedLoad]],
) -> Pair:
    old, new = whole(before, baseline), whole(now, run)
    reason = not_comparable(old, new)
    stages = () if reason else compare_strata(old.strata, new.strata)
    both = (loads[0].get(old.load or ""), loads[1].get(new.load or ""))
    return Pair(
        window=now,
        run=run.run.id,
        reason=reason,
        warnings=[*_warnings(old, new), *load_options(*both)],
        stages=[_stage(stage) for stage in stages],
        load=load_figures(*both),
    )


def loads_of(run: Results) -> dict[str, RecordedLoad]:
    """The loads of a run by their ids, which windows name."""
    return {load.id: load for load in run.loads}


def not_comparable(old: RecordedWindow, new: RecordedWindow) -> str | None:
    """Why two windows cannot be compared; None where they can."""
    if old.standin != new.standin:
        which = "the baseline" if old.standin else "this run"
        return f"{which} ran on the stand-in, whose times say nothing about SGLang"
    if old.backend != new.backend:
        return f"recorded by {old.backend} before and by {new.backend} now"
    for which, window in (("the baseline's window", old), ("this window", new)):
        if window.source is None:
            return f"{which} has no kernels: {window.state_reason or window.reason}"
        if window.partial:
            return f"{which} was read from a truncated trace"
        hot = [gpu.rank for gpu in window.gpus if gpu.throttled]
        if hot:
            return f"{which} ran on throttled GPUs: {', '.join(hot)}"
        if not window.strata:
            return f"{which} is of a version of pytest-sglprof that did not sort steps by work"
    if old.source != new.source:
        return f"times of {old.source} before and of {new.source} now"
    return None


def _warnings(old: RecordedWindow, new: RecordedWindow) -> Iterator[str]:
    """Reasons to doubt a comparison with the baseline's window."""
    if old.verdict != "pass":
        word = "failed" if old.verdict == "fail" else "was inconclusive"
        yield f"The baseline's window {word}: {old.reason}"
    for name in RECORDED:
        before, now = (json.dumps(getattr(window.spec, name)) for window in (old, new))
        if before != now:
            yield f"Recorded with {name} {before} before and {now} now: that costs time of its own"
    for which, window in (("The baseline's window", old), ("This window", new)):
        if window.state != "complete":
            yield f"{which} is {window.state}: {window.state_reason}"


def _stage(stage: StageChange) -> ComparedStage:
    listed = [c for c in stage.kernels if abs(c.share or 0.0) >= MIN_CHANGE][:SHOWN_KERNELS]
    only = [c for c in stage.kernels if _is_one_sided(c) and c not in listed][:SHOWN_KERNELS]
    shown = [*listed, *only]
    rest = [c for c in stage.kernels if c not in shown]
    slower = (c for c in listed if not _outside(c) and (c.share or 0.0) > 0)
    most = max(slower, key=lambda c: c.share or 0.0, default=None)
    whole = "Whole window" if stage.unit == "call" else "All ranks"
    return ComparedStage(
        title=" ".join(part for part in (stage.group, stage.stage) if part) or whole,
        unit=stage.unit,
        reason=stage.reason,
        matched=(in_percent(stage.matched_before), in_percent(stage.matched_now)),
        cautions=tuple(stage.cautions),
        compute=None if stage.compute is None else _row(stage.compute, 0.0),
        most=None if most is None else _row(most, 0.0),
        strata=_strata(stage.strata),
        categories=_rows(stage.categories),
        kernels=_rows(shown),
        others=_others(rest),
    )


def _others(rest: Sequence[Change]) -> str | None:
    if not rest:
        return None
    most = max(abs(change.share or 0.0) for change in rest)
    limit = "less than 0.05 %" if most < MIN_CHANGE else f"at most {percent(most, 1)}"
    subject = "1 more kernel differs" if len(rest) == 1 else f"{len(rest)} more kernels differ"
    return f"{subject} by {limit} of compute"


def _is_one_sided(change: Change) -> bool:
    """Whether one run surely does not have it."""
    return 0.0 in (change.before_ns, change.now_ns)


def _outside(change: Change) -> bool:
    return change.category in NOT_COMPUTE


def _rows(changes: Sequence[Change]) -> list[ChangeRow]:
    widest = max((abs(change.share or 0.0) for change in changes), default=0.0)
    return [_row(change, widest) for change in changes]


def _row(change: Change, widest: float) -> ChangeRow:
    """widest: the largest share of the table, 0.0 for a row without a bar."""
    share = change.share or 0.0
    before, now = _time(change.before_ns), _time(change.now_ns)
    is_equal = before == now != NONE
    word: str | None = None
    if _is_one_sided(change):
        word = "new" if change.before_ns == 0.0 else "gone"
    elif change.before_ns is None or change.now_ns is None:
        word = "not listed " + ("before" if change.before_ns is None else "now")
    direction = "slower" if share > 0 else "faster"
    return ChangeRow(
        name=shortened(change.name),
        full=change.name,
        category=change.category,
        outside=_outside(change),
        before=before,
        now=now,
        ratio=word or ratio(change.ratio, 3),
        difference=_signed(change.difference_ns, is_equal=is_equal),
        share=EQUAL if is_equal else _signed_percent(change.share),
        bar=share / widest if widest and abs(share) >= MIN_CHANGE else 0.0,
        direction=direction if abs(share) >= MIN_CHANGE else None,
    )


def _strata(strata: Sequence[StratumChange]) -> list[StratumRow]:
    ratios = [
        one.now_ns / one.before_ns if one.now_ns is not None and one.before_ns else None
        for one in strata
    ]
    widest = max((abs(value - 1) for value in ratios if value is not None), default=0.0)
    return [
        StratumRow(
            work=work_words(one.work),
            before_steps=one.before_steps,
            now_steps=one.now_steps,
            before=_time(one.before_ns),
            now=_time(one.now_ns),
            ratio="no match" if value is None else ratio(value, 3),
            bar=0.0 if value is None or abs(value - 1) < MIN_CHANGE else (value - 1) / widest,
        )
        for one, value in zip(strata, ratios, strict=True)
    ]


def work_words(work: StepWork) -> str:
    """`decode, batch 8, KV cache 1,024 to 2,047 tokens a request`."""
    stage = work.stage or "unknown"
    if work.substage and work.substage.lower() not in (stage, "extend"):
        stage += f" ({work.substage.lower().replace('_', ' ')})"
    parts = [stage, f"batch {work.batch}" if work.batch != UNKNOWN else "batch unknown"]
    if work.token_bucket != UNKNOWN:
        parts.append(f"{_span(work.token_bucket)} new tokens")
    if work.kv_bucket != UNKNOWN:
        parts.append(f"KV cache {_span(work.kv_bucket)} tokens a request")
    return ", ".join(parts)


def _span(bucket: int) -> str:
    return f"{2**bucket:,} to {2 ** (bucket + 1) - 1:,}" if bucket else "0 to 1"


def _time(ns: float | None) -> str:
    return NONE if ns is None else in_microseconds(ns)


def _signed(ns: float | None, *, is_equal: bool) -> str:
    """`+1.20`, µs; that two are equal is no difference."""
    if ns is None or is_equal:
        return NONE if ns is None else EQUAL
    return f"{'+' if ns > 0 else '−'}{in_microseconds(abs(ns))}"


def _signed_percent(share: float | None) -> str:
    return percent(share, 1, sign=True, none=NONE).removesuffix(" %")


# What the runs were made with: versions, GPUs, commands, loads.

NOT_RECORDED = "not recorded"
# Options whose value changes with every run and says nothing about the load or the server.
_PLACES = ("--port", "--host", "--base-url", "--output-file", "--nccl-port", "--dist-init-addr")
_LATENCIES = (("ttft", "TTFT"), ("tpot", "TPOT"))
_STATISTICS = ("mean", "median", "p99")
_RATES = (
    ("request_throughput", "Requests/s"),
    ("output_throughput", "Output tokens/s"),
    ("total_throughput", "All tokens/s"),
)


def environment(runs: Sequence[Results]) -> list[EnvironmentRow]:
    """The facts that at least one run recorded, beside each other.

    GPUs are those whose clocks were read during windows.
    """
    rows: dict[str, list[str]] = {}
    for name in ("started", "host"):
        rows[name] = [getattr(run.run, name) or NOT_RECORDED for run in runs]
    versions = [run.run.versions for run in runs]
    for name in dict.fromkeys(name for one in versions for name, value in one.items() if value):
        rows[f"{name} version"] = [one.get(name) or NOT_RECORDED for one in versions]
    rows["GPUs"] = [_gpus(run) for run in runs]
    servers = [{server.key: server for server in run.servers} for run in runs]
    for key in dict.fromkeys(key for one in servers for key in one):
        lives = [one.get(key) for one in servers]
        rows[f"server {key}"] = [_server(life) for life in lives]
        rows[f"server {key}, model"] = [
            (life.model if life else "") or NOT_RECORDED for life in lives
        ]
        rows[f"server {key}, command"] = [
            " ".join(stable(life.command if life else ())) or NOT_RECORDED for life in lives
        ]
    expected_to_differ = ("started",)
    return [
        EnvironmentRow(
            name=name.replace("_", "-"),
            values=values,
            differs=name not in expected_to_differ and len(set(values)) > 1,
        )
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
    sentences = [f"The loads differ: {'; '.join(changed)}."] if changed else []
    for which, load in (("baseline's", old), ("run's", new)):
        if load.completed < load.requested:
            sentences.append(
                f"Of the {which} load {load.completed} of {load.requested} requests ended."
            )
    return sentences


def _options(command: Sequence[str]) -> dict[str, str]:
    """Option -> its values, or "set"; words before the first option are dropped."""
    options: dict[str, list[str]] = {}
    values: list[str] = []
    for word in stable(command):
        if word.startswith("--"):
            name, given, value = word.partition("=")
            values = options.setdefault(name, [])
            if given:
                values.append(value)
        else:
            values.append(word)
    return {name: " ".join(listed) or "set" for name, listed in options.items()}


def load_figures(old: RecordedLoad | None, new: RecordedLoad | None) -> list[LoadFigure]:
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


def _figure(name: str, values: Sequence[float | None], *, better: str) -> LoadFigure | None:
    before, now = values
    if before is None and now is None:
        return None
    quotient = now / before if before and now is not None else None
    return LoadFigure(
        name=name,
        before="–" if before is None else f"{before:,.2f}",
        now="–" if now is None else f"{now:,.2f}",
        ratio=ratio(quotient, 3),
        better=better,
    )


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
        for window in heads_of(run)
        for gpu in window.gpus
    }
    return ", ".join(described[uuid] for uuid in sorted(described)) or NOT_RECORDED
