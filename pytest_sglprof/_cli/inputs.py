"""What the paths of a command hold: runs, windows, traces, baselines, and archives of these.

Every command that reads what was recorded finds its windows here, so that each takes the same.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._cli.archive import is_archive, unpacked
from pytest_sglprof._cli.options import given_ranks, write_notes
from pytest_sglprof._errors import NotATrace, SglprofError, TraceError
from pytest_sglprof._files import JOURNAL, RESULTS, RUN_FILE
from pytest_sglprof._ranks import FILE_END, NAME_PATTERNS, named_ranks, node_in_name

if TYPE_CHECKING:
    from pytest_sglprof._report.model import Results, WindowHead
    from pytest_sglprof._run.measure import WindowFiles

UNJUDGED = "its run stopped before this window was judged"
_DEPTH = 5  # folders below a path in which runs and windows are looked for
_HEAD = 200  # bytes by which our JSON is recognised
_RESULTS_HEAD = re.compile(rb'\s*\{\s*"schema_version"')
_BASELINE_HEAD = re.compile(rb'\s*\{\s*"(format|floor|key)"')


@dataclass(frozen=True)
class RecordedRun:
    """A run. file: its results.json, or the journal of a run that did not end.

    folder: what the paths in its document are relative to. home: the same for links of a page;
    of an archive, where it would lie unpacked.
    """

    file: Path
    folder: Path
    home: Path
    document: Results

    @property
    def recorded(self) -> list[Path]:
        """What nothing may replace: the results, their folder, and the files they name."""
        from pytest_sglprof._report.stored import heads_of

        artifacts = [item.path for head in heads_of(self.document) for item in head.artifacts]
        return [self.file, self.folder, *(self.folder / path for path in artifacts)]


@dataclass(frozen=True)
class InputWindow:
    """A window that a command can read: of a run, or files alone.

    id: by which `--window` chooses it. paths: its files, empty for a window of results.json,
    which names them itself. root, home: as `folder` and `home` of a run. run: where a run
    recorded it; its `window` is None where the run ended before it was judged.
    """

    id: str
    root: Path
    home: Path
    paths: tuple[Path, ...] = ()
    run: RecordedRun | None = None
    window: WindowHead | None = None

    @property
    def doubt(self) -> str | None:
        """Why it is not whole, as far as its run knows; None if nothing says so."""
        if self.window is not None:
            return None if self.window.state == "complete" else self.window.state_reason
        return UNJUDGED if self.run is not None else None

    def files(self, args: argparse.Namespace) -> WindowFiles:
        """Its files, and their ranks as `--rank` corrects them; `TraceError` if they are gone."""
        from pytest_sglprof._run.measure import WindowFiles

        pid_ranks, file_ranks = given_ranks(args)
        if self.window is None:
            return WindowFiles(
                self.paths, pid_ranks=pid_ranks, file_ranks=file_ranks, server_info=args.server_info
            )
        recorded = {int(pid): rank for pid, rank in self.window.pid_ranks.items()}
        return WindowFiles(
            _artifacts(self.window, self.root),
            pid_ranks={**recorded, **pid_ranks},
            file_ranks=file_ranks,
            gpu_ranks={int(gpu): rank for gpu, rank in self.window.gpu_ranks.items()},
            settle=self.window.spec.settle,
            server_info=args.server_info,
        )


def _artifacts(window: WindowHead, folder: Path) -> tuple[Path, ...]:
    """The files that results.json names. Raises `TraceError` where they were not kept."""
    kinds = {artifact.kind for artifact in window.artifacts}
    exported = kinds & {"sqlite", "parquet"}  # a report and its export are the same data
    paths = tuple(
        folder / artifact.path
        for artifact in window.artifacts
        if not exported or artifact.kind in exported
    )
    if not paths or not all(path.exists() for path in paths):
        raise TraceError(
            f"the traces of window {window.id} are gone",
            expected="the files that results.json names, beside it",
            hint="keep the traces of windows that pass: --sglprof-set=output.keep=all",
        )
    return paths


@dataclass(frozen=True)
class Inputs:
    """What the paths of a command hold. baselines: files of accepted lives.

    paths: those that were given. notes: what was passed over.
    """

    paths: tuple[Path, ...] = ()
    runs: tuple[RecordedRun, ...] = ()
    windows: tuple[InputWindow, ...] = ()
    baselines: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def recorded(self) -> list[Path]:
        """What no output may replace."""
        runs = [path for run in self.runs for path in run.recorded]
        return [*self.paths, *runs, *(path for each in self.windows for path in each.paths)]

    @property
    def places(self) -> list[Path]:
        """Where a stored configuration may lie."""
        return [*(run.folder for run in self.runs), *self.recorded]

    def one(self, window_id: str) -> InputWindow:
        """The window of that id or name, else the only judged one; `SglprofError` lists them."""
        chosen = self.chosen(window_id)
        if not window_id:
            chosen = [each for each in chosen if each.window is None or each.window.is_judged]
        if len(chosen) == 1:
            return chosen[0]
        ids = ", ".join(window.id for window in self.windows)
        what = f"{len(chosen)} windows" if chosen or not window_id else "no window"
        if window_id:
            what += f" {window_id}"
        where = "these results" if self.runs else ", ".join(map(str, self.paths))
        raise SglprofError(
            f"there {'are' if chosen else 'is'} {what} in {where}",
            expected="one window",
            hint=f"choose with --window: {ids or 'there is none'}",
        )

    def chosen(self, window_id: str) -> list[InputWindow]:
        """The windows of that id, else of that name; all of them for ""."""
        if with_id := [each for each in self.windows if window_id in ("", each.id)]:
            return with_id
        of_runs = [each for each in self.windows if each.window is not None]
        return [each for each in of_runs if each.window and each.window.name == window_id]


@dataclass(frozen=True)
class Recorded:
    """The one window that a command reads. window: its head in results.json, None without.

    doubt: why it cannot be trusted as a whole; None if nothing says so.
    """

    files: WindowFiles
    window: WindowHead | None
    inputs: Inputs
    doubt: str | None = None


def recorded_by(args: argparse.Namespace) -> Recorded:
    """The window that the paths of a command and `--window` choose."""
    inputs = inputs_of(args)
    chosen = inputs.one(args.window)
    write_notes(inputs.notes)
    return Recorded(chosen.files(args), chosen.window, inputs, chosen.doubt)


def inputs_of(args: argparse.Namespace, paths: Sequence[str | Path] | None = None) -> Inputs:
    """What `paths` (by default, those of the command) hold; of archives, until the command ends.

    Files, and folders of traces of which each has other ranks or nodes, are one window together.
    A folder without anything to read is passed over with a note, if something else is left.
    Raises `SglprofError` otherwise.
    """
    parts: list[Inputs] = []
    traces: list[Path] = []
    refusals: dict[Path, NotATrace] = {}
    given = _without_links([Path(path) for path in (args.paths if paths is None else paths)])
    for path in given:
        try:
            part = _read(path, args.temporary)
        except NotATrace as error:
            if not path.is_dir():
                raise
            refusals[path] = error
            continue
        if part is None:
            traces.append(path)
        else:
            parts.append(part)
    parts += _of_traces(traces)
    if not parts:
        raise next(iter(refusals.values()))
    notes = [f"{path} is passed over: {error.what}" for path, error in refusals.items()]
    whole = _together(parts)
    return replace(
        whole,
        paths=tuple(given),
        windows=_with_unique_ids(whole.windows),
        notes=(*notes, *whole.notes),
    )


def _without_links(paths: Sequence[Path]) -> list[Path]:
    """Without links to folders that are given as well: `.sglprof/*` has also `latest`."""
    given = {os.path.realpath(path) for path in paths if not path.is_symlink()}
    return [
        path
        for path in paths
        if not (path.is_symlink() and path.is_dir() and os.path.realpath(path) in given)
    ]


def _together(parts: Sequence[Inputs]) -> Inputs:
    return Inputs(
        runs=tuple(run for part in parts for run in part.runs),
        windows=tuple(window for part in parts for window in part.windows),
        baselines=tuple(path for part in parts for path in part.baselines),
        notes=tuple(note for part in parts for note in part.notes),
    )


def _read(path: Path, temporary: ExitStack) -> Inputs | None:
    """What one path holds; None for traces, which may be one window together with others."""
    if path.is_dir():
        return _in_folder(path, path.absolute())
    if is_archive(path):
        folder = unpacked(path, temporary)
        try:
            return _in_folder(folder, path.absolute().parent) or _of_archive(folder, path)
        except NotATrace as error:
            raise NotATrace(
                f"{path} has nothing to read: {error.what.replace(str(folder), 'it')}",
                expected="a run's results.json, or traces, reports and exports of windows",
                hint="look what CI keeps: the folder of the run, with its windows",
            ) from error
    if path.name == JOURNAL:
        return _interrupted(path.parent, path.absolute().parent)
    if path.name == RESULTS or _begins(path, _RESULTS_HEAD):
        return _run(path, path.absolute().parent)
    if _begins(path, _BASELINE_HEAD):
        return Inputs(baselines=(path,))
    return None


def _begins(path: Path, pattern: re.Pattern[bytes]) -> bool:
    """Whether the text of a file begins so; a trace is not decoded for that."""
    try:
        with path.open("rb") as stream:
            return pattern.match(stream.read(_HEAD)) is not None
    except OSError:
        return False


# Folders.


def _in_folder(folder: Path, home: Path) -> Inputs | None:
    """The run or the runs below a folder, else its windows; None if it is a window itself."""
    runs = list(_run_folders(folder, 0))
    if not runs and _is_window(folder):
        return None
    if runs := runs or list(_run_folders(folder, _DEPTH)):
        return _of_run_folders({run: home / run.relative_to(folder) for run in runs})
    windows = list(_window_folders(folder, _DEPTH)) or [folder]  # which says why it has none
    return _together([_windows([window], folder, home) for window in windows])


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folders of runs, once each: `latest` is a link to one of them."""
    if any((folder / name).is_file() for name in (RESULTS, JOURNAL, RUN_FILE)):
        yield folder
    elif depth:
        for below in _folders(folder):
            yield from _run_folders(below, depth - 1)


def _is_window(folder: Path) -> bool:
    from pytest_sglprof._trace.paths import window_files

    try:
        return bool(window_files(folder))
    except NotATrace:
        return False


def _window_folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folder itself if it holds traces, else those below that do."""
    if _is_window(folder):
        yield folder
    elif depth:
        for below in _folders(folder):
            yield from _window_folders(below, depth - 1)


def _folders(folder: Path) -> list[Path]:
    """Without links, and without hidden folders, except that of pytest's runs."""
    return [
        path
        for path in sorted(folder.iterdir())
        if (path.name[0] != "." or path.name == ".sglprof")
        if path.is_dir() and not path.is_symlink()
    ]


# Runs.


def _of_run_folders(homes: Mapping[Path, Path]) -> Inputs:
    """Several runs. homes: of each folder. Those that left nothing are passed over with a note."""
    parts, refusals = [], []
    for folder, home in homes.items():
        try:
            has_ended = (folder / RESULTS).is_file()
            part = _run(folder / RESULTS, home) if has_ended else _interrupted(folder, home)
            parts.append(part)
        except NotATrace as error:
            refusals.append(error)
    if not parts:
        raise refusals[0]
    return replace(_together(parts), notes=tuple(error.what for error in refusals))


def _run(results: Path, home: Path) -> Inputs:
    from pytest_sglprof._report.results import load_results

    run = RecordedRun(results, results.parent, home, load_results(results))
    return Inputs(runs=(run,), windows=tuple(_judged(run)))


def _judged(run: RecordedRun) -> Iterator[InputWindow]:
    from pytest_sglprof._report.stored import heads_of

    for window in heads_of(run.document):
        yield InputWindow(window.id, run.folder, run.home, run=run, window=window)


def _interrupted(folder: Path, home: Path) -> Inputs:
    """A run that was killed, or has not ended: its finished tests, and files of the other."""
    from pytest_sglprof._run.interrupted import interrupted_results

    document = interrupted_results(folder)
    run = RecordedRun(folder / JOURNAL, folder, home, document)
    known = {window.id for window in document.windows}
    unjudged = [
        replace(window, run=run)
        for each in sorted((folder / "windows").glob("*"))
        if each.is_dir() and each.name not in known
        for window in _readable(each, folder, home)
    ]
    if not known and not unjudged and not document.tests:
        raise NotATrace(
            f"the run in {folder} has no {RESULTS}, and left no window",
            expected=f"{RESULTS}, or windows with traces",
            hint="wait for its end, or run it again",
        )
    return Inputs(runs=(run,), windows=(*_judged(run), *unjudged))


def _readable(folder: Path, root: Path, home: Path) -> tuple[InputWindow, ...]:
    try:
        return _windows([folder], root, home).windows
    except NotATrace:
        return ()


# Traces.


def _of_archive(folder: Path, archive: Path) -> Inputs:
    """The windows of traces that lie in an archive itself, under its name."""
    windows = _windows([folder], folder, archive.absolute().parent).windows
    stem = archive.name.removesuffix(".zip")
    return Inputs(
        windows=tuple(replace(each, id=stem) if len(windows) == 1 else each for each in windows)
    )


def _of_traces(paths: Sequence[Path]) -> list[Inputs]:
    """Files, and folders of traces: one window if each folder has ranks of its own.

    What does not exist is left to who reads it: a wrong option is a mistake that comes first.
    """
    if missing := [path for path in paths if not path.exists()]:
        home = _folder_of(missing[0])
        return [Inputs(windows=(InputWindow(missing[0].name, home, home, tuple(paths)),))]
    folders = [path for path in paths if path.is_dir()]
    files = [path for path in paths if path not in folders]
    groups = [[*files, *folders]]
    if folders and len(paths) > 1 and not _have_own_ranks(paths):
        groups = [files, *([folder] for folder in folders)]
    places = [(group, _folder_of(group[0])) for group in groups if group]
    return [_windows(group, place, place) for group, place in places]


def _folder_of(path: Path) -> Path:
    return path.absolute() if path.is_dir() else path.absolute().parent


def _have_own_ranks(paths: Sequence[Path]) -> bool:
    """Whether each file names its rank or node, which no other path names."""
    from pytest_sglprof._trace.paths import window_files

    files = {path: window_files(path) for path in paths}
    ranks = named_ranks(file for each in files.values() for file in each)
    names = [
        {node_in_name(file) or (ranks[file].rank.label if file in ranks else "") for file in each}
        for each in files.values()
    ]
    times = Counter(name for each in names for name in each)
    return "" not in times and max(times.values()) == 1


def _windows(paths: Sequence[Path], root: Path, home: Path) -> Inputs:
    """What belongs together as a window, or as one of each profile id. Raises `NotATrace`."""
    from pytest_sglprof._trace.paths import window_files

    files = window_files(paths)
    by_profile: dict[str, list[Path]] = {}
    for file in files:
        by_profile.setdefault(_profile_of(file), []).append(file)
    if "" not in by_profile and _repeat_ranks(by_profile.values()):
        named = by_profile.items()
        return Inputs(windows=tuple(InputWindow(id, root, home, tuple(of)) for id, of in named))
    return Inputs(windows=(InputWindow(_name_of(paths, files), root, home, tuple(paths)),))


def _profile_of(file: Path) -> str:
    """The profile id in a name that SGLang gave; "" for other names."""
    place = NAME_PATTERNS[0].pattern.search(file.name)
    return file.name[: place.start()] if place else ""


def _repeat_ranks(profiles: Collection[Sequence[Path]]) -> bool:
    """Whether a rank wrote the same stage under several profile ids: then each is a window."""
    names = [
        {file.name[len(_profile_of(file)) :].partition(".")[0] for file in files}
        for files in profiles
    ]
    return sum(map(len, names)) > len(set().union(*names))


def _name_of(paths: Sequence[Path], files: Sequence[Path]) -> str:
    """The folder's name, that of a single file, or the profile id of several."""
    if len(paths) == 1 and paths[0].is_dir():
        return paths[0].absolute().name
    if len(files) == 1:
        name = FILE_END.sub("", files[0].name)
        return name.removesuffix(".nsys-rep").removesuffix(".sqlite")
    profiles = {_profile_of(file) for file in files}
    return (profiles.pop() if len(profiles) == 1 else "") or _folder_of(files[0]).name


def _with_unique_ids(windows: Sequence[InputWindow]) -> tuple[InputWindow, ...]:
    """Files alone whose ids are equal get the name of the folder above, else a number."""
    count = Counter(window.id for window in windows)
    unique: list[InputWindow] = []
    for window in windows:
        name = window.id
        if count[name] > 1 and window.window is None:
            name = f"{_folder_of(window.paths[0]).parent.name}/{name}"
            used = {each.id for each in unique}
            number = next(n for n in range(1, len(windows) + 2) if _numbered(name, n) not in used)
            name = _numbered(name, number)
        unique.append(replace(window, id=name))
    return tuple(unique)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"
