"""The two sides of `sglprof compare`: each a run, a window, traces, an export or a baseline."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._cli.inputs import Inputs, InputWindow
from pytest_sglprof._cli.options import read_table
from pytest_sglprof._errors import SglprofError
from pytest_sglprof._limits import UNDECODABLE, read_bytes, why_undecodable
from pytest_sglprof._ranks import rank_order

if TYPE_CHECKING:
    from pytest_sglprof._analysis.strata import GroupStrata
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._report.model import RecordedWindow, Results

Place = tuple[str, str, int]  # of a window: its test, its name, how many of that name came before


@dataclass(frozen=True)
class Side:
    """One window, or the accepted lives of a baseline.

    place: by which windows of two runs are paired. facts: what both sides must have alike, as far
    as they tell it. versions: what may differ, and is shown. run: its id, where
    it is of a run. lives: of how many server lives its
    times are. doubt: why it cannot be compared at all, "" if it can. files: that were read.
    """

    title: str
    groups: tuple[GroupStrata, ...]
    facts: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    run: str = ""
    place: Place = ("", "", 0)
    lives: int = 1
    doubt: str = ""
    files: tuple[Path, ...] = ()


def differences(old: Side, new: Side) -> str:
    """Why the sides cannot be compared, each fact with both values; "" where they can."""
    doubts = [f"{each.title}: {each.doubt}" for each in (old, new) if each.doubt]
    unlike = [
        f"{name} {old.facts[name]} before and {new.facts[name]} now"
        for name in old.facts
        if old.facts[name] and new.facts.get(name) and old.facts[name] != new.facts[name]
    ]
    return "; ".join([*doubts, *unlike])


def other_versions(old: Side, new: Side) -> list[tuple[str, str, str]]:
    """(name, before, now) of what differs and may."""
    names = [name for name in old.versions if name in new.versions]
    pairs = [(name, old.versions[name], new.versions[name]) for name in names]
    return [each for each in pairs if each[1] and each[2] and each[1] != each[2]]


def sides_of(inputs: Inputs, args: argparse.Namespace, settings: Settings) -> list[Side]:
    """The windows of a path, all of them unless `--window` names one; or a baseline."""
    from pytest_sglprof._report.page.baseline import paired_by
    from pytest_sglprof._report.stored import whole

    if inputs.baselines:
        return [_of_baseline(inputs.baselines[0])]
    chosen = inputs.chosen(args.window)
    heads = {id(each.window) for each in chosen}
    sides = [
        _of_window(whole(head, run.document), run.document, place, run.file)
        for run in inputs.runs
        for place, head in paired_by(run.document).items()
        if id(head) in heads
    ]
    alone = [each for each in chosen if each.window is None]
    sides += [_of_files(each, inputs.paths[0], args, settings, len(chosen) == 1) for each in alone]
    if not sides:
        ids = ", ".join(window.id for window in inputs.windows)
        what = f"no window {args.window}" if args.window and ids else "no window"
        raise SglprofError(
            f"{inputs.paths[0]} has {what}",
            expected="a run that recorded windows, or traces",
            hint=f"choose with --window: {ids}" if ids else "the runs of pytest are in .sglprof",
        )
    return sides


def pairs_of(old: Sequence[Side], new: Sequence[Side]) -> tuple[list[tuple[Side, Side]], list[str]]:
    """The sides to compare with each other, and the titles of those without a counterpart.

    Two windows are compared whatever their names; several are paired by test and name.
    """
    if len(old) == len(new) == 1:
        return [(old[0], new[0])], []
    earlier, later = ({side.place: side for side in sides} for sides in (old, new))
    single = old if len(old) == 1 else new if len(new) == 1 else ()
    if single and not any(single[0].place):
        several = new if single is old else old
        ids = ", ".join(side.title for side in several)
        raise SglprofError(
            f"{single[0].title} is one window, the other run has {len(several)}",
            expected="one window on each side",
            hint=f"choose with --window: {ids}",
        )
    pairs = [(earlier[place], side) for place, side in later.items() if place in earlier]
    alone = [f"{side.title}: only now" for place, side in later.items() if place not in earlier]
    alone += [f"{side.title}: only before" for place, side in earlier.items() if place not in later]
    return pairs, alone


# Windows of a run.


def _of_window(window: RecordedWindow, document: Results, place: Place, results: Path) -> Side:
    from pytest_sglprof._baselines.making import model_name

    server = next((each for each in document.servers if each.key == window.server), None)
    run = window.run or {}
    return Side(
        title=window.id,
        groups=window.strata,
        facts={
            "server": "the stand-in" if window.standin else "SGLang",
            "profiler": window.backend,
            "times of": window.source or "",
            "GPU": run.get("GPU", ""),
            "ranks": _ranks(window.strata),
            "model": model_name(server.model) if server is not None else "",
            "sizes": _sizes(server.sizes) if server is not None else "",
        },
        versions={
            "SGLang": server.version if server is not None else "",
            **{name: value for name, value in run.items() if name != "GPU"},
        },
        run=document.run.id,
        place=place,
        doubt="; ".join(_doubts(window)),
        files=(results,),
    )


_PARALLEL = ("tp", "dp", "pp", "ep")


def _sizes(sizes: Mapping[str, object]) -> str:
    """In one order, whatever that of the file is: baselines are sorted, results are not."""
    return ", ".join(f"{name} {sizes[name]}" for name in _PARALLEL if name in sizes)


def _ranks(groups: Sequence[GroupStrata]) -> str:
    return ", ".join(rank_order({rank for group in groups for rank in group.ranks}))


def _doubts(window: RecordedWindow) -> Iterator[str]:
    if window.source is None:
        yield f"it has no kernels ({window.state_reason or window.reason})"
    elif window.state != "complete":
        yield f"it is {window.state} ({window.state_reason})"
    elif window.partial:
        yield "it was read from a truncated trace"
    elif not window.strata:
        yield "its version of pytest-sglprof did not sort steps by work"
    hot = [gpu.rank for gpu in window.gpus if gpu.throttled]
    if hot:
        yield f"GPUs were throttled: {', '.join(hot)}"


# Files alone.


def _of_files(
    window: InputWindow, path: Path, args: argparse.Namespace, settings: Settings, is_alone: bool
) -> Side:
    """A window of files. is_alone: it is the only one of `path`, and is compared with any other."""
    from pytest_sglprof._analysis.budget import step_walls
    from pytest_sglprof._analysis.collectives import waits
    from pytest_sglprof._analysis.strata import strata
    from pytest_sglprof._analysis.times import sum_times
    from pytest_sglprof._trace.paths import is_nsys, window_files

    files = window.files(args)
    table = read_table(files, args, settings)
    waited = waits(table)
    read = window_files(files.paths)
    doubt = table.incomparable or window.doubt or ""
    if table.partial and not args.allow_partial:
        doubt = doubt or "it was read from a truncated trace"
    groups = strata(table, sum_times(table), waited, step_walls(table, waited))
    return Side(
        title=str(path) if is_alone else window.id,
        groups=groups,
        place=("", "" if is_alone else window.id, 0),
        facts={
            "profiler": "nsys" if is_nsys(read[0]) else "torch",
            "times of": table.source,
            "GPU": table.run.get("GPU", ""),
            "ranks": _ranks(groups),
        },
        versions={name: value for name, value in table.run.items() if name != "GPU"},
        doubt=doubt,
        files=(*files.paths, *read),
    )


# Baselines.


def _of_baseline(path: Path) -> Side:
    import msgspec

    from pytest_sglprof._analysis.compare import mean_strata
    from pytest_sglprof._baselines.records import Baseline

    try:
        baseline = msgspec.json.decode(read_bytes(path), type=Baseline)
    except (OSError, *UNDECODABLE) as error:
        raise SglprofError(
            f"{path} is no baseline: {why_undecodable(error)}",
            expected="a file of the folder of baselines",
            hint="sglprof baseline list shows them",
        ) from error
    begins = [at for at, life in enumerate(baseline.lives) if life.begins_level]
    lives = [life.record for life in baseline.lives[begins[-1] if begins else 0 :]]
    if not lives:
        raise SglprofError(f"{path} has no accepted life", expected="at least one")
    key, newest = baseline.key, lives[-1]
    return Side(
        title=f"{path} ({len(lives)} accepted {'life' if len(lives) == 1 else 'lives'})",
        groups=mean_strata([life.groups for life in lives]),
        facts={
            "server": "the stand-in" if key.standin else "SGLang",
            "profiler": key.backend,
            "GPU": key.gpu,
            "ranks": _ranks(newest.groups),
            "model": key.model,
            "sizes": _sizes(key.sizes),
        },
        versions=dict(newest.provenance.versions),
        place=(key.test, key.window, 0),
        lives=len(lives),
        files=(path,),
    )
