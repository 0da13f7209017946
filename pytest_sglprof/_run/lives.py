"""The new server lives of one test, and the accepted ones that they are compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from msgspec.structs import replace as struct_replace

from pytest_sglprof._analysis.lives import FAIL_ALPHA, MIN_LIVES
from pytest_sglprof._baselines.history import read_history
from pytest_sglprof._baselines.load import load_figures
from pytest_sglprof._baselines.making import asked_for
from pytest_sglprof._baselines.records import (
    REGRESSION,
    Baseline,
    BaselineKey,
    LifeRecord,
    LoadFigures,
)
from pytest_sglprof._baselines.store import (
    HAS_BASELINE,
    IS_ACCEPTED,
    BaselineError,
    BaselineFolder,
    usable_lives,
)
from pytest_sglprof._errors import SglprofError
from pytest_sglprof._metrics import VerdictWord, worst_word
from pytest_sglprof._report.model import (
    RecordedServer,
    RecordedWindow,
    storable,
    utc,
)
from pytest_sglprof._verdict.regression import (
    Against,
    JudgedFigure,
    KnownLife,
    LifeCase,
    LivesVerdict,
    bad_night,
    judge_lives,
    unconfirmed,
)
from pytest_sglprof._verdict.wording import count

if TYPE_CHECKING:
    from pytest_sglprof._bench_serving.command import LoadResult
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import Threshold
    from pytest_sglprof._run.folder import RunBook
    from pytest_sglprof._server.launch import Server

SHOWN = 5  # lives that were not accepted, named in the summary


@dataclass(frozen=True)
class NewLife:
    """What one attempt left of one of its windows. record: None where it was not complete.

    window: name of the window. thresholds: of lives and of the load.
    """

    window: str
    record: LifeRecord | None
    thresholds: tuple[Threshold, ...]


class KnownLives:
    """Accepted lives and those of earlier runs: read when they are needed, the latter once."""

    def __init__(self, settings: Settings, run_id: str) -> None:
        self.settings = settings
        self.run_id = run_id
        self._folder = BaselineFolder(settings.baselines) if settings.baselines else None
        self._history: list[LifeRecord] | None = None

    def past(self, key: BaselineKey) -> list[LifeRecord]:
        """Lives of this key in earlier runs, the oldest first."""
        if self._history is None:
            self._history = read_history(self.settings.output)
        return [each for each in self._history if each.key == key and each.run != self.run_id]

    def bad_nights(self, key: BaselineKey) -> int:
        """How many runs in a row before this one failed by regression."""
        bad: dict[str, bool] = {}
        for record in self.past(key):
            bad[record.run] = bad.get(record.run, False) or REGRESSION in record.failed
        return next(
            (at for at, is_bad in enumerate(reversed(bad.values())) if not is_bad), len(bad)
        )

    def against(self, fresh: Sequence[LifeRecord]) -> Against:
        """The accepted lives of the key of these lives, which must all have the same one."""
        if self._folder is None:
            return Against()
        if not fresh:
            return Against(problem="no new life has a complete window of it")
        file = fresh[0].key.file_name
        if other := next((each for each in fresh if each.key != fresh[0].key), None):
            parts = "; ".join(differences(fresh[0], other))
            return Against(file, problem=f"windows of one name in new lives differ: {parts}")
        try:
            baseline = self._folder.find(fresh[0].key)
            if baseline is None:
                return Against(file, problem=self._other_key(self._folder, fresh[-1]))
        except BaselineError as error:
            return Against(file, exists=True, problem=error.what)
        lives = self._usable(baseline, fresh)
        accepted = len({each.record.life for each in baseline.lives})
        return Against(file, True, lives, baseline.floor, accepted=accepted)

    def _usable(self, baseline: Baseline, fresh: Sequence[LifeRecord]) -> tuple[KnownLife, ...]:
        level, accepted = 0, {}
        for life in baseline.lives:
            level += life.begins_level
            accepted[life.record.id] = KnownLife(life.record, level, life)
        usable = usable_lives(
            baseline,
            now=datetime.now(timezone.utc),
            min_age_days=self.settings.min_age_days,
            min_age_lives=self.settings.min_age_lives,
        )
        kept = {each.record.id for each in usable}
        # A level that was accepted on purpose is never too young: those before it are not normal.
        kept.update([life.record.id for life in baseline.lives if life.begins_level][-1:])
        new = {record.life for record in fresh}  # an attached server lives through several runs
        return tuple(
            each for name, each in accepted.items() if name in kept and each.record.life not in new
        )

    def _other_key(self, folder: BaselineFolder, record: LifeRecord) -> str:
        """What differs from the nearest baseline of this window; "" if there is none."""
        known = [
            baseline
            for baseline in folder.nearest(record.key.test, record.key.window)
            if len(baseline.lives) >= MIN_LIVES
        ]
        if not known:
            return ""
        nearest = min(known, key=lambda each: len(differences(each.lives[-1].record, record)))
        parts = differences(nearest.lives[-1].record, record)
        return f"not comparable with {nearest.key.file_name}: {'; '.join(parts)}"


class TestLives:
    """All new lives of one test in this run: of the first attempt, confirming ones, reruns.

    A rerun adds its life to the others, so that it cannot clear what they show.
    """

    __test__ = False  # pytest must not collect it

    def __init__(self, known: KnownLives) -> None:
        self.cases: dict[str, LifeCase] = {}  # by the name of the window
        self.verdicts: dict[str, LivesVerdict] = {}
        self._attempts = 0
        self._known = known
        self._settings = known.settings

    @property
    def count(self) -> int:
        """How many new lives there are so far."""
        lives = {record.life for case in self.cases.values() for record in case.fresh}
        return len(lives)

    def add(self, new: Sequence[NewLife]) -> None:
        """Adds what an attempt left."""
        self._attempts += 1
        for life in new:
            before = self.cases.get(life.window, LifeCase((), Against()))
            thresholds = dict.fromkeys((*before.thresholds, *life.thresholds))
            records = () if life.record is None else (life.record,)
            self.cases[life.window] = LifeCase(
                (*before.fresh, *records), before.against, tuple(thresholds)
            )
        self.cases = {name: self._with_baseline(case) for name, case in self.cases.items()}

    def judge(self, *, can_confirm: bool, is_over: bool) -> bool:
        """Sets `verdicts`; True if a further life is needed to decide.

        can_confirm: whether the server can be started again. is_over: no further life follows, in
        any case. Where a figure is beyond its limit in the first life, the verdict is that of all
        lives together, at α over the number of looks.
        """
        looks = self._settings.confirm if can_confirm else 0
        is_over = is_over or self._attempts > looks  # also where lives left nothing to compare
        confirming = self.count - 1
        if not looks or confirming < 1:
            verdicts = self._judged(FAIL_ALPHA)
            if not looks or not any(each.is_beyond for each in verdicts.values()):
                self._set(verdicts)
                return False
            self._set({name: unconfirmed(each) for name, each in verdicts.items()})
            return not is_over
        verdicts = self._judged(FAIL_ALPHA / looks)
        self._set(verdicts)
        has_failed = any(each.word == "fail" for each in verdicts.values())
        is_open = not has_failed and any(each.is_open for each in verdicts.values())
        return is_open and not is_over

    def check(self, new: NewLife) -> JudgedFigure:
        """The first threshold of a window, judged by this life alone; it is not kept."""
        fresh = () if new.record is None else (new.record,)
        case = self._with_baseline(LifeCase(fresh, Against(), new.thresholds[:1]))
        (verdict,) = judge_lives([case], required=self._required)
        return verdict.figures[0]

    def records(
        self,
        windows: Sequence[RecordedWindow],
        server: Server,
        described: RecordedServer,
        loads: Mapping[str, Sequence[str]],
        *,
        has_failed: bool,
    ) -> list[LifeRecord]:
        """What the windows of one attempt leave of their server life.

        loads: the commands of the attempt's loads, by their ids. has_failed: the body of the test
        raised, so that nobody may accept it.
        """
        from pytest_sglprof._report.lives import life_record, repeated

        records = [
            life_record(
                together,
                described,
                loads,
                run=self._known.run_id,
                spec=server.spec,
                info=server.info,
                load=_load_before(server.loads, together[0], loads),
            )
            for together in repeated(windows)
        ]
        return [self._finished(record, has_failed) for record in records if record is not None]

    def _finished(self, record: LifeRecord, has_failed: bool) -> LifeRecord:
        verdict = self.verdicts.get(record.key.window)
        if verdict is not None and verdict.is_tolerated:
            record = struct_replace(record, verdict="fail", failed=(*record.failed, REGRESSION))
        if has_failed:
            why = (*record.not_acceptable, "its test failed by itself")
            record = struct_replace(record, not_acceptable=why)
        return record

    def merged(self, windows: Sequence[RecordedWindow]) -> list[RecordedWindow]:
        """The windows of one attempt, with the verdicts on all lives."""
        return [self._merged(window) for window in windows]

    def _merged(self, window: RecordedWindow) -> RecordedWindow:
        verdict, case = self.verdicts.get(window.name), self.cases.get(window.name)
        if verdict is None or case is None or not (case.thresholds or case.against.file):
            return window
        from pytest_sglprof._report.regression import regression_document

        reasons = [(verdict.word, verdict.sentence)] if case.thresholds else []
        word, reason = _worst((window.verdict, window.reason), *reasons)
        decisive = window.decisive
        if verdict.deciding is not None and (decisive is None or window.verdict != word):
            decisive = len(window.judgements) + verdict.deciding
        recorded = regression_document(
            verdict,
            case.against,
            accepted=[each.accepted for each in case.against.lives if each.accepted is not None],
            history=self._known.past(case.fresh[0].key) if case.fresh else (),
        )
        return storable(
            struct_replace(
                window,
                verdict=word or window.verdict,
                reason=reason,
                judgements=(*window.judgements, *verdict.judgements),
                decisive=decisive,
                regression=recorded,
            )
        )

    def together(self, word: VerdictWord | None, reason: str) -> tuple[VerdictWord | None, str]:
        """The verdict of a test on all its lives. word, reason: of one attempt without others."""
        of_lives = [
            (verdict.word, f"{name}: {verdict.sentence}")
            for name, verdict in self.verdicts.items()
            if verdict.sentence and self.cases[name].thresholds
        ]
        return _worst((word, reason), *of_lives, between="\n")

    @property
    def _required(self) -> bool:
        return self._settings.require_baseline

    def _judged(self, alpha: float) -> dict[str, LivesVerdict]:
        verdicts = judge_lives([*self.cases.values()], alpha=alpha, required=self._required)
        return dict(zip(self.cases, verdicts, strict=True))

    def _set(self, verdicts: dict[str, LivesVerdict]) -> None:
        after = self._settings.fail_after
        if after > 1:
            for name, verdict in verdicts.items():
                if fresh := self.cases[name].fresh:
                    nights = 1 + self._known.bad_nights(fresh[0].key)
                    verdicts[name] = bad_night(verdict, nights, after)
        self.verdicts = verdicts

    def _with_baseline(self, case: LifeCase) -> LifeCase:
        return replace(case, against=self._known.against(case.fresh))


def _worst(
    *verdicts: tuple[VerdictWord | None, str], between: str = "; "
) -> tuple[VerdictWord | None, str]:
    """The word that decides, and the reasons of those that have it, or have none."""
    word = worst_word({each for each, _ in verdicts})
    reasons = [text for each, text in verdicts if text and (each == word or each is None)]
    return word, between.join(dict.fromkeys(reasons))


def _load_before(
    results: Sequence[LoadResult], window: RecordedWindow, loads: Mapping[str, Sequence[str]]
) -> LoadFigures | None:
    """The last load before the first window of this life, of the shape that the window had.

    Without a load of its own, a window has the last one of any shape.
    """
    command = loads.get(window.load or "")
    shape = None if command is None else asked_for(command)
    alike = [each for each in results if shape is None or asked_for(each.command) == shape]
    return load_figures(alike[-1]) if alike else None


def differences(before: LifeRecord, now: LifeRecord) -> list[str]:
    """`gpu: A100 before, H100 now`: the parts of the keys of two lives that differ."""
    parts = []
    for name in BaselineKey.__struct_fields__:
        old, new = getattr(before.key, name), getattr(now.key, name)
        if old == new:
            continue
        if name == "server":
            parts += _options("server", before.provenance.options, now.provenance.options)
        elif name == "load":
            parts += _options("load", before.provenance.load, now.provenance.load)
        elif isinstance(old, dict):
            parts += _options(name, old, new)
        else:
            parts.append(f"{name}: {_shown(old)} before, {_shown(new)} now")
    return parts


def _options(of: str, old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    return [
        f"{of} {name}: {_shown(old.get(name))} before, {_shown(new.get(name))} now"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]


def _shown(value: object) -> str:
    if value is None:
        return "not given"
    return "set" if value == "" else str(value)


def accept_lives(settings: Settings, book: RunBook) -> None:
    """Accepts what may be accepted of the lives of a run, and notes what became of them."""
    if settings.baselines is None or not settings.accept:
        return
    folder = BaselineFolder(settings.baselines)
    try:
        done = folder.accept(
            book.lives, mode=settings.accept, keep=settings.keep_lives, now=utc(time.time())
        )
    except SglprofError as error:  # it cannot be written, or another run holds the lock
        book.problems.append(f"no life was accepted: {error.what}")
        return
    taken = [each for each in done if not each.refused]
    new = len({each.file for each in taken if each.is_new})
    of_new = f", {count(new, 'new baseline')}" if new else ""
    book.notes.append(
        f"baselines: {count(len(taken), 'life', 'lives')} accepted into {folder.path}{of_new}"
    )
    refused = [each for each in done if each.refused not in ("", HAS_BASELINE, IS_ACCEPTED)]
    for each in refused[:SHOWN]:
        test = f'{each.record.key.test} window "{each.record.key.window}"'
        book.notes.append(f"  not accepted: {test}: {each.refused}")
    if (more := len(refused) - SHOWN) > 0:
        book.notes.append(f"  and {more} more that were not accepted")
