"""`sglprof baseline list|show|accept|prune`: the accepted lives that a run is compared with."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._cli.options import (
    Column,
    NewParser,
    add_rows,
    count,
    output_options,
    positive,
    render,
    settings_of,
    settings_options,
    to_json,
    write_text,
)
from pytest_sglprof._errors import ExitStatus, SettingsError, SglprofError
from pytest_sglprof._verdict.wording import count as counted

if TYPE_CHECKING:
    from pytest_sglprof._baselines.records import AcceptedLife, Baseline, LifeRecord
    from pytest_sglprof._baselines.store import Accepted, BaselineFolder
    from pytest_sglprof._config.load import Settings

LIST = (
    *(Column(key, left=True) for key in ("test", "window", "gpu")),
    *(Column(key) for key in ("gpus", "lives", "level")),
    *(Column(key, left=True) for key in ("hosts", "newest", "sglang", "floor", "file")),
)
SHOW = (
    *(Column(key, left=True) for key in ("recorded", "host", "sglang", "run", "verdict")),
    Column("compute", "compute µs", lambda ns: "" if ns is None else f"{ns / 1000:.1f}"),
    Column("wall", "wall µs", lambda ns: "" if ns is None else f"{ns / 1000:.1f}"),
    *(Column(key, left=True) for key in ("level", "reason")),
)


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Looks after the folder of baselines (--baselines, or dir under [baseline] in "
        "sglprof.toml): the accepted server lives that later runs are compared with.",
        epilog="exit status: 0 done; 2 wrong usage, a baseline that cannot be read (the others are "
        "listed), or no life that may be accepted",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    folder = argparse.ArgumentParser(add_help=False)
    add_rows(folder, "baselines")
    shared = [folder, settings_options()]

    def add(name: str, text: str, *more: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[*more, *shared]
        )
        return made

    add("list", "list the baselines", output_options())
    show = add("show", "show the lives of a baseline", output_options())
    show.add_argument("which", metavar="BASELINE", help="its file, or a part of its test's name")
    _add_accept(add("accept", "accept the server lives of a run"))
    _add_prune(add("prune", "remove lives and baselines that no longer count"))


def _add_accept(parser: argparse.ArgumentParser) -> None:
    add_rows(parser, "keep_lives")
    parser.add_argument(
        "run", metavar="RUN", help="folder of a run, its results.json, its id, or latest"
    )
    parser.add_argument(
        "--reason",
        default="",
        metavar="TEXT",
        help="why a life that failed only by regression is accepted; it begins a new level: later "
        "lives are compared with it and those after it",
    )
    parser.add_argument(
        "--new-level",
        action="store_true",
        help="begin a new level although the life passed, for example after an improvement; "
        "needs --reason",
    )
    parser.add_argument("--test", default="", metavar="TEXT", help="only tests whose name has it")
    parser.add_argument("--window", default="", metavar="NAME", help="only windows of this name")


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep", type=count, metavar="N", help="drop all but the N newest lives of each baseline"
    )
    parser.add_argument(
        "--older-than",
        type=positive,
        metavar="DAYS",
        help="remove baselines whose newest life was recorded more than DAYS ago",
    )
    parser.add_argument(
        "--unused-by",
        action="append",
        default=[],
        metavar="RUN",
        help="remove baselines that no window of these runs is compared with; can be repeated",
    )
    parser.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="ID",
        help="remove the lives of this run, for example of a bad night that was accepted by "
        "mistake; can be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run(args: argparse.Namespace) -> ExitStatus:
    """Does what is asked of the folder."""
    settings = settings_of(args)
    folder = _folder(settings)
    action = {"list": _list, "show": _show, "accept": _accept, "prune": _prune}[args.action]
    status = action(args, settings, folder)
    for problem in folder.problems:
        sys.stderr.write(f"note: {problem}\n")
    return ExitStatus.UNUSABLE if folder.problems else status


def _folder(settings: Settings) -> BaselineFolder:
    from pytest_sglprof._baselines.store import BaselineFolder

    if settings.baselines is None:
        raise SettingsError(
            "no folder of baselines is set",
            expected="--baselines DIR, or dir under [baseline] in sglprof.toml",
            hint="name one that your repository or your CI keeps",
        )
    return BaselineFolder(settings.baselines)


def _list(args: argparse.Namespace, settings: Settings, folder: BaselineFolder) -> ExitStatus:
    records = [_summary(baseline) for baseline in folder.list()]
    write_text(render(records, LIST, args.format), args.output, [folder.path])
    if not records:
        sys.stderr.write(
            f"note: {folder.path} has no baseline; sglprof baseline accept RUN adds one\n"
        )
    return ExitStatus.DONE


def _summary(baseline: Baseline) -> dict[str, Any]:
    lives = baseline.lives
    newest = lives[-1].record if lives else None
    floor = baseline.floor
    return {
        "test": baseline.key.test,
        "window": baseline.key.window,
        "gpu": baseline.key.gpu or "unknown",
        "gpus": baseline.key.gpus,
        "lives": len(lives),
        "level": sum(_is_level(lives)),
        "hosts": ", ".join(sorted({life.record.provenance.host for life in lives})),
        "newest": newest.recorded[:10] if newest else "",
        "sglang": newest.provenance.versions.get("sglang", "") if newest else "",
        "floor": f"{floor.lives} lives, {floor.measured[:10]}" if floor else "",
        "file": baseline.key.file_name,
    }


def _is_level(lives: Sequence[AcceptedLife]) -> list[bool]:
    """Whether each life counts for the mean."""
    start = max((at for at, life in enumerate(lives) if life.begins_level), default=0)
    return [at >= start for at in range(len(lives))]


def _show(args: argparse.Namespace, settings: Settings, folder: BaselineFolder) -> ExitStatus:
    import msgspec

    name = Path(args.which).name
    matching = [b for b in folder.list() if name == b.key.file_name or args.which in b.key.test]
    if not matching:
        tests = ", ".join(dict.fromkeys(baseline.key.test for baseline in folder.list()))
        raise SglprofError(
            f"there is no baseline {args.which} in {folder.path}",
            expected="the name of a file there, or a part of the name of a test",
            hint=f"it has those of {tests}" if tests else "no life has been accepted yet",
        )
    if args.format == "json":
        text = to_json(msgspec.to_builtins(matching))
    elif args.format == "csv":
        text = render([row for baseline in matching for row in _lives(baseline)], SHOW, "csv")
    else:
        text = "\n".join(_shown(baseline) for baseline in matching)
    write_text(text, args.output, [folder.path])
    return ExitStatus.DONE


def _shown(baseline: Baseline) -> str:
    from pytest_sglprof._baselines.figures import Figure, life_values

    key = baseline.key
    head = [f"{key.test}, window {key.window}", f"  file: {key.file_name}"]
    gpus = f"{key.gpus} x {key.gpu}" if key.gpus else key.gpu
    head.append(f"  {gpus}; {key.model} {key.quantization}; {key.backend}".replace(" ;", ";"))
    if baseline.lives:
        newest = baseline.lives[-1].record.provenance
        for what, options in (("server", newest.options), ("load", newest.load)):
            words = " ".join(
                f"{name}={value}" if value else name for name, value in options.items()
            )
            head.append(f"  {what}: {words or 'no options'}")
        values = life_values([life.record for life in baseline.lives], Figure("compute"))
        if isinstance(values, str):
            head.append(f"  its lives cannot be compared with each other: {values}")
    if baseline.floor:
        shares = (f"{name} {100 * sd:.1f} %" for name, sd in baseline.floor.sd.items())
        floor = baseline.floor
        head.append(
            f"  lives of one version on {floor.host} differ by (sd, {floor.lives} lives): "
            + ", ".join(shares)
        )
    return "\n".join([*head, "", render(_lives(baseline), SHOW, "table")])


def _lives(baseline: Baseline) -> list[dict[str, Any]]:
    from pytest_sglprof._baselines.figures import Figure, life_values

    records = [life.record for life in baseline.lives]
    columns = {}
    for name, figure in (("compute", "compute"), ("wall", "pass_wall")):
        values = life_values(records, Figure(figure))
        columns[name] = [None] * len(records) if isinstance(values, str) else values
    levels = _is_level(baseline.lives)
    return [
        {
            "recorded": life.record.recorded,
            "host": life.record.provenance.host,
            "sglang": life.record.provenance.versions.get("sglang", ""),
            "run": life.record.run,
            "verdict": life.record.verdict or "none",
            **{name: values[at] for name, values in columns.items()},
            "level": "begins" if life.begins_level else ("" if levels[at] else "earlier"),
            "reason": life.reason,
        }
        for at, life in enumerate(baseline.lives)
    ]


def _accept(args: argparse.Namespace, settings: Settings, folder: BaselineFolder) -> ExitStatus:
    from pytest_sglprof._report.model import utc

    if args.new_level and not args.reason.strip():
        raise SettingsError(
            "--new-level without --reason",
            expected="why the lives before no longer say how fast it is",
            hint='for example --reason "CUDA graphs for the draft model"',
        )
    chosen = [
        record
        for record in lives_of(args.run, settings)
        if args.test in record.key.test and args.window in ("", record.key.window)
    ]
    if not chosen:
        raise SglprofError(
            f"run {args.run} has no such window",
            expected="a test and a window of it",
            hint="leave --test and --window out",
        )
    done = folder.accept(
        chosen,
        reason=args.reason.strip(),
        mode="all",
        keep=settings.keep_lives,
        new_level=args.new_level,
        now=utc(time.time()),
    )
    for each in done:
        sys.stdout.write(_outcome(each))
    is_any = any(not each.refused or each.refused == KNOWN for each in done)
    return ExitStatus.DONE if is_any else ExitStatus.UNUSABLE


KNOWN = "this server life is accepted already"


def _outcome(done: Accepted) -> str:
    key = done.record.key
    what = f"{key.test}, window {key.window}"
    if done.refused:
        return f"not accepted: {what}: {done.refused}\n"
    new = " (new)" if done.is_new else ""
    return f"accepted: {what} -> {done.file}{new}\n"


def _prune(args: argparse.Namespace, settings: Settings, folder: BaselineFolder) -> ExitStatus:
    if args.keep is None and args.older_than is None and not (args.unused_by or args.run):
        raise SettingsError(
            "baseline prune: nothing says what to remove",
            expected="--keep N, --older-than DAYS, --unused-by RUN or --run ID",
            hint="add --dry-run to see what would go",
        )
    only: Sequence[Path] = ()
    if args.unused_by:
        used = [record.key for run in args.unused_by for record in lives_of(run, settings)]
        only = folder.unused(used)
    oldest = None
    if args.older_than is not None:
        oldest = datetime.now(timezone.utc) - timedelta(days=args.older_than)
    verb = "would remove" if args.dry_run else "removed"
    done = folder.prune(
        keep=args.keep, older_than=oldest, only=only, runs=args.run, dry_run=args.dry_run
    )
    if not done:
        sys.stderr.write(f"note: nothing to remove in {folder.path}\n")
    for gone in done:
        what = "all lives" if gone.is_whole else counted(gone.lives, "life", "lives")
        sys.stdout.write(f"{verb} {what} of {gone.file}: {gone.why}\n")
    return ExitStatus.DONE


def lives_of(run: str, settings: Settings) -> list[LifeRecord]:
    """The lives of a run: its folder, its results.json, its id, or `latest`.

    Raises `SglprofError` if it left none. A run whose folder was removed still has them.
    """
    from pytest_sglprof._baselines.history import HISTORY, history_file, read_lives

    path = Path(run)
    if not path.exists() and (settings.output / run).exists():
        path = settings.output / run
    path = path.resolve()
    path = path.parent if path.is_file() else path
    output, run_id = (path.parent, path.name) if path.is_dir() else (settings.output, run)
    file = history_file(output, run_id)
    problems: list[str] = []
    records = read_lives(file, problems) if file.exists() else []
    for problem in problems:
        sys.stderr.write(f"note: {problem}\n")
    if not records:
        known = sorted(each.stem for each in (output / HISTORY).glob("*.jsonl"))
        raise SglprofError(
            f"run {run} left no record of a server life",
            expected="the folder or the id of a run with complete windows",
            hint=f"the newest are {', '.join(known[-3:])}" if known else f"{output} has none",
        )
    return records
