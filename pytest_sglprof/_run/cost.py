"""What a window costs (serving that stands still, disk, analysis), and how long one may be."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_sglprof._capture.recording import POLL, WindowCost
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.model import CERTAIN, WindowSpec
from pytest_sglprof._errors import WindowRefused
from pytest_sglprof._load.disturbance import SETTLED, Line, stall_of
from pytest_sglprof._load.samples import LoadSample
from pytest_sglprof._load.sources import LineReader
from pytest_sglprof._run.sampling import open_beside
from pytest_sglprof._verdict.wording import count

if TYPE_CHECKING:
    from pytest_sglprof._capture.recording import Progress
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._run.window import Window
    from pytest_sglprof._server.log import ServerLog

MIB = 2**20
LOG_BEFORE = MIB  # bytes of the log before a window: they tell how long a forward pass takes
LINES = 256  # of the log that are read at once
PROBE_STEPS = 3
MOST_PROBES = 3
GROWTH = 4.0  # x the longest window so far that the next may be, by a line through two of them
PROBE_SECONDS = 0.2  # of a window whose steps cannot be counted
# A window that is opened for what it costs alone, without what else was asked for.
_ALONE: dict[str, Any] = {
    "start_step": None,
    "delay": 0.0,
    "settle": 0.0,
    "profile_id": None,
    "repeat": 1,
    "max_time": None,
    "max_stall": None,
    "max_mib": None,
    "source_lines": False,
    "trigger": None,
    "ring": None,
    "thresholds": (),
}
MARGIN = 0.9  # of a limit that is made use of: windows of one length differ a little


@dataclass(frozen=True)
class PastWindow:
    """A window of this server whose cost is known, or will be once the log goes on.

    amount: steps, or s of one that is recorded by time. log_start: size of the log when it was
    opened, bytes.
    """

    amount: float
    written: int
    opened: float
    closed: float
    log_start: int


def cost_of(window: Window, analysis_s: float) -> WindowCost | None:
    """What a closed window has cost up to now; None for one that was never opened.

    analysis_s: how long it was read and judged.
    """
    if not window.was_opened:
        return None
    written, log, capture = written_by(window), window.server.log, window.capture
    stall = None
    if log is not None:
        stall = log_stall(log, window.log_start, capture.opened, capture.closed)
    return WindowCost(stall, written, written, analysis_s)


def written_by(window: Window) -> int:
    """Bytes of the files of a window."""
    paths = {artifact.path for artifact in window.capture.artifacts}
    total = 0
    for path in paths.union(window.folder.rglob("*")):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def log_stall(log: ServerLog, log_start: int, opened: float, closed: float) -> float | None:
    """For how long serving stood still for a window, s, by the numbered passes of the log.

    log_start: size of the log when it was opened, bytes. opened, closed: Unix s. See `stall_of`;
    None where the log has no such lines of the time before and after it.
    """
    reader, lines = LineReader(), defaultdict[str, list[Line]](list)
    text = log.each(max(0, log_start - LOG_BEFORE))
    while block := list(itertools.islice(text, LINES)):
        newest = 0.0
        for sample in reader.read(block):
            if isinstance(sample, LoadSample) and sample.iteration is not None:
                lines[sample.rank].append((sample.time, sample.iteration))
                newest = sample.time
        if newest > closed + SETTLED:
            break
    return stall_of(lines, opened, closed)


def remember(window: Window) -> None:
    """Keeps what a complete window of so many steps or seconds wrote, for its successors.

    Of windows of one length the newest.
    """
    capture, asked = window.capture, _asked(window.spec)
    if window.was_opened and capture.state == "complete" and asked is not None:
        past = PastWindow(
            asked, written_by(window), capture.opened, capture.closed, window.log_start
        )
        of_kind = window.server.past_windows.setdefault(_kind(window.spec), {})
        of_kind.pop(asked, None)  # so that the newest is the last
        of_kind[asked] = past


def sized(window: Window, settings: Settings, progress: Progress | None) -> WindowSpec:
    """The window's specification with as many steps or seconds as `max_stall`, `max_mib` allow.

    By the windows of its kind on this server before it; if there is none, by one of 3 steps, which
    is opened here and dropped. What a window costs however short it is shows only in two of them:
    where one allows fewer steps than it has, another one of 3 is opened, and where one of 3 allows
    too few for a verdict, another one of as many as it allows.
    Raises `WindowRefused` if too few steps are allowed for a verdict, or a cost is not known.
    """
    spec = window.spec
    asked = _asked(spec)
    if asked is None:
        raise WindowRefused(
            f"{_limits(spec)} for a window that is closed by hand",
            expected="num_steps or duration, which are then reduced where that is needed",
            hint="say how long the window is to be at most, or lift the limit for this one: "
            "max_stall=None, max_mib=None",
        )
    least = _least(spec, settings)
    if not _past(window) or (spec.max_stall is not None and set(_stalls(window)) == {None}):
        if progress is not None:
            progress(f"window {spec.name}: measuring what a short one costs")
        if not _probe(window, PROBE_STEPS):
            return spec  # opening it says which one is open
    allowed = _allowed(window)
    for _ in range(MOST_PROBES - 1):
        amounts = [past.amount for past in _past(window)]
        if not spec.num_steps or allowed >= asked:
            break
        if len(amounts) == 1 and allowed < amounts[0] and amounts[0] > 2 * PROBE_STEPS:
            _probe(window, PROBE_STEPS)  # a shorter one costs more than in proportion
        elif 2 * max(amounts) <= allowed < least:
            _probe(window, int(allowed))
        else:
            break
        allowed = _allowed(window)
    if allowed >= asked:
        return spec
    if allowed < least:
        raise _too_dear(window, allowed, least)
    return (
        replace(spec, num_steps=int(allowed)) if spec.num_steps else replace(spec, duration=allowed)
    )


def least_steps(spec: WindowSpec, settings: Settings) -> int:
    """Steps that one window needs: under `repeat="certain"` two or more of them are judged."""
    return math.ceil(settings.min_steps / 2) if spec.repeat == CERTAIN else settings.min_steps


def _least(spec: WindowSpec, settings: Settings) -> float:
    return float(least_steps(spec, settings)) if spec.num_steps else PROBE_SECONDS


def _asked(spec: WindowSpec) -> float | None:
    return spec.num_steps or spec.duration or BACKENDS[spec.backend].default_seconds


def _kind(spec: WindowSpec) -> tuple[object, ...]:
    """Windows of one kind write as much for a step."""
    return (
        spec.backend,
        bool(spec.num_steps),
        spec.activities,
        spec.with_stack,
        spec.record_shapes,
        spec.merge_profiles,
        spec.profile_by_stage,
        spec.profile_stages,
        spec.detailed_annotations,
    )


def _past(window: Window) -> list[PastWindow]:
    return [*window.server.past_windows.get(_kind(window.spec), {}).values()]


def _probe(window: Window, steps: int) -> bool:
    """Opens, closes and drops a window of so many steps, and waits until its cost is known.

    False where the test has a window open by hand. Raises `WindowRefused` if it was not complete.
    """
    spec = replace(
        window.spec,
        name=f"{window.spec.name}-probe",
        num_steps=steps if window.spec.num_steps else None,
        duration=None if window.spec.num_steps else PROBE_SECONDS,
        **_ALONE,
    )
    probe = open_beside(window, "before", spec, threading.Event())
    if probe is None:
        return False
    capture = probe.capture
    probe.drop()
    if capture.state != "complete":
        raise WindowRefused(
            f"window {window.spec.name!r}: what it costs is not known: one of {_length(spec)} "
            f"before it is {capture.state}: {capture.reason}",
            expected="a load that goes on, so that a short window can be recorded before it",
            hint=f"see the reason, or leave {_limits(window.spec)} out",
        )
    over = time.monotonic() + SETTLED
    while _stall(window, _past(window)[-1]) is None and time.monotonic() < over:
        time.sleep(POLL)
    return True


def _stall(window: Window, past: PastWindow) -> float | None:
    log = window.server.log
    return None if log is None else log_stall(log, past.log_start, past.opened, past.closed)


def _stalls(window: Window) -> list[float | None]:
    return [_stall(window, past) for past in _past(window)]


def _allowed(window: Window) -> float:
    """The largest amount within the limits; infinite where nothing that it is limited by grows."""
    spec, past = window.spec, _past(window)
    allowed = math.inf
    if spec.max_mib is not None:
        written = [(each.amount, each.written / MIB) for each in past]
        allowed = min(allowed, most_within(written, MARGIN * spec.max_mib))
    if spec.max_stall is not None:
        stalls = [
            (each.amount, stall)
            for each, stall in zip(past, _stalls(window), strict=True)
            if stall is not None
        ]
        if not stalls and past:
            raise WindowRefused(
                f"max_stall={spec.max_stall:g}: how long this server stands still for a window is "
                "not known",
                expected="a server that the plugin starts, whose log numbers its forward passes "
                "(SGLANG_LOG_FORWARD_ITERS=1, SGLANG_LOG_MS=1), and a load that goes on after "
                "the window",
                hint="limit the size of the window instead: max_mib=100",
            )
        allowed = min(allowed, most_within(stalls, MARGIN * spec.max_stall))
    return allowed


def most_within(costs: Sequence[tuple[float, float]], limit: float) -> float:
    """The largest amount whose cost is within `limit`, by (amount, cost) of what was recorded.

    By the line through the smallest and the largest amount, but at most `GROWTH` times the largest:
    two short windows say little about a long one. Of one amount alone, and below the smallest,
    costs count as growing from zero. Infinite without any cost.
    """
    if not any(cost for _, cost in costs):
        return math.inf
    (least, low), (most, high) = min(costs), max(costs)
    if least == most or limit < low:
        return least * limit / low if low > 0 else math.inf
    slope = (high - low) / (most - least)
    line = least + (limit - low) / slope if slope > 0 else math.inf
    from_zero = most * limit / high if high > 0 else math.inf
    return min(line, max(from_zero, GROWTH * most))


def _too_dear(window: Window, allowed: float, least: float) -> WindowRefused:
    spec = window.spec
    newest = _past(window)[-1]
    stall = _stall(window, newest)
    what = replace(spec, num_steps=int(newest.amount)) if spec.num_steps else spec
    measured = f"one of {_length(what)} wrote {newest.written / MIB:.3g} MiB"
    if stall is not None:
        measured += f", and serving stood still for {stall:.2f} s"
    unit = "steps" if spec.num_steps else "s"
    hint = "allow more, or record less (with_stack and record_shapes are off by default)"
    if spec.num_steps and spec.repeat != CERTAIN:
        hint += '; with repeat="certain" each of several windows needs half as many steps'
    return WindowRefused(
        f"window {spec.name!r}: {_limits(spec)} allows {allowed:.3g} {unit}: {measured}",
        expected=f"{least:g} {unit} or more, without which no verdict is possible",
        hint=hint,
    )


def _length(spec: WindowSpec) -> str:
    return count(spec.num_steps, "step") if spec.num_steps else f"{spec.duration:g} s"


def _limits(spec: WindowSpec) -> str:
    limits = (("max_stall", spec.max_stall), ("max_mib", spec.max_mib))
    return ", ".join(f"{name}={value:g}" for name, value in limits if value is not None)
