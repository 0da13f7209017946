"""A folder of baselines: one sorted, indented JSON file a key, nothing else.

Git, an artifact or `aws s3 sync` carry it. A run writes there only when it is asked to. Files
that cannot be read are reported and never overwritten; those that can are replaced whole, under a
lock that lies outside of the folder.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from pytest_sglprof._baselines.figures import shared
from pytest_sglprof._baselines.records import (
    RECORD_FORMAT,
    REGRESSION,
    AcceptedLife,
    Baseline,
    BaselineKey,
    Floor,
    LifeRecord,
    digest_of,
)
from pytest_sglprof._errors import SglprofError
from pytest_sglprof._files import atomic_write, json_text
from pytest_sglprof._limits import UNDECODABLE, read_bytes, why_undecodable
from pytest_sglprof._server import lease

Mode = Literal["new", "all"]
KEEP = 20  # lives of a key
LOCK_SECONDS = 60.0  # s to wait for another process that accepts
HAS_BASELINE = "its key has a baseline already"
IS_ACCEPTED = "this server life is accepted already"
_TEMPORARY = re.compile(r"\..+\.json\..+")


class BaselineError(SglprofError):
    """A baseline cannot be read or written."""


class Accepted(NamedTuple):
    """What became of one record. refused: why it was not accepted; "" if it was.

    file: of its key, whether or not it is there. is_new: the key had no baseline before.
    """

    record: LifeRecord
    file: Path
    refused: str
    is_new: bool = False


class UsableLife(NamedTuple):
    """A life to compare with. is_level: it counts for the mean too, not for the variance alone."""

    record: LifeRecord
    is_level: bool


class Pruned(NamedTuple):
    """What `prune` removed: all of a file, or the oldest of its lives. why: in words."""

    file: Path
    lives: int
    is_whole: bool
    why: str


def usable_lives(
    baseline: Baseline, *, now: datetime, min_age_days: float = 0.0, min_age_lives: int = 0
) -> list[UsableLife]:
    """The lives to which a new one is compared, the oldest first.

    min_age_days: only lives that were recorded so long before `now`. min_age_lives: without as
    many of the newest. Both keep a baseline from following a slow drift.
    """
    starts = [at for at, life in enumerate(baseline.lives) if life.begins_level]
    level = starts[-1] if starts else 0
    youngest = now - timedelta(days=min_age_days)
    known = baseline.lives[: max(0, len(baseline.lives) - min_age_lives)]
    return [
        UsableLife(life.record, at >= level)
        for at, life in enumerate(known)
        if not min_age_days or moment(life.record.recorded) <= youngest
    ]


def moment(text: str) -> datetime:
    """What `utc` wrote, with its time zone. Raises `BaselineError` for any other text."""
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise BaselineError(
            f"a server life was recorded at {text[:40]!r}, which is no time",
            expected="a time such as 2026-11-24T06:08:42Z",
            hint="correct the record, or remove it",
        ) from error
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def why_refused(record: LifeRecord, reason: str = "") -> str:
    """Why a life must not be accepted; "" if it may be. reason: given for accepting it."""
    if record.not_acceptable:
        return "; ".join(record.not_acceptable)
    if record.apart:
        return f"it is kept apart: {record.apart}"
    others = [metric for metric in record.failed if metric != REGRESSION]
    if others:
        return f"it failed by {', '.join(others)}"
    if record.failed and not reason:
        return "it failed by regression, which is accepted with a reason only"
    if record.verdict == "fail" and not record.failed:
        return "it failed"
    if record.verdict == "inconclusive" and not reason:
        return "it could not be compared, and is accepted with a reason only"
    return ""


class BaselineFolder:
    """The baselines of a folder, which need not exist before the first life is accepted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._problems: dict[str, None] = {}

    @property
    def problems(self) -> tuple[str, ...]:
        """What was found wrong with files of the folder so far, a line each."""
        return tuple(self._problems)

    def find(self, key: BaselineKey) -> Baseline | None:
        """The baseline of a key, None without one. Raises `BaselineError` if it cannot be read."""
        return self._read(self.path / key.file_name)

    def nearest(self, test: str, window: str) -> list[Baseline]:
        """The baselines of a window of a test, whatever else is in their keys."""
        return [each for each in self.list() if (each.key.test, each.key.window) == (test, window)]

    def list(self) -> Sequence[Baseline]:
        """Every baseline that can be read, by the names of their files; see `problems`."""
        return [baseline for _, baseline in self._each()]

    def unused(self, keys: Iterable[BaselineKey]) -> tuple[Path, ...]:
        """The files of baselines whose key is none of these."""
        names = {key.file_name for key in keys}
        return tuple(file for file, _ in self._each() if file.name not in names)

    def accept(
        self,
        records: Sequence[LifeRecord],
        *,
        reason: str = "",
        mode: Mode = "all",
        keep: int = KEEP,
        new_level: bool = False,
        now: str = "",
    ) -> tuple[Accepted, ...]:
        """Adds those of the lives that may be accepted; what became of each, in their order.

        mode: "new" takes lives of keys without a baseline only. reason: accepts those that failed
        only by `regression` too; the first of them of each key begins a new level. new_level: the
        first life of each key begins one although it passed. keep: the newest lives that stay.
        now: as text.
        Raises `BaselineError` if a file cannot be written; what was written before stays.
        """
        by_file: dict[Path, list[int]] = {}
        for at, record in enumerate(records):
            by_file.setdefault(self.path / record.key.file_name, []).append(at)
        done: dict[int, Accepted] = {}
        with self._locked():
            for file, of_key in by_file.items():
                try:
                    before = self._read(file, for_writing=True)
                except BaselineError as error:
                    done |= {at: Accepted(records[at], file, error.what) for at in of_key}
                    continue
                known = () if before is None or mode == "all" else before.lives
                lives = _Lives(() if before is None else before.lives, is_closed=bool(known))
                for at in of_key:
                    refused = lives.add(records[at], reason=reason, now=now, begins=new_level)
                    done[at] = Accepted(records[at], file, refused, before is None)
                if lives.added:
                    floor = None if before is None else before.floor
                    key = records[of_key[0]].key
                    self._write(file, key, _newest(lives.lives, keep), floor)
        return tuple(done[at] for at in range(len(records)))

    def set_floor(self, key: BaselineKey, floor: Floor) -> None:
        """Writes what the machine shows between lives of one version beside the lives of a key."""
        file = self.path / key.file_name
        with self._locked():
            before = self._read(file, for_writing=True)
            self._write(file, key, () if before is None else before.lives, floor)

    def prune(
        self,
        *,
        keep: int | None = None,
        older_than: datetime | None = None,
        only: Iterable[Path] = (),
        runs: Collection[str] = (),
        dry_run: bool = False,
    ) -> tuple[Pruned, ...]:
        """Removes what no longer counts; files that cannot be read stay.

        keep: the newest lives of each key. older_than: baselines whose newest life was recorded
        before. only: baselines to remove whole. runs: ids of runs whose lives go. dry_run: says
        what would go.
        """
        unused = set(only)
        pruned = []
        with self._locked():
            for file, baseline in self._each(for_writing=True):
                left = _newest(_without(baseline.lives, runs), keep)
                newest = max((moment(life.record.recorded) for life in left), default=None)
                is_whole, why = False, f"{len(left)} stay{'s' if len(left) == 1 else ''}"
                if file in unused:
                    is_whole, why = True, "no run used it"
                elif older_than is not None and newest is not None and newest < older_than:
                    is_whole, why = True, f"its newest life is older than {older_than:%Y-%m-%d}"
                elif baseline.lives and not left and baseline.floor is None:
                    is_whole, why = True, "none of its lives stays"
                gone = len(baseline.lives) - (0 if is_whole else len(left))
                if is_whole or gone:
                    pruned.append(Pruned(file, gone, is_whole, why))
                if is_whole and not dry_run:
                    file.unlink(missing_ok=True)
                elif gone and not dry_run:
                    self._write(file, baseline.key, left, baseline.floor)
        return tuple(pruned)

    def _each(self, *, for_writing: bool = False) -> Iterator[tuple[Path, Baseline]]:
        """The files that can be read, with what they hold; the others become `problems`."""
        try:
            files = sorted(self.path.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed(self.path, "read", error) from error
        for file in files:
            if file.suffix == ".json" and not file.name.startswith("."):
                try:
                    baseline = self._read(file, for_writing=for_writing)
                except BaselineError as error:
                    self._problems[error.what] = None
                else:
                    if baseline is not None:
                        yield file, baseline

    def _read(self, file: Path, *, for_writing: bool = False) -> Baseline | None:
        """None where there is no such file. for_writing: it will be replaced."""
        try:
            text = read_bytes(file, error=BaselineError)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(file, "read", error) from error
        try:
            major, minor = msgspec.json.decode(text, type=_Head).format
            if major == RECORD_FORMAT[0] and not (for_writing and minor > RECORD_FORMAT[1]):
                baseline = msgspec.json.decode(text, type=Baseline)
                if baseline.key.file_name == file.name:
                    return baseline
                raise BaselineError(
                    f"baseline {file} holds the lives of another key",
                    expected=f"the name {baseline.key.file_name}",
                    hint="rename it, or remove it",
                )
        except UNDECODABLE as error:
            raise BaselineError(
                f"baseline {file} is damaged: {why_undecodable(error)}",
                expected="a file that pytest-sglprof wrote",
                hint="restore it (git checkout), or remove it",
            ) from error
        what = "which this version cannot read"
        if major == RECORD_FORMAT[0]:
            what = "newer than this version, which would lose a part of it"
        raise BaselineError(
            f"baseline {file} is of format {major}.{minor}, {what}",
            expected=f"format {RECORD_FORMAT[0]}.{RECORD_FORMAT[1]}",
            hint="use the version of pytest-sglprof that wrote it, or a later one"
            if (major, minor) > RECORD_FORMAT
            else "accept its lives anew, and remove it",
        )

    def _write(
        self, file: Path, key: BaselineKey, lives: Sequence[AcceptedLife], floor: Floor | None
    ) -> None:
        baseline = Baseline(format=RECORD_FORMAT, key=key, lives=tuple(lives), floor=floor)
        text = json_text(baseline, _is_one_line, is_sorted=True)
        try:
            atomic_write(file, text)
        except OSError as error:
            raise self._failed(file, "written", error) from error

    def _failed(self, file: Path, done: str, error: OSError) -> BaselineError:
        return BaselineError(
            f"baseline {file} cannot be {done}: {error.strerror or error}",
            expected=f"a folder {self.path} that can be {done}"
            + (", with free space" if done == "written" else ""),
            hint="what it held before is still there" if done == "written" else "",
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes of this user from writing, and removes what killed ones left."""
        name = f"baselines-{digest_of(os.path.realpath(self.path))}"
        held = lease.acquire(name, timeout=LOCK_SECONDS, what=f"the baselines in {self.path}")
        try:
            if self.path.is_dir():
                for entry in os.scandir(self.path):
                    if _TEMPORARY.fullmatch(entry.name):
                        os.unlink(entry.path)
            yield
        finally:
            held.release()


class _Head(msgspec.Struct):
    format: tuple[int, int]


class _Lives:
    """The lives of a key while others are added. is_closed: no other may be, but by a reason."""

    def __init__(self, lives: Sequence[AcceptedLife], *, is_closed: bool) -> None:
        self.lives = [*lives]
        self.added = 0
        self._has_begun = False
        self._is_closed = is_closed

    def add(self, record: LifeRecord, *, reason: str, now: str, begins: bool) -> str:
        """Adds a life, or returns why not."""
        if refused := why_refused(record, reason):
            return refused
        if self._is_closed:
            return HAS_BASELINE
        if any(record.life == each.record.life for each in self.lives):
            return IS_ACCEPTED
        if not reason and (why := self._why_unlike(record)):
            return f"it cannot be compared with the accepted lives: {why}"
        # Lives that are accepted together confirm each other: they are one level.
        begins_level = not self._has_begun and (bool(record.failed) or (begins and not self.added))
        life = AcceptedLife(
            record=record,
            accepted=now,
            reason=reason if begins_level or record.verdict in ("fail", "inconclusive") else "",
            begins_level=begins_level,
        )
        self.lives.append(life)
        self.added += 1
        self._has_begun |= begins_level
        return ""

    def _why_unlike(self, record: LifeRecord) -> str:
        """Why no later life could be compared with all of these and this one; "" if it could."""
        known = [life.record for life in self.lives]
        why = shared([*known, record]) if known and not isinstance(shared(known), str) else ""
        return why if isinstance(why, str) else ""


def _without(lives: Sequence[AcceptedLife], runs: Collection[str]) -> list[AcceptedLife]:
    """The lives of other runs. A level that began with one that goes begins with the next."""
    left: list[AcceptedLife] = []
    begins: AcceptedLife | None = None
    for life in lives:
        if life.record.run in runs:
            begins = life if life.begins_level else begins
        else:
            moved = begins is not None and not life.begins_level
            reason = begins.reason if begins is not None and moved else life.reason
            left.append(replace(life, begins_level=moved or life.begins_level, reason=reason))
            begins = None
    return left


def _newest(lives: Sequence[AcceptedLife], keep: int | None) -> list[AcceptedLife]:
    """The newest lives, the oldest first. A level that began with a life that goes stays begun."""
    ordered = sorted(lives, key=lambda life: (life.record.recorded, life.record.id))
    return ordered if keep is None else ordered[max(0, len(ordered) - keep) :]


def _is_one_line(value: Any) -> bool:
    """Numbers and names are, and lists of pairs of them: a life is added or removed as a whole."""
    parts = list(value.values()) if isinstance(value, dict) else value
    if isinstance(parts, msgspec.Struct):
        parts = msgspec.structs.astuple(parts)
    if not isinstance(parts, list | tuple):
        return True
    is_list = isinstance(value, list | tuple)
    return all(_is_scalar(each) or (is_list and _is_flat(each)) for each in parts)


def _is_flat(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_scalar, value))


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
