"""`sglprof history`: a figure of every server life that was recorded, and where it changed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._cli.options import (
    Column,
    NewParser,
    add_rows,
    output_options,
    refuse_inputs,
    render,
    settings_of,
    settings_options,
    to_json,
    write_text,
)
from pytest_sglprof._errors import ExitStatus, SettingsError, SglprofError

if TYPE_CHECKING:
    from pytest_sglprof._baselines.figures import Figure
    from pytest_sglprof._baselines.records import AcceptedLife, BaselineKey, LifeRecord
    from pytest_sglprof._config.load import Settings

TABLE = (
    *(Column(key, left=True) for key in ("recorded", "run", "host", "sglang")),
    Column("shown", "value"),
    *(Column(key, left=True) for key in ("verdict", "accepted", "change", "reason")),
)
CSV = (
    *("test", "window", "key", "recorded", "run", "life", "host", "sglang", "commit", "metric"),
    *("unit", "value", "verdict", "failed", "accepted", "begins_level", "reason", "is_change"),
)


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Lists a figure of each server life that runs of pytest recorded, over all "
        "nights: which of them are accepted, where the figure changed, and between which versions.",
        epilog="exit status: 0 done, also where something changed: a change fails nothing; 2 wrong "
        "usage, no life was recorded, or none has the figure",
        parents=[output_options(), settings_options()],
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="folders for results (default: that of the configuration, .sglprof)",
    )
    add_rows(parser, "baselines")
    parser.add_argument("--test", default="", metavar="TEXT", help="only tests whose name has it")
    parser.add_argument("--window", default="", metavar="NAME", help="only windows of this name")
    parser.add_argument(
        "--metric",
        default="compute",
        metavar="FIGURE",
        help="compute (the default), communication, all, a category such as moe, pass_wall, "
        "idle_share, or a figure of the load such as ttft_p99",
    )
    parser.add_argument("--kernel", default="", metavar="REGEX", help="kernels, instead of FIGURE")
    parser.add_argument("--stage", default="", help="only steps of one stage: decode, prefill, …")
    parser.add_argument(
        "--since", default="", metavar="DATE", help="2026-11-01, or a number of days such as 30"
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="write one HTML page with charts of all figures instead, which needs no network",
    )


@dataclass(frozen=True)
class Nights:
    """The lives of one key, the oldest first, and their figure. changes: where a level begins."""

    key: BaselineKey
    records: tuple[LifeRecord, ...]
    values: tuple[float | None, ...]
    changes: tuple[int, ...]
    accepted: Mapping[str, AcceptedLife]


def run(args: argparse.Namespace) -> ExitStatus:
    """Prints the lives of each key."""
    from pytest_sglprof._baselines.figures import Figure

    settings = settings_of(args)
    figure = Figure(args.metric, args.kernel, args.stage)
    folders = args.folders or [settings.output]
    records = _records(folders, args)
    nights = [_nights(of_key, figure, settings) for of_key in _by_key(records)]
    if args.page is not None:
        _write_page(args.page, nights, folders)
        return ExitStatus.DONE
    if all(value is None for each in nights for value in each.values):
        raise _without_figure(records, figure)
    rows = [row for each in nights for row in _rows(each, figure)]
    if args.format == "json":
        text = to_json([{name: row[name] for name in CSV} for row in rows])
    elif args.format == "csv":
        text = render(rows, [Column(name) for name in CSV], "csv")
    else:
        text = "\n".join(_table(each, figure) for each in nights)
    write_text(text, args.output, folders)
    return ExitStatus.DONE


def _without_figure(records: Sequence[LifeRecord], figure: Figure) -> SglprofError:
    """None of these lives has the figure: mistyped, or never measured."""
    from pytest_sglprof._baselines.figures import IDLE_SHARE, PASS_WALL
    from pytest_sglprof._verdict.life_words import figure_label

    newest = records[-1]
    categories = {
        name for each in newest.groups for kind in each.strata for name in kind.categories
    }
    measured = {} if newest.load is None else newest.load.figures
    names = ("compute", *sorted(categories), "all", PASS_WALL, IDLE_SHARE, *sorted(measured))
    return SglprofError(
        f"none of these {len(records)} lives has a figure {figure_label(figure)}",
        expected=f"--metric with one that the newest life has: {', '.join(names)}",
        hint="figures of the load are those of a load that ended before the window opened"
        if figure.is_of_load and not measured
        else "sglprof kernels RUN lists kernels and their categories",
    )


def _write_page(page: Path, nights: Sequence[Nights], folders: Sequence[Path]) -> None:
    from pytest_sglprof._report.page.nights import write_history_page

    refuse_inputs(page, folders, option="--page")
    lives = [record for each in nights for record in each.records]
    accepted = {name: life for each in nights for name, life in each.accepted.items()}
    write_history_page(page, lives, accepted)
    sys.stdout.write(f"{page}\n")


def _records(folders: Iterable[Path], args: argparse.Namespace) -> list[LifeRecord]:
    from pytest_sglprof._baselines.history import read_history
    from pytest_sglprof._baselines.store import moment

    problems: list[str] = []
    by_id = {each.id: each for path in folders for each in read_history(path, problems=problems)}
    for problem in problems:
        sys.stderr.write(f"note: {problem}\n")
    since = _since(args.since) if args.since else None
    chosen = [
        record
        for record in sorted(by_id.values(), key=lambda each: (each.recorded, each.id))
        if args.test in record.key.test
        and args.window in ("", record.key.window)
        and (since is None or moment(record.recorded) >= since)
    ]
    if not chosen:
        tests = ", ".join(dict.fromkeys(each.key.test for each in by_id.values()))
        raise SglprofError(
            "no server life was recorded" + (" that fits" if by_id else ""),
            expected=f"lives of runs of pytest in {', '.join(map(str, folders))}",
            hint=f"there are those of {tests}" if tests else "run tests with profile windows first",
        )
    return chosen


def _since(text: str) -> datetime:
    try:
        if text.isdecimal():
            return datetime.now(timezone.utc) - timedelta(days=int(text))
        day = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except (ValueError, OverflowError) as error:
        raise SettingsError(
            f"--since {text} is no date", expected="a day such as 2026-11-01, or days such as 30"
        ) from error
    return day if day.tzinfo else day.replace(tzinfo=timezone.utc)


def _by_key(records: Sequence[LifeRecord]) -> list[list[LifeRecord]]:
    """The records of each key; keys in order of their first life."""
    by_file: dict[str, list[LifeRecord]] = {}
    for record in records:
        by_file.setdefault(record.key.file_name, []).append(record)
    return list(by_file.values())


def _nights(records: Sequence[LifeRecord], figure: Figure, settings: Settings) -> Nights:
    from pytest_sglprof._baselines.nights import night_changes, night_values

    key, values = records[0].key, night_values(records, figure)
    return Nights(
        key, tuple(records), tuple(values), tuple(night_changes(values)), _accepted(key, settings)
    )


def _accepted(key: BaselineKey, settings: Settings) -> dict[str, AcceptedLife]:
    """By the ids of their records; {} without baselines, or with one that cannot be read."""
    from pytest_sglprof._baselines.store import BaselineError, BaselineFolder

    if settings.baselines is None:
        return {}
    try:
        baseline = BaselineFolder(settings.baselines).find(key)
    except BaselineError as error:
        sys.stderr.write(f"note: {error.what}\n")
        return {}
    return {} if baseline is None else {life.record.id: life for life in baseline.lives}


def _rows(nights: Nights, figure: Figure) -> list[dict[str, Any]]:
    from pytest_sglprof._verdict.life_words import amount, figure_label

    rows = []
    for at, (record, value) in enumerate(zip(nights.records, nights.values, strict=True)):
        life = nights.accepted.get(record.id)
        rows.append(
            {
                "test": nights.key.test,
                "window": nights.key.window,
                "key": nights.key.digest,
                "recorded": record.recorded,
                "run": record.run,
                "life": record.life,
                "host": record.provenance.host,
                "sglang": record.provenance.versions.get("sglang", ""),
                "commit": record.provenance.commit,
                "metric": figure_label(figure),
                "unit": _unit(figure),
                "value": value,
                "shown": "" if value is None else amount(figure, value),
                "verdict": record.verdict or "none",
                "failed": ", ".join(record.failed),
                "accepted": "" if life is None else "yes",
                "begins_level": life is not None and life.begins_level,
                "reason": "" if life is None else life.reason,
                "is_change": at in nights.changes,
                "change": _by_how_much(nights, at) if at in nights.changes else "",
            }
        )
    return rows


def _unit(figure: Figure) -> str:
    from pytest_sglprof._metrics import METRICS

    if figure.is_of_load:
        return METRICS[figure.name].unit
    return "share" if figure.name == "idle_share" and not figure.kernel else "ns"


def _by_how_much(nights: Nights, at: int) -> str:
    """`+12.4 %`: the mean of the level that begins there beside that of the one before."""
    from pytest_sglprof._baselines.nights import level_means

    before, now = level_means([*nights.values], nights.changes, at)
    return f"{100 * (now / before - 1):+.1f} %" if before else ""


def _table(nights: Nights, figure: Figure) -> str:
    from pytest_sglprof._verdict.life_words import figure_label

    key = nights.key
    head = f"{key.test}, window {key.window}, {key.gpu or 'unknown GPU'}: {figure_label(figure)}"
    lines = [head, render(_rows(nights, figure), TABLE, "table").rstrip("\n")]
    return "\n".join([*lines, *(f"  {line}" for line in sentences(nights))]) + "\n"


def sentences(nights: Nights) -> list[str]:
    """Between which versions the figure changed, and which was the last good one."""
    lines = []
    for at in nights.changes:
        before = next(k for k in range(at - 1, -1, -1) if nights.values[k] is not None)
        lines.append(
            f"changed by {_by_how_much(nights, at)}: the last life before is "
            f"{_version(nights.records[before])}, the first after is {_version(nights.records[at])}"
        )
    words = [record.verdict for record in nights.records]
    bad = next((at for at in range(len(words), 0, -1) if words[at - 1] == "pass"), 0)
    first_bad = next((at for at in range(bad, len(words)) if words[at] == "fail"), None)
    if first_bad is not None:
        good = _version(nights.records[bad - 1]) if bad else "none"
        lines.append(f"last good: {good}; first bad: {_version(nights.records[first_bad])}")
    return lines


def _version(record: LifeRecord) -> str:
    """`0.5.23 (run-20261124-031351-3f9a)`."""
    return f"{record.provenance.versions.get('sglang') or 'unknown'} ({record.run})"
