"""The stand-in's command line: SGLang's options, and the faults that tests plant."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_sglprof.standin.model import EVERY_RANK, SLOWABLE, Model, Sizes, Slow, places
from pytest_sglprof.standin.noise import LifeNoise, StepNoise
from pytest_sglprof.standin.speech import NEWEST, SPEECHES, Speech

START_FAULTS = ("import", "oom", "port")


@dataclass(frozen=True)
class Options:
    """One stand-in. Durations in seconds unless named otherwise."""

    host: str
    port: int
    sizes: Sizes
    model: Model
    model_path: str = "standin"
    served_model_name: str = "standin"
    device: str = "cuda"
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str = ""
    api_key: str = ""
    admin_api_key: str = ""
    decode_log_interval: int = 40
    max_running_requests: int = 256
    max_total_tokens: int = 400_000
    chunked_prefill_size: int = 8192
    context_length: int = 131_072
    enable_metrics: bool = False
    disaggregation: str = "null"
    bootstrap_port: int = 8998
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    ssl_keyfile_password: str = ""
    ready_delay: float = 0.0
    never_ready: bool = False
    hang_in_stop_profile: bool = False
    die_after: float | None = None
    die_in_window: int | None = None
    start_fault: str = ""
    crash_delay: float = 5.0
    export_delay: float = 0.0
    profile_stall: tuple[str, float] = ("", 0.0)
    launch_command: str = ""
    speech: Speech = NEWEST
    others: dict[str, Any] = field(default_factory=dict)


def parse(argv: Sequence[str]) -> Options:
    """Reads the command line; unknown options are SGLang's own and end up in `others`.

    Raises SystemExit (2) for values that are wrong, as argparse does.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(list(argv))
    try:
        sizes = _sizes(known)
        slow = tuple(_slow(text, sizes) for text in known.slow)
        noise = _step_noise(known.step_noise) if known.step_noise else None
        life = _life_noise(known.life_noise, known.life_seed)
        stall = _profile_stall(known.profile_stall, sizes) if known.profile_stall else ("", 0.0)
        others = _others(rest)
    except ValueError as error:
        parser.error(str(error))
    for file in filter(None, (known.ssl_certfile, known.ssl_keyfile)):
        if not Path(file).is_file():
            parser.error(f"SSL file not found: {file!r}")
    if known.nnodes > 1 and not known.dist_init_addr.rpartition(":")[2].isdigit():
        parser.error("--nnodes needs --dist-init-addr HOST:PORT")
    step_ns = round(known.step_ms * 1e6)
    if step_ns < 100_000:
        parser.error("--step-ms must be at least 0.1")
    return Options(
        host=known.host,
        port=known.port,
        sizes=sizes,
        model=Model(
            step_ns, known.layers, known.random_seed, slow, noise, known.device != "cpu", life
        ),
        model_path=known.model_path,
        served_model_name=known.served_model_name or known.model_path,
        device=known.device,
        nnodes=known.nnodes,
        node_rank=known.node_rank,
        dist_init_addr=known.dist_init_addr,
        api_key=known.api_key,
        admin_api_key=known.admin_api_key,
        decode_log_interval=known.decode_log_interval,
        max_running_requests=known.max_running_requests,
        max_total_tokens=known.max_total_tokens,
        chunked_prefill_size=known.chunked_prefill_size,
        context_length=known.context_length,
        enable_metrics=known.enable_metrics,
        disaggregation=known.disaggregation_mode,
        bootstrap_port=known.disaggregation_bootstrap_port,
        ssl_certfile=known.ssl_certfile,
        ssl_keyfile=known.ssl_keyfile,
        ssl_keyfile_password=known.ssl_keyfile_password,
        ready_delay=known.ready_delay,
        never_ready=known.never_ready,
        hang_in_stop_profile=known.hang_in_stop_profile,
        die_after=known.die_after,
        die_in_window=known.die_in_window,
        start_fault=known.start_fault or "",
        crash_delay=known.crash_delay,
        export_delay=known.export_delay,
        profile_stall=stall,
        launch_command=shlex.join(argv),
        speech=SPEECHES[known.speak],
        others=others,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pytest_sglprof.standin",
        description="A server with the HTTP interface, the log lines and the traces of SGLang; it "
        "needs neither a GPU nor a model. Unknown options are taken for SGLang's and ignored.",
        allow_abbrev=False,
    )
    effective = parser.add_argument_group("options of SGLang that have an effect")
    effective.add_argument("--host", default="127.0.0.1")
    effective.add_argument("--port", type=int, default=30000)
    effective.add_argument("--model-path", "--model", default="standin")
    effective.add_argument("--served-model-name", default="")
    effective.add_argument("--tp", "--tp-size", "--tensor-parallel-size", type=int, default=1)
    effective.add_argument("--dp", "--dp-size", "--data-parallel-size", type=int, default=1)
    effective.add_argument("--pp", "--pp-size", "--pipeline-parallel-size", type=int, default=1)
    effective.add_argument("--ep", "--ep-size", "--expert-parallel-size", type=int, default=1)
    effective.add_argument("--enable-dp-attention", action="store_true")
    effective.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    effective.add_argument("--nnodes", type=int, default=1)
    effective.add_argument("--node-rank", type=int, default=0)
    effective.add_argument("--dist-init-addr", default="")
    effective.add_argument("--api-key", default="")
    effective.add_argument("--admin-api-key", default="")
    effective.add_argument("--decode-log-interval", type=int, default=40)
    effective.add_argument("--max-running-requests", type=int, default=256)
    effective.add_argument("--max-total-tokens", type=int, default=400_000)
    effective.add_argument("--chunked-prefill-size", type=int, default=8192)
    effective.add_argument("--context-length", type=int, default=131_072)
    effective.add_argument("--random-seed", type=int, default=0)
    effective.add_argument("--enable-metrics", action="store_true")
    modes = ("null", "prefill", "decode")
    effective.add_argument("--disaggregation-mode", choices=modes, default="null")
    effective.add_argument("--disaggregation-bootstrap-port", type=int, default=8998)
    parser.add_argument(
        "--speak", choices=SPEECHES, default=NEWEST.version, help="the SGLang that it stands for"
    )
    for name in ("--ssl-certfile", "--ssl-keyfile", "--ssl-keyfile-password"):
        effective.add_argument(name, default="")
    _add_device(parser.add_argument_group("the simulated device"))
    _add_faults(parser.add_argument_group("simulated faults"))
    return parser


def _add_device(model: argparse._ArgumentGroup) -> None:
    model.add_argument("--step-ms", type=float, default=10.0, help="wall time of a decode step")
    model.add_argument("--layers", type=int, default=4, help="decoder layers of a forward pass")
    model.add_argument(
        "--step-noise",
        metavar="sd=0.02[,phi=0.6]",
        help="multiply each rank's compute in a step by the exponential of an autoregressive "
        "process: sd of one rank and step, phi from step to step (0); the mean stays the same",
    )
    model.add_argument(
        "--life-noise",
        type=float,
        metavar="SD",
        help="each life of the server (each start) multiplies all times by one factor, and those "
        "of each kernel by one more: SD is the standard deviation of both logarithms",
    )
    model.add_argument(
        "--life-seed",
        type=int,
        metavar="N",
        help="the life that --life-noise draws (default: another one at each start)",
    )
    model.add_argument(
        "--slow",
        action="append",
        default=[],
        metavar="rank=1,category=moe,factor=1.4[,from_step=50][,until_step=90]",
        help="a rank (number, label such as DP0.TP1, or all) that is slower; may be repeated",
    )


def _add_faults(fault: argparse._ArgumentGroup) -> None:
    fault.add_argument(
        "--ready-delay", type=float, default=0.0, metavar="S", help="get ready S s late"
    )
    fault.add_argument("--never-ready", action="store_true", help="start, but do not get ready")
    fault.add_argument(
        "--hang-in-stop-profile", action="store_true", help="do not answer /stop_profile"
    )
    fault.add_argument("--die-after", type=float, metavar="S", help="die S s after it is ready")
    fault.add_argument(
        "--die-in-window",
        type=int,
        nargs="?",
        const=5,
        metavar="STEPS",
        help="die after STEPS steps of a window (5 if no number is given)",
    )
    fault.add_argument(
        "--start-fault", choices=START_FAULTS, help="fail at the start as SGLang does, and say so"
    )
    fault.add_argument(
        "--crash-delay", type=float, default=5.0, metavar="S", help="s from an error to the end"
    )
    fault.add_argument(
        "--export-delay", type=float, default=0.0, metavar="S", help="write traces S s late"
    )
    fault.add_argument(
        "--profile-stall",
        metavar="rank=1,s=3",
        help="one rank (number, or label such as DP1.TP0) writes its traces for s seconds longer, "
        "in which it serves nobody",
    )


def _sizes(known: argparse.Namespace) -> Sizes:
    speech = SPEECHES[known.speak]
    parallel = (known.tp, known.dp, known.pp, known.ep, known.enable_dp_attention)
    sizes = Sizes(*parallel, speech.tags, speech.file_parts)
    if min(sizes.tp, sizes.dp, sizes.pp, sizes.ep) < 1:
        raise ValueError("parallel sizes must be at least 1")
    if sizes.dp_attention and sizes.tp % sizes.dp:
        raise ValueError("with --enable-dp-attention, --tp must be a multiple of --dp")
    if sizes.tp % sizes.ep:
        raise ValueError("--tp must be a multiple of --ep")
    return sizes


def _slow(text: str, sizes: Sizes) -> Slow:
    values = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    unknown = set(values) - {"rank", "category", "factor", "from_step", "until_step"}
    if unknown or "rank" not in values or "factor" not in values:
        raise ValueError(f"--slow {text!r}: expected rank=, factor= and perhaps category=, ...")
    until = values.get("until_step")
    rank, category = values["rank"].replace(".", " "), values.get("category", "compute")
    if all(rank not in (EVERY_RANK, p.label, str(p.index)) for p in places(sizes)):
        raise ValueError(f"--slow {text!r}: the server has no rank {rank}")
    if category not in SLOWABLE:
        raise ValueError(f"--slow {text!r}: expected a category of {', '.join(SLOWABLE)}")
    return Slow(
        rank=rank,
        category=category,
        factor=float(values["factor"]),
        from_step=int(values.get("from_step", 0)),
        until_step=None if until is None else int(until),
    )


def _profile_stall(text: str, sizes: Sizes) -> tuple[str, float]:
    values = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    rank = values.get("rank", "").replace(".", " ")
    if set(values) != {"rank", "s"}:
        raise ValueError(f"--profile-stall {text!r}: expected rank= and s=")
    if all(rank not in (p.label, str(p.index)) for p in places(sizes)):
        raise ValueError(f"--profile-stall {text!r}: the server has no rank {rank}")
    return rank, float(values["s"])


def _step_noise(text: str) -> StepNoise:
    values = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if not {"sd"} <= set(values) <= {"sd", "phi"}:
        raise ValueError(f"--step-noise {text!r}: expected sd= and perhaps phi=")
    noise = StepNoise(float(values["sd"]), float(values.get("phi", 0.0)))
    if not (0 <= noise.sd <= 1 and 0 <= noise.phi < 1):
        raise ValueError(f"--step-noise {text!r}: expected sd 0 to 1 and phi 0 to less than 1")
    return noise


def with_life_seed(words: Sequence[str]) -> list[str]:
    """The command line of a life's processes: all of them draw the same life.

    Without --life-noise, or where the life is named already, it is the given one.
    """
    given = _parser().parse_known_args(list(words))[0]
    if given.life_noise is None or given.life_seed is not None:
        return list(words)
    return [*words, "--life-seed", str(secrets.randbits(32))]


def _life_noise(sd: float | None, seed: int | None) -> LifeNoise | None:
    if sd is None:
        if seed is not None:
            raise ValueError("--life-seed has no effect without --life-noise")
        return None
    if not 0 <= sd <= 1:
        raise ValueError(f"--life-noise {sd}: expected 0 to 1")
    return LifeNoise(sd, seed or 0)


def _others(words: Sequence[str]) -> dict[str, Any]:
    """SGLang's other options as `/server_info` shows them: `--foo-bar 3` is foo_bar: 3."""
    values: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            name = key.replace("-", "_")
            values[name] = _plain(value) if value else True
        elif not name:
            raise ValueError(f"unexpected argument: {word}")
        elif values[name] is True:
            values[name] = _plain(word)
        elif isinstance(values[name], list):
            values[name].append(_plain(word))
        else:
            values[name] = [values[name], _plain(word)]
    return values


def _plain(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# Writes log lines as SGLang does: to stderr, one write a line, with the rank's tags.


_TRUE = ("1", "true", "yes", "y", "on")


def env_flag(name: str) -> bool:
    """A switch of SGLang's environment."""
    return os.environ.get(name, "").lower() in _TRUE


def log(text: str, tags: Sequence[str] = ()) -> None:
    """`[2026-11-24 03:13:51 DP0 TP0] text`; with SGLANG_LOG_MS=1 with milliseconds."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    if env_flag("SGLANG_LOG_MS"):
        stamp += f".{int(now * 1000) % 1000:03d}"
    raw(f"[{' '.join((stamp, *tags))}] {text}")


def web(text: str, level: str = "INFO") -> None:
    """A line of the HTTP server, which never shows milliseconds or tags."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    raw(f"[{stamp}] {level + ':':<9} {text}")


def raw(text: str) -> None:
    """One write, so that lines of several processes never mix."""
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, (text + "\n").encode())
    except OSError:  # the reader of the log is gone, and there is no other place to write to
        return
