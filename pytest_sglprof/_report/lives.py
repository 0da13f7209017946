"""What a server life leaves behind: one small record for each window of a test."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pytest_sglprof import __version__
from pytest_sglprof._baselines.making import asked_for, kept, model_name, server_options
from pytest_sglprof._baselines.records import (
    RECORD_FORMAT,
    REGRESSION,
    BaselineKey,
    LifeRecord,
    LoadFigures,
    Provenance,
    digest_of,
)
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._report.model import RecordedServer, RecordedWindow, storable
from pytest_sglprof._trace.steps import CAPTURE, JIT, REBALANCE
from pytest_sglprof._verdict.judge import Judgement

SIZES = ("tp", "dp", "attn_dp", "pp", "ep", "moe_dp", "nnodes", "dp_attention", "device")
_COMMIT = re.compile(r"\+g([0-9a-f]{7,40})")
_HERE = ("", "localhost", "127.0.0.1", "::1", "0.0.0.0")
_APART = {
    JIT: "a kernel was compiled inside of the window",
    CAPTURE: "a graph was captured inside of the window",
    REBALANCE: "it was disturbed by a rebalance of experts",
}


def repeated(windows: Sequence[RecordedWindow]) -> list[list[RecordedWindow]]:
    """The windows of one attempt at a test, those together that repeat each other."""
    together: dict[str, list[RecordedWindow]] = {}
    for window in windows:
        together.setdefault(window.repeat_of or window.id, []).append(window)
    return list(together.values())


def life_record(
    windows: Sequence[RecordedWindow],
    server: RecordedServer,
    loads: Mapping[str, Sequence[str]],
    *,
    run: str,
    spec: ServerSpec,
    info: Mapping[str, Any],
    load: LoadFigures | None = None,
    versions: Mapping[str, str] | None = None,
) -> LifeRecord | None:
    """The record of a window, or of several that repeat each other; None if one is not complete.

    server: of the windows. loads: the commands of the attempt's loads, by their ids. run: its id.
    spec, info: of the server (what it was started from, `/server_info`). load: what
    was measured before the first window of this life. versions: of programs, beside those that
    the server and the traces tell.
    """
    if not all(each.state == "complete" and each.strata for each in windows):
        return None
    shape = _load_shape(windows, loads)
    options = server_options(() if server.attached else spec.args, spec.env, info)
    record = LifeRecord(
        format=RECORD_FORMAT,
        id=f"{run}/{windows[0].id}",
        life=_life(server, run, info),
        run=run,
        recorded=windows[-1].closed,
        key=_key(windows[0], server, info, digest_of(shape), digest_of(options)),
        groups=kept([each.strata for each in windows]),
        load=load,
        provenance=_provenance(windows, server, options, shape, versions or {}),
        verdict=windows[0].verdict,
        failed=_failed(windows),
        not_acceptable=tuple(_not_acceptable(windows)),
        apart=_apart(windows),
    )
    return storable(record)


def _key(
    window: RecordedWindow, server: RecordedServer, info: Mapping[str, Any], load: str, options: str
) -> BaselineKey:
    is_cpu = server.sizes.get("device") == "cpu"
    ranks = (int(server.sizes.get(name, 1)) for name in ("tp", "dp", "pp"))
    count = 1
    for size in ranks:
        count *= size
    return BaselineKey(
        test=window.nodeid,
        window=window.name,
        backend=window.backend,
        gpu="cpu" if is_cpu else (window.run or {}).get("GPU", ""),
        gpus=0 if is_cpu else count,
        model=model_name(server.model or str(info.get("model_path") or "")),
        quantization=str(info.get("quantization") or ""),
        kv_dtype=str(info.get("kv_cache_dtype") or ""),
        sizes={name: server.sizes[name] for name in SIZES if name in server.sizes},
        load=load,
        server=options,
        standin=server.standin,
    )


def _load_shape(
    windows: Sequence[RecordedWindow], loads: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """The options of the load that ran during a window; {} without one."""
    of_windows = {window.load for window in windows}
    commands = [command for name, command in loads.items() if name in of_windows]
    return asked_for(commands[0]) if commands else {}


def _life(server: RecordedServer, run: str, info: Mapping[str, Any]) -> str:
    """The name of a server life; an attached server is one life in several runs."""
    if not server.attached:
        return f"{run}/{PurePosixPath(server.log).parent.name or server.key}"
    since = digest_of([str(info.get(name)) for name in ("startup_time", "random_seed")])
    parts = urlsplit(server.url)
    return f"{parts.hostname}:{parts.port}-{since}"


def _provenance(
    windows: Sequence[RecordedWindow],
    server: RecordedServer,
    options: dict[str, str],
    shape: dict[str, str],
    versions: Mapping[str, str],
) -> Provenance:
    facts = {name: value for window in windows for name, value in (window.run or {}).items()}
    named = {"pytest_sglprof": __version__, "sglang": server.version, "nsys": server.nsys}
    of_traces = {name: facts[name] for name in facts if name not in ("GPU", "processes")}
    host = urlsplit(server.url).hostname or ""
    commit = _COMMIT.search(server.version)
    return Provenance(
        host=host if server.attached and host not in _HERE else platform.node(),
        versions={name: text for name, text in {**versions, **named, **of_traces}.items() if text},
        commit=commit[1] if commit else "",
        clocks_mhz={gpu.rank: gpu.median_sm_mhz for gpu in windows[-1].gpus},
        power_limit_w={gpu.rank: gpu.power_limit_w for gpu in windows[-1].gpus},
        options=options,
        load=shape,
    )


def _is_uncompared(judgement: Judgement) -> bool:
    """Whether there was no life to compare this one with."""
    return judgement.threshold.metric == REGRESSION and judgement.change is None


def _failed(windows: Sequence[RecordedWindow]) -> tuple[str, ...]:
    """The metrics by which the windows failed; what was compared with lives by `regression`."""
    if windows[0].verdict != "fail":
        return ()
    bad = [each for window in windows for each in window.judgements if each.verdict == "fail"]
    names = (REGRESSION if each.change is not None else each.threshold.metric for each in bad)
    return tuple(dict.fromkeys(names))


def _not_acceptable(windows: Sequence[RecordedWindow]) -> list[str]:
    """Why this life must never be one that others are compared with.

    A verdict that is inconclusive because there was no life to compare with says nothing of this
    one. Where only lives are uncertain it is: they would follow what nobody has seen.
    """
    reasons = []
    if windows[0].verdict == "inconclusive":
        open_ = [j for window in windows for j in window.judgements if j.verdict == "inconclusive"]
        if not all(map(_is_uncompared, open_)) or not open_:
            reasons.append(f"its verdict is inconclusive: {windows[0].reason}")
    if any(window.partial for window in windows):
        reasons.append("a trace of it is truncated")
    return reasons


def _apart(windows: Sequence[RecordedWindow]) -> str:
    """Why its times are not those of its version, so that they neither pass nor fail."""
    seen = {why for window in windows for why in window.steps.reasons or {}}
    reasons = [text for why, text in _APART.items() if why in seen]
    hot = {gpu.rank: gpu.reason for window in windows for gpu in window.gpus if gpu.throttled}
    reasons += [f"the GPU of {rank} was throttled ({reason})" for rank, reason in hot.items()]
    if any(window.onset is not None for window in windows):
        reasons.append("its window was opened by an imbalance")
    return "; ".join(reasons)
