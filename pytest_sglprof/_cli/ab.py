"""`sglprof ab A [B]`: two versions on one machine, or what one version differs by from itself."""

from __future__ import annotations

import argparse
import platform
import secrets
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._cli.options import (
    NewParser,
    count,
    output_options,
    settings_of,
    settings_options,
    to_csv,
    to_json,
    write_text,
)
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._errors import (
    ExitStatus,
    Inconclusive,
    ServerDied,
    ServerMissing,
    ServerNotReady,
    SettingsError,
    did_you_mean,
)
from pytest_sglprof._verdict.wording import duration, percent, shorten, text_table

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import ServerSpec
    from pytest_sglprof._run.ab import Life, Plan
    from pytest_sglprof._verdict.ab import ABResult, ABRow

STATUS = {
    "not different": ExitStatus.DONE,
    "faster": ExitStatus.DONE,
    "slower": ExitStatus.EXCEEDED,
    "inconclusive": ExitStatus.INCONCLUSIVE,
}
LIVES_AB, LIVES_AA = 5, 10
TOP = 20  # rows that are listed
RESULT = "ab.json"
NAME_WIDTH = 60
UNSTARTED = (ServerDied, ServerMissing, ServerNotReady)
# `git bisect run` takes 1 to 124, 126 and 127 for "bad", 125 for "skip", and stops at 128 and more.
SKIP, ABORT = 125, 255


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Starts the servers A and B of sglprof.toml in turn, each several times, sends "
        "both the same load, records one window in each life, and says which figures and kernels "
        "differ. Lives are what is compared, so that what differs from start to start is no "
        "difference of versions. With one name: what lives of one version differ by (A/A).",
        epilog="exit status: 0 B is not slower; 1 B is surely slower; 2 wrong usage, or a server "
        "or the load failed; 3 inconclusive; 130 interrupted. With --bisect: 0; 1; 125 for "
        "inconclusive and a B that does not start; 255 for everything else, which stops git",
        parents=[output_options("write the result to FILE too, not only to the folder"),
                 settings_options()],
    )  # fmt: skip
    add = parser.add_argument
    add("a", nargs="?", default="", metavar="A", help="name of a server in sglprof.toml")
    add("b", nargs="?", default="", metavar="B", help="the one that is judged against A")
    add("--lives", type=count, metavar="N",
        help=f"lives of each server (default: {LIVES_AB}, for A/A {LIVES_AA})")  # fmt: skip
    add("--limit", type=_limit, default=1.0, metavar="R",
        help="B is slower where a ratio is surely above R (default: 1: any is)")  # fmt: skip
    add("--alpha", type=_alpha, default=0.01, metavar="P",
        help="probability that B is called slower by chance (default: 0.01)")  # fmt: skip
    add("--seed", type=int, metavar="N", help="of the order of the lives (default: drawn)")
    add("--folder", type=Path, metavar="DIR",
        help="for plan, lives and result (default: a new one in .sglprof/ab)")  # fmt: skip
    add("--resume", type=Path, metavar="DIR", help="go on with an interrupted comparison")
    add("--baselines", type=Path, metavar="DIR",
        help="A/A: write the floor beside the baselines in DIR")  # fmt: skip
    add("--bisect", action="store_true", help="answer as `git bisect run` wants it")
    group = parser.add_argument_group("load and window, the same in each life")
    add = group.add_argument
    add("--num-prompts", type=count, default=64, metavar="N", help="requests (default: 64)")
    add("--input", type=count, default=1024, metavar="N", help="tokens of each (default: 1024)")
    add("--output-len", type=count, default=128, metavar="N",
        help="tokens that each gets (default: 128)")  # fmt: skip
    add("--concurrency", type=count, default=8, metavar="N", help="at once (default: 8)")
    add("--batch", type=_sizes, default=(), metavar="N,…",
        help="batches of these sizes instead, say 1,8,64: one window each")  # fmt: skip
    add("--steps", type=count, default=100, metavar="N", help="of the window (default: 100)")
    add("--backend", choices=tuple(BACKENDS), default="torch", help="profiler (default: torch)")


def run(args: argparse.Namespace) -> ExitStatus:
    """Runs the lives that are missing, compares them, and prints the result."""
    try:
        return _run(args)
    except UNSTARTED as error:
        if args.bisect and args.runs_b:
            raise Inconclusive(
                f"server B cannot be tested: {error.what}",
                expected=error.expected,
                hint=error.hint,
                log=error.log,
            ) from error
        raise


def bisect_status(words: list[str], status: int) -> int:
    """The status that `git bisect run` gets of a command line, whatever became of it."""
    if not any(word.startswith("--bi") for word in words) or {"-h", "--help"} & {*words}:
        return status
    known: dict[int, int] = {ExitStatus.DONE: 0, ExitStatus.EXCEEDED: 1}
    known[ExitStatus.INCONCLUSIVE] = SKIP
    return known.get(status, ABORT)


def _run(args: argparse.Namespace) -> ExitStatus:
    from pytest_sglprof._run import ab
    from pytest_sglprof._verdict.ab import compare_lives, floor_result

    args.runs_b = False
    settings = settings_of(args)
    folder, plan = _begun(args, settings) if args.resume else _new(args, settings)
    servers = {side: settings.servers[plan.name(side)] for side in sorted(set(plan.order))}
    lives = ab.read_lives(folder, plan)
    _say(f"{_what(plan)}: {len(plan.order)} lives, seed {plan.seed}, in {folder}")
    try:
        for life in _each(folder, plan, servers, settings, lives, args):
            lives.append(life)
            lives.sort(key=lambda each: each.number)
            _say(_progress(plan, lives, life))
    except BaseException:
        done = f"{len(lives)} of {len(plan.order)} lives are kept"
        _say(f"{done}; to go on: sglprof ab --resume {folder}")
        raise
    records = [(life.side, life.record) for life in lives]
    if plan.b:
        result = compare_lives(
            records,
            a=plan.a,
            b=plan.b,
            seed=plan.seed,
            order=plan.order,
            alpha=plan.alpha,
            limit=plan.limit,
            min_share=settings.min_share,
        )
    else:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        only = [record for _, record in records]
        result = floor_result(only, a=plan.a, seed=plan.seed, measured=now, host=platform.node())
        _keep_floor(result, args.baselines)
    _write(result, folder, args)
    return STATUS[result.word]


def _each(
    folder: Path,
    plan: Plan,
    servers: dict[str, ServerSpec],
    settings: Settings,
    lives: list[Life],
    args: argparse.Namespace,
) -> Iterator[Life]:
    """Runs the lives that are missing, and notes in `args` which side runs."""
    from pytest_sglprof._run import ab

    done = {life.number for life in lives}
    missing = [side for at, side in enumerate(plan.order, 1) if at not in done]
    running = ab.run_lives(folder, plan, servers, settings, _show)
    for side in missing:
        args.runs_b = side == "B"
        yield next(running)


def _new(args: argparse.Namespace, settings: Settings) -> tuple[Path, Plan]:
    from pytest_sglprof._config.windows import refuse_too_few_steps
    from pytest_sglprof._run import ab
    from pytest_sglprof._run.folder import new_run_id
    from pytest_sglprof._verdict.ab import least_lives, order_of

    if not args.a or (args.bisect and not args.b):
        raise SettingsError(
            "sglprof ab names no server" if not args.a else "--bisect with one server",
            expected="two names of [servers.NAME] in sglprof.toml, or one for A/A",
            hint="sglprof ab good current --bisect" if args.bisect else "sglprof ab old new",
        )
    names = {"A": args.a, **({"B": args.b} if args.b else {})}
    _check_servers(names, settings)
    if args.b and args.baselines:
        raise SettingsError("--baselines with two servers", expected="one server: A/A")
    lives = args.lives or (LIVES_AB if args.b else LIVES_AA)
    if args.b and lives < least_lives(args.alpha):
        _say(
            f"note: {lives} + {lives} lives cannot reach p ≤ {args.alpha:g}, so the result will be "
            f"inconclusive; {least_lives(args.alpha)} + {least_lives(args.alpha)} can"
        )
    if not args.batch and args.num_prompts <= args.concurrency:
        raise SettingsError(
            f"--num-prompts {args.num_prompts} with --concurrency {args.concurrency}",
            expected="more requests than run at once: else nothing is known of a steady load",
            hint=f"--num-prompts {4 * args.concurrency}",
        )
    refuse_too_few_steps(args.steps, settings, f"--steps {args.steps}")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    plan = ab.Plan(
        a=args.a,
        b=args.b,
        lives=lives,
        seed=seed,
        order=order_of(lives, seed) if args.b else "A" * lives,
        load=ab.Load(
            prompts=args.num_prompts,
            input=args.input,
            output=args.output_len,
            concurrency=args.concurrency,
            batch=args.batch,
        ),
        steps=args.steps,
        backend=args.backend,
        alpha=args.alpha,
        limit=args.limit,
        servers={side: ab.spec_digest(settings.servers[name]) for side, name in names.items()},
    )
    folder: Path = args.folder or settings.output / "ab" / new_run_id().replace("run-", "ab-")
    ab.write_plan(folder, plan)
    return folder, plan


def _begun(args: argparse.Namespace, settings: Settings) -> tuple[Path, Plan]:
    from pytest_sglprof._run import ab

    plan = ab.read_plan(args.resume)
    names = {side: plan.name(side) for side in plan.servers}
    _check_servers(names, settings)
    for side, name in names.items():
        if ab.spec_digest(settings.servers[name]) != plan.servers[side]:
            raise SettingsError(
                f"server {name} is not the one with which {args.resume} began",
                expected="the settings in sglprof.toml that it had then",
                hint="begin a new comparison, or restore them",
            )
    return args.resume, plan


def _check_servers(names: dict[str, str], settings: Settings) -> None:
    for name in names.values():
        if name not in settings.servers:
            known = ", ".join(settings.servers)
            raise SettingsError(
                f"sglprof.toml has no server {name}",
                expected=f"one of {known}",
                hint=did_you_mean([name], settings.servers, f"add a table [servers.{name}]"),
            )
    gpus = {settings.servers[name].gpus for name in names.values()}
    if len(gpus) > 1:
        shown = " and ".join(f"{name} {settings.servers[name].gpus}" for name in names.values())
        raise SettingsError(
            f"the servers use other GPUs: {shown}",
            expected="the same ones, so that versions are compared and not GPUs",
            hint='give both the same gpus = [...], or "all"',
        )


def _limit(text: str) -> float:
    number = float(text)
    if not 1 <= number < float("inf"):
        raise argparse.ArgumentTypeError("must be a ratio, 1 or more")
    return number


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(count(size) for size in text.split(","))


def _alpha(text: str) -> float:
    number = float(text)
    if not 0 < number <= 0.2:
        raise argparse.ArgumentTypeError("must be above 0 and at most 0.2")
    return number


# The floor.


def _keep_floor(result: ABResult, folder: Path | None) -> None:
    """Writes the floor beside the baselines: under its own key, and to those of this machine that
    differ from it only in test, window and load."""
    if folder is None or result.floor is None:
        return
    from msgspec.structs import replace

    from pytest_sglprof._baselines.store import BaselineFolder

    baselines = BaselineFolder(folder)
    measured = result.records[-1].key
    for baseline in baselines.list():
        place = {"test": measured.test, "window": measured.window, "load": measured.load}
        key = replace(baseline.key, **place)
        if key == measured and baseline.key != measured:
            baselines.set_floor(baseline.key, result.floor)
            _say(f"floor: {folder / baseline.key.file_name}")
    baselines.set_floor(measured, result.floor)
    _say(f"floor: {folder / measured.file_name}")


# How it is shown.


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _show(text: str) -> None:
    """What a server or the load does right now: on a terminal alone, in one line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text[:100]}")
        sys.stderr.flush()


def _what(plan: Plan) -> str:
    return f"{plan.b} against {plan.a}" if plan.b else f"{plan.a} against itself"


def _progress(plan: Plan, lives: list[Life], life: Life) -> str:
    from pytest_sglprof._run.ab import minutes_left

    left = minutes_left(plan, lives)
    rest = f"; about {left:.0f} min left" if left >= 1 else "; less than a minute left"
    if len(lives) == len(plan.order):
        rest = ""
    name = plan.name(life.side)
    return f"life {life.number} of {len(plan.order)} ({name}): {life.seconds:.0f} s{rest}"


def _write(result: ABResult, folder: Path, args: argparse.Namespace) -> None:
    import msgspec

    from pytest_sglprof._files import atomic_write

    atomic_write(folder / RESULT, msgspec.json.format(msgspec.json.encode(result)))
    if args.format == "json":
        text = to_json(msgspec.to_builtins(result))
    elif args.format == "csv":
        rows = [msgspec.to_builtins(row) for row in result.rows]
        text = to_csv(rows, _ROW_FIELDS)
    else:
        text = _table_text(result)
    write_text(text, args.output, [folder / "plan.json", folder / RESULT])


_ROW_FIELDS = (
    *("name", "category", "kernel", "a", "b"),
    *("ratio", "low", "high", "p_slower", "p_faster", "word"),
)


def _table_text(result: ABResult) -> str:
    lines: list[str] = []
    if result.rows:
        figures = [row for row in result.rows if not row.kernel]
        kernels = [row for row in result.rows if row.kernel]
        head = ["figure", result.a, result.b, "ratio", "95 %", "p slower", "p faster", ""]
        shown = kernels[:TOP]
        lines += text_table(head, [_row(row) for row in figures], left=(0, 7))
        if shown:
            lines += ["", *text_table(["kernel", *head[1:]], list(map(_row, shown)), left=(0, 7))]
        if len(kernels) > len(shown):
            lines.append(f"{len(kernels) - len(shown)} more kernels; --format csv has all")
        lines.append("p is of all rows together (max-T); 95 % is of each by itself")
        lines.append(
            f"a ratio above 1 is worse: rates, and the busy share for idle_share, are {result.a} "
            f"/ {result.b}"
        )
    lines += [f"note: {note}" for note in result.notes]
    lines += _floor_lines(result)
    if result.sees is not None:
        a, b = result.lives
        lines.append(
            f"{a} + {b} lives see compute that is {percent(result.sees - 1, 1, sign=True)} or more"
        )
    lines.append(f"{result.word}: {result.reason}")
    return "\n".join(lines) + "\n"


def _floor_lines(result: ABResult) -> Iterator[str]:
    floor = result.floor
    if floor is None:
        return
    yield f"standard deviation between lives; its upper end (95 %) is {floor.upper:.2f} times that"
    rows = [[name, percent(sd, 2), percent(sd * floor.upper, 2)] for name, sd in floor.sd.items()]
    yield from text_table(["figure", "sd", "up to"], rows)


def _row(row: ABRow) -> list[str]:
    return [
        shorten(row.name, NAME_WIDTH),
        _value(row, row.a),
        _value(row, row.b),
        f"{row.ratio:.3f}",
        f"{row.low:.3f} to {row.high:.3f}",
        f"{row.p_slower:.2g}",
        f"{row.p_faster:.2g}",
        row.word,
    ]


def _value(row: ABRow, value: float) -> str:
    from pytest_sglprof._metrics import METRICS, UNITS

    metric: Any = METRICS.get(row.name)
    if row.name == "idle_share":
        return percent(value, 1)
    if row.kernel or row.name == "pass_wall" or metric is None:
        return duration(value)
    return f"{value:.3g}{UNITS[metric.unit].suffix}"
