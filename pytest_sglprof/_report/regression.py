"""A window against the accepted server lives of its baseline, as a document holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from pytest_sglprof._analysis.certainty import Amount, Count
from pytest_sglprof._analysis.lives import floor_ratio, upper_factor
from pytest_sglprof._analysis.scan import KernelChange
from pytest_sglprof._baselines.figures import Figure
from pytest_sglprof._baselines.nights import night_changes, night_values
from pytest_sglprof._baselines.records import AcceptedLife, Floor, LifeRecord
from pytest_sglprof._metrics import METRICS, VerdictWord
from pytest_sglprof._verdict.kernel_news import OneSided
from pytest_sglprof._verdict.life_words import figure_label
from pytest_sglprof._verdict.regression import Against, JudgedFigure, LivesVerdict
from pytest_sglprof._verdict.wording import count, percent

MAX_NIGHTS = 400  # earlier lives that a document holds, the last ones
_COMMIT = 7  # letters of a commit that are shown


class RecordedLife(msgspec.Struct, frozen=True, kw_only=True):
    """A server life that is compared. life: its name, or the id of its record.

    run: that recorded it. version: of SGLang, with its commit where that is known. is_level:
    whether it counts for the mean; earlier levels give the variance alone. begins_level: a level
    began with it, which `reason` explains. accepted: when; "" where it is not accepted.
    """

    life: str
    run: str
    recorded: str
    host: str
    version: str
    is_level: bool
    begins_level: bool
    reason: str
    accepted: str
    verdict: VerdictWord | None


class RecordedFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of each life, and what follows from them.

    name: a scope, a category, `pass_wall`, `idle_share` or a metric of the load. accepted, fresh,
    history: one value for each life of those in `RecordedRegression`, None where a life has none:
    ns a step, a share, or as the load driver has it. before, now: what is typical of accepted and
    of new lives. ratio: how many times as bad (see `cost`); surely above `low` and below `high`.
    limit: of the ratio, or of the figure itself; None where it is shown only. pass_bound: what a
    ratio that passes is surely below. sd: of the logarithm between lives. detects: the ratio that
    so many lives see. changes: indices of `history` at which a new level begins.
    """

    name: str
    stage: str
    kernel: str
    accepted: tuple[float | None, ...]
    fresh: tuple[float | None, ...]
    history: tuple[float | None, ...]
    changes: tuple[Count, ...]
    before: float | None
    now: float | None
    ratio: Amount | None
    low: Amount | None
    high: Amount | None
    limit: float | None
    limit_of: Literal["ratio", "figure"]
    pass_bound: float | None
    sd: Amount | None
    detects: Amount | None
    verdict: VerdictWord | None
    reason: str

    @property
    def figure(self) -> Figure:
        """What is compared."""
        return Figure(self.name, self.kernel, self.stage)


class RecordedKernelChange(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel of the scan, and its calls a step. The scan judges nothing."""

    change: KernelChange
    before_calls: Amount | None
    now_calls: Amount | None


class RecordedKernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel that only accepted lives, or only new ones have. ns: of a step."""

    category: str
    name: str
    ns: Amount


class RecordedRegression(msgspec.Struct, frozen=True, kw_only=True):
    """A window against its baseline.

    file: name of the baseline's file; exists: whether it was there. accepted, fresh: the lives,
    the oldest first. history: lives of all nights, accepted or not, the oldest first.
    confirming: how many of the new lives were started to confirm. sentence: the verdict, or what
    was done with a first night. not_comparable: field and both values, else "". floor: of the
    machine (A/A); floor_sentence, detection: what it means, and what so many lives see.
    figures: the judged ones first. scanned: kernels of the scan; not_scanned: why there was
    none, else "". kernels: those listed, the most lost time first. findings: sentences about
    kernels that appeared, vanished or changed their calls.
    """

    file: str
    exists: bool
    accepted: tuple[RecordedLife, ...]
    fresh: tuple[RecordedLife, ...]
    history: tuple[RecordedLife, ...]
    confirming: Count
    sentence: str
    not_comparable: str
    floor: Floor | None
    floor_sentence: str
    detection: str
    figures: tuple[RecordedFigure, ...]
    scanned: Count
    not_scanned: str
    kernels: tuple[RecordedKernelChange, ...]
    appeared: tuple[RecordedKernel, ...]
    vanished: tuple[RecordedKernel, ...]
    findings: tuple[str, ...]


def regression_document(
    verdict: LivesVerdict,
    against: Against,
    *,
    accepted: Sequence[AcceptedLife] = (),
    history: Sequence[LifeRecord] = (),
) -> RecordedRegression:
    """A verdict on lives as a document holds it.

    accepted: what the baseline holds, with dates and reasons. history: lives of earlier runs with
    the same key, the oldest first; the last 400 are kept.
    """
    of_baseline = {each.record.life: each for each in accepted}
    level = max((each.level for each in verdict.accepted), default=0)
    fresh = {each.life for each in verdict.fresh}
    by_life = {each.life: each for each in history if each.life not in fresh}
    earlier = [*by_life.values()][-MAX_NIGHTS:]
    nights = [*earlier, *verdict.fresh]
    # A new life has the verdict on all of them, whatever its own record said before.
    new = tuple(replace(_life(each, {}), verdict=verdict.word) for each in verdict.fresh)
    return RecordedRegression(
        file=against.file,
        exists=against.exists,
        accepted=tuple(
            _life(each.record, of_baseline, is_level=each.level == level)
            for each in verdict.accepted
        ),
        fresh=new,
        history=(*(_life(each, of_baseline) for each in earlier), *new),
        confirming=max(0, len(verdict.fresh) - 1),
        sentence=verdict.sentence,
        not_comparable=against.problem,
        floor=against.floor,
        floor_sentence=_floor_sentence(against.floor, verdict.figures),
        detection=verdict.detection,
        figures=tuple(_figure(each, verdict, nights) for each in verdict.figures),
        scanned=verdict.kernels.scanned,
        not_scanned=verdict.kernels.not_scanned,
        kernels=tuple(_changes(verdict)),
        appeared=tuple(map(_kernel, verdict.kernels.appeared)),
        vanished=tuple(map(_kernel, verdict.kernels.vanished)),
        findings=verdict.kernels.findings,
    )


def version_of(record: LifeRecord) -> str:
    """`0.5.23 (b88f031)`: of SGLang, with its commit where that is known."""
    known = record.provenance
    version, commit = known.versions.get("sglang", ""), known.commit[:_COMMIT]
    return f"{version} ({commit})".strip() if commit else version


def _life(
    record: LifeRecord, accepted: Mapping[str, AcceptedLife], *, is_level: bool = True
) -> RecordedLife:
    known = accepted.get(record.life)
    return RecordedLife(
        life=record.life,
        run=record.run,
        recorded=record.recorded,
        host=record.provenance.host,
        version=version_of(record),
        is_level=is_level,
        begins_level=known is not None and known.begins_level,
        reason="" if known is None else known.reason,
        accepted="" if known is None else known.accepted,
        verdict=record.verdict,
    )


def _figure(
    judged: JudgedFigure, verdict: LivesVerdict, nights: Sequence[LifeRecord]
) -> RecordedFigure:
    figure, threshold, change = judged.figure, judged.threshold, judged.change
    is_ratio = threshold is None or METRICS[threshold.metric].of == "lives"
    ends = judged.ends if is_ratio and judged.ends is not None else change and change.ends()
    values = night_values(nights, figure)
    return RecordedFigure(
        name=figure.name,
        stage=figure.stage,
        kernel=figure.kernel,
        accepted=judged.accepted or (None,) * len(verdict.accepted),
        fresh=judged.fresh or (None,) * len(verdict.fresh),
        history=tuple(values),
        changes=night_changes(values),
        before=judged.before,
        now=judged.now,
        ratio=change.ratio if change else None,
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        limit=threshold.limit if threshold is not None else None,
        limit_of="ratio" if is_ratio else "figure",
        pass_bound=METRICS[threshold.metric].pass_bound(threshold.limit)
        if threshold is not None and is_ratio
        else None,
        sd=change.sd if change else None,
        detects=judged.detects,
        verdict=judged.word,
        reason=judged.reason,
    )


def _floor_sentence(floor: Floor | None, figures: Sequence[JudgedFigure]) -> str:
    """Of the first figure whose noise between lives of one version (A/A) is known."""
    for each in figures:
        label = figure_label(each.figure)
        if floor is None or each.change is None or label not in floor.sd:
            continue
        sd = floor.sd[label]
        level = each.change.of_level or each.change.accepted
        reach = floor_ratio(sd, floor.lives, accepted=level, fresh=each.change.fresh)
        lives = count(floor.lives, "life", "lives")
        most = percent(sd * upper_factor(floor.lives), 1)
        return (
            f"lives of one version differ by sd {percent(sd, 1)} in {label} on {floor.host} "
            f"({lives}, A/A of {floor.measured[:10]}; at most {most}), so by chance by up to "
            f"{percent(reach - 1, 1, sign=True)} here: no smaller limit can be judged"
        )
    return ""


def _changes(verdict: LivesVerdict) -> list[RecordedKernelChange]:
    news = verdict.kernels
    return [
        RecordedKernelChange(change=change, before_calls=before, now_calls=now)
        for change, (before, now) in zip(news.changes, news.calls, strict=True)
    ]


def _kernel(one: OneSided) -> RecordedKernel:
    return RecordedKernel(category=one.category, name=one.name, ns=one.ns)
