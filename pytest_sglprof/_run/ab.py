"""Server lives one after another, for `sglprof ab`: start, warm up, load, window, record, stop.

A life that ended is a file of its own in the folder, so that an interrupted comparison goes on
where it stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_sglprof import __version__
from pytest_sglprof._baselines.records import LifeRecord, digest_of
from pytest_sglprof._config.backends import Backend
from pytest_sglprof._config.model import ServerSpec, WindowSpec
from pytest_sglprof._errors import Inconclusive, SettingsError, SglprofError
from pytest_sglprof._files import atomic_write
from pytest_sglprof._limits import UNDECODABLE, read_bytes, why_undecodable
from pytest_sglprof._run.clean import swept
from pytest_sglprof._run.folder import RunFolder, write_run_file
from pytest_sglprof._run.opening import LoadState, steady_load
from pytest_sglprof._run.servers import close_server, describe_server, undisturbed
from pytest_sglprof._run.window import Window

if TYPE_CHECKING:
    from pytest_sglprof._bench_serving.command import LoadResult
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._server.launch import Server

PLAN, LIVES = "plan.json", "lives"
TEST = "sglprof ab"  # of the records, where tests have their node id
LONGER = 10  # times as many requests run during a window, whose end stops them
Say = Callable[[str], None]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The same requests in each life: so many prompts, all of one length, at one concurrency.

    batch: sizes of batches that are sent instead, each with a window of its own.
    """

    prompts: int
    input: int
    output: int
    concurrency: int
    batch: tuple[int, ...] = ()

    def options(self, times: int = 1) -> dict[str, Any]:
        """Keywords of `bench_serving`."""
        return {
            "num_prompts": self.prompts * times,
            "random_input_len": self.input,
            "random_output_len": self.output,
            "random_range_ratio": 1.0,
            "max_concurrency": self.concurrency,
        }


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. b: "" for A/A. order: the sides of all lives. steps: of a window.

    servers: digest of each server's settings, by side, so that no other one takes its place.
    """

    a: str
    b: str
    lives: int
    seed: int
    order: str
    load: Load
    steps: int
    backend: Backend
    alpha: float
    limit: float
    servers: dict[str, str]

    def name(self, side: str) -> str:
        """The name of the server of side "A" or "B"."""
        return self.b if side == "B" else self.a


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """A life that ended. number: from 1. seconds: that it took."""

    number: int
    side: str
    seconds: float
    record: LifeRecord


def spec_digest(spec: ServerSpec) -> str:
    """Of everything that shapes a server, without values of secrets: these are not in it."""
    return digest_of(msgspec.to_builtins(replace(spec, name="")))


def write_plan(folder: Path, plan: Plan) -> None:
    """Begins a comparison in a folder that has none."""
    if (folder / PLAN).exists():
        raise SettingsError(
            f"{folder} has a comparison already",
            expected="a new folder",
            hint=f"go on with it: sglprof ab --resume {folder}, or choose another one with -o",
        )
    atomic_write(folder / PLAN, msgspec.json.format(msgspec.json.encode(plan)))


def read_plan(folder: Path) -> Plan:
    """The plan of a comparison that was begun."""
    try:
        return msgspec.json.decode(read_bytes(folder / PLAN), type=Plan)
    except (OSError, *UNDECODABLE) as error:
        raise SglprofError(
            f"there is no comparison in {folder}: {why_undecodable(error)}",
            expected=f"a folder of sglprof ab, with {PLAN}",
            hint="its first line names it",
        ) from error


def read_lives(folder: Path, plan: Plan) -> list[Life]:
    """The lives that ended, in order."""
    lives = []
    for number in range(1, len(plan.order) + 1):
        file = _file(folder, number)
        if file.exists():
            try:
                lives.append(msgspec.json.decode(read_bytes(file), type=Life))
            except UNDECODABLE as error:
                raise SglprofError(
                    f"{file} is damaged: {why_undecodable(error)}",
                    expected="what sglprof ab wrote",
                    hint="remove it and resume: that life is run again",
                ) from error
    return lives


def run_lives(
    folder: Path, plan: Plan, servers: dict[str, ServerSpec], settings: Settings, say: Say
) -> Iterator[Life]:
    """Runs the lives that are missing; each is yielded once its file is written.

    servers: by side. Raises what a server, the load or a window raises, after the server has been
    stopped, and `Inconclusive` where a life left no complete window.
    """
    for line in swept(folder):
        say(line)
    known = {life.number: life for life in read_lives(folder, plan)}
    for number, side in enumerate(plan.order, 1):
        if number in known:
            continue
        begin = time.monotonic()
        life_folder = _free(folder, f"{number:02d}-{side}")
        record = _life(servers[side], plan, life_folder, settings, say)
        life = Life(
            number=number,
            side=side,
            seconds=round(time.monotonic() - begin, 1),
            record=record,
        )
        known[number] = life
        atomic_write(_file(folder, number), msgspec.json.format(msgspec.json.encode(life)))
        if settings.keep != "all":
            _drop_traces(life_folder.path)
        yield life


def minutes_left(plan: Plan, lives: list[Life]) -> float:
    """About how long the lives take that are missing; 0 before the first one ended."""
    if not lives:
        return 0.0
    mean = sum(life.seconds for life in lives) / len(lives)
    return (len(plan.order) - len(lives)) * mean / 60


def _drop_traces(folder: Path) -> None:
    """Removes what was recorded in a life, of which the record is kept; its logs stay."""
    for pattern in ("windows", "servers/*/traces", "servers/*/nsys"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _file(folder: Path, number: int) -> Path:
    return folder / LIVES / f"{number:02d}.json"


def _free(folder: Path, name: str) -> RunFolder:
    """A folder for one life; an interrupted life before it keeps its own."""
    names = [name, *(f"{name}.{number}" for number in range(2, 1000))]
    return RunFolder(folder, next(each for each in names if not (folder / each).exists()))


def _life(
    spec: ServerSpec, plan: Plan, folder: RunFolder, settings: Settings, say: Say
) -> LifeRecord:
    from pytest_sglprof._server.launch import launch

    home = folder.server(spec.key)
    write_run_file(folder.path, started=time.time(), version=__version__)
    server = launch(spec, folder=home, nsys_path=settings.nsys or None, progress=say)
    try:
        with undisturbed(server, say):
            return _measured(server, plan, folder, settings, say)
    finally:
        close_server(server)


def _measured(
    server: Server, plan: Plan, folder: RunFolder, settings: Settings, say: Say
) -> LifeRecord:
    drive = _shapes if plan.load.batch else _steady
    windows, load = drive(server, plan, folder, settings, say)
    return _record(server, windows, folder, load)


def _window(
    spec: WindowSpec, server: Server, folder: RunFolder, settings: Settings, say: Say
) -> Window:
    spec = replace(spec, thresholds=(), repeat=1, max_stall=None, max_mib=None)
    return Window(
        server,
        spec,
        folder.window(spec.name, TEST),
        settings=settings,
        load=LoadState(),
        progress=say,
    )


def _steady(
    server: Server, plan: Plan, folder: RunFolder, settings: Settings, say: Say
) -> tuple[list[Window], LoadResult]:
    """The load without a window, then a window while the same load runs for longer."""
    from pytest_sglprof._bench_serving.bench import BenchServing
    from pytest_sglprof._config.windows import window_by_hand

    bench = BenchServing(server, folder=folder.load(TEST), progress=say)
    load = bench(**plan.load.options())
    options = {"backend": plan.backend, "num_steps": plan.steps}
    spec = window_by_hand(settings, "ab", options)
    window = _window(spec, server, folder, settings, say)
    with bench.running(warm_up=False, **plan.load.options(LONGER)) as running:
        target, over = plan.load.concurrency, running.over
        # The same load ran a moment ago. Where requests are short, many places are empty between
        # them, so no more is asked than that half of them are taken.
        if not steady_load(server, target, share=0.5, hold=0.5, timeout=spec.timeout, stop=over):
            raise Inconclusive(
                "the load was over before half of its requests had run together for half a second",
                expected="a load that lasts for a window",
                hint="more --num-prompts, or a longer --output-len; then resume",
            )
        window.open()
        try:
            window.wait(over)
        finally:
            window.close()
        running.stop()
    return [window], load


def _shapes(
    server: Server, plan: Plan, folder: RunFolder, settings: Settings, say: Say
) -> tuple[list[Window], LoadResult]:
    """Each batch without a window, then once more with one; the load is that of the first."""
    from pytest_sglprof._bench_serving.bench import BenchServing
    from pytest_sglprof._run.shapes import ProfileShapes

    def make(spec: WindowSpec) -> Window:
        return _window(spec, server, folder, settings, say)

    where = folder.load(TEST)
    bench = BenchServing(server, folder=where, progress=say)
    shapes = ProfileShapes(settings, make, bench, LoadState(), where)
    load = plan.load
    results = shapes(list(load.batch), load.input, load.output, backend=plan.backend)
    return [each.window for each in results], results[0].load


def _record(
    server: Server, windows: list[Window], folder: RunFolder, load: LoadResult
) -> LifeRecord:
    """One record of all windows, which differ in their kinds of steps."""
    from pytest_sglprof._baselines.load import load_figures
    from pytest_sglprof._report.lives import life_record

    described = describe_server(server, folder.path)
    place: dict[str, Any] = {"nodeid": TEST, "attempt": 1, "server_key": server.spec.key}
    place["standin"] = described.standin
    documents = [window.document(**place, load=TEST, root=folder.path) for window in windows]
    record = life_record(
        documents,
        described,
        {TEST: load.command},
        run=folder.run_id,
        spec=server.spec,
        info=server.info,
        load=load_figures(load),
    )
    if record is None:
        reasons = (each.state_reason for each in documents if each.state_reason)
        why = next(reasons, documents[0].reason)
        raise Inconclusive(
            f"life {folder.run_id} left no complete window: {why}",
            expected="complete windows while the load runs",
            hint="fewer --steps, more --num-prompts or a longer --output-len; then resume",
        )
    return record
