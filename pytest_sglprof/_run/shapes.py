"""`ProfileShapes`, the value of the `profile_shapes` fixture: a window for each fixed shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._bench_serving.command import LoadResult, parse_figure
from pytest_sglprof._bench_serving.runs import DriverRuns
from pytest_sglprof._bench_serving.shapes import (
    FIXTURE,
    Batches,
    batch_command,
    batch_result,
    last_ttft,
    running_batches,
)
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._run.attempt import ProfileWindow
from pytest_sglprof._run.window import Window

if TYPE_CHECKING:
    from pytest_sglprof._bench_serving.bench import BenchServing
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import WindowSpec
    from pytest_sglprof._run.opening import LoadState

DEFAULT_TIMEOUT_S = 3600.0
# Options of a window that say when it opens, or how often: here each batch opens one.
_NOT_OF_SHAPES = (
    *("name", "repeat", "max_time", "trigger", "delay", "whole_body", "start_step"),
    *("max_stall", "max_mib"),  # a short window before it would wait for the batch
)


@dataclass(frozen=True)
class ShapeResult:
    """One batch of fixed shape: what it took without a window, and the window of its repetition.

    batch: requests. input_len, output_len: tokens of each. latency: s, until the last token.
    ttft: ms, until every request had its first token. input_throughput, output_throughput:
    tokens/s before and after that moment. accept_length: of speculative decoding. None is what
    the driver did not tell. load: the same as a load. window: closed.
    """

    __module__ = "pytest_sglprof"

    batch: int
    input_len: int
    output_len: int
    latency: float
    ttft: float | None
    input_throughput: float | None
    output_throughput: float | None
    accept_length: float | None
    load: LoadResult
    window: Window


class ProfileShapes:
    """Drives batches of fixed shapes and opens a window for each: `bs1`, `bs8`, `bs64`.

    make: makes a window of the test. bench: gets the loads, as those that it drives. load: of
    the test. folder: for the driver's output.
    """

    __module__ = "pytest_sglprof"

    def __init__(
        self,
        settings: Settings,
        make: Callable[[WindowSpec], Window],
        bench: BenchServing,
        load: LoadState,
        folder: Path,
    ) -> None:
        self._make_window = ProfileWindow(settings, make)
        self._min_steps = settings.min_steps
        self._bench = bench
        self._load = load
        self._server = bench.server
        self._runs = DriverRuns(bench.server, folder=folder, progress=bench.progress)
        self._numbers = itertools.count(1)

    def __call__(
        self,
        batch: int | Sequence[int] = (1, 8, 64),
        input: int = 1024,
        output: int = 128,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        driver: Mapping[str, Any] | None = None,
        **window: Any,
    ) -> tuple[ShapeResult, ...]:
        """Drives each shape and returns a result for each, in the order of `batch`.

        SGLang's `one_batch_server` is started once. It sends every batch twice without a window,
        the first time as warm-up, then all of them again, each with a window that opens before
        the batch is sent and closes when it is over. So a window has the same steps every night.
        The prefix cache is emptied before each batch.

        batch: requests that are sent at once. input, output: tokens of each. timeout: s for all
        of it. driver: further options of the driver, with `_` for `-`. window: options of the
        windows, such as `slowdown=1.1`; with `num_steps` they close after so many passes.
        Raises LoadError if the driver fails or skips a batch, SettingsError for wrong arguments.
        """
        sizes = _sizes(batch, input, output)
        _refuse(window, output, self._min_steps)
        options = dict(driver or {})
        twice = [size for size in sizes for _ in range(2)]
        model, server = self._runs.model, self._server

        def command(record: Path, batches: Sequence[int]) -> list[str]:
            return batch_command(server, model, batches, input, output, options, record)

        alone = [command(Path("result.jsonl"), [size]) for size in sizes]
        options_of_each = {"repeat": 1, "max_stall": None, "max_mib": None, **window}
        windows = [self._make_window(f"bs{size}", **options_of_each) for size in sizes]
        all_sizes = [*twice, *sizes]
        with running_batches(
            server,
            self._runs,
            name=f"shapes-{next(self._numbers)}",
            sizes=all_sizes,
            free=len(twice),
            make_command=lambda record: command(record, all_sizes),
            options=options,
            timeout=timeout,
        ) as batches:
            results = []
            for number, shape_window in enumerate(windows):
                batches.await_result(2 * number)
                record = batches.await_result(2 * number + 1)
                load = batch_result(record, alone[number], batches.driver.started)
                shape_window.load_index = self._keep(load)
                results.append(_result(record, load, shape_window))
            for number, shape_window in enumerate(windows, start=len(twice)):
                _in_window(shape_window, batches, number)
            batches.finish()
        return tuple(results)

    def _keep(self, load: LoadResult) -> int:
        """Adds a load to those of the test; returns its number there, from 1."""
        self._load.start(load.requested)  # loads are counted where they start
        self._load.end()
        self._bench.results.append(load)
        self._bench.commands.append(load.command)
        self._bench.numbers.append(len(self._bench.commands))
        self._server.note_load(load)
        return self._bench.numbers[-1]


def _in_window(window: Window, batches: Batches, number: int) -> None:
    """Opens the window before the batch is sent, and closes it when its steps are over."""
    batches.await_held(number)
    load_index = window.load_index
    window.open()
    window.load_index = load_index
    try:
        batches.release(number)
        if window.spec.num_steps is None and window.spec.duration is None:
            batches.await_result(number)
        else:
            window.wait(batches.over(number))
    finally:
        window.close()
    batches.await_result(number)


def _result(record: Mapping[str, Any], load: LoadResult, window: Window) -> ShapeResult:
    accepted = parse_figure(record, "acc_length")
    return ShapeResult(
        batch=int(record["batch_size"]),
        input_len=int(record["input_len"]),
        output_len=int(record["output_len"]),
        latency=load.duration,
        ttft=last_ttft(record),
        input_throughput=parse_figure(record, "input_throughput"),
        output_throughput=load.output_throughput,
        accept_length=accepted if accepted is not None and accepted > 0 else None,
        load=load,
        window=window,
    )


def _sizes(batch: int | Sequence[int], input: int, output: int) -> list[int]:
    sizes = [batch] if isinstance(batch, int) else list(batch)
    counts = [("batch", size) for size in sizes] + [("input", input), ("output", output)]
    for name, value in counts:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SettingsError(
                f"{FIXTURE}({name}={value!r})", expected="whole numbers of at least 1"
            )
    if not sizes or len(set(sizes)) != len(sizes):
        raise SettingsError(
            f"{FIXTURE}(batch={sizes!r})", expected="one or more sizes, each of them once"
        )
    return sizes


def _refuse(window: Mapping[str, Any], output: int, min_steps: int) -> None:
    for name in _NOT_OF_SHAPES:
        if name in window:
            raise SettingsError(
                f"{FIXTURE}({name}=…): each batch opens one window, when it is sent",
                expected="other options of a window, such as num_steps or slowdown",
                hint="profile_window(…) opens windows of your own",
            )
    asked = window.get("num_steps")
    least = max(min_steps, asked if isinstance(asked, int) else 0)
    if output - 1 < least:
        raise SettingsError(
            f"{FIXTURE}(output={output}) decodes {output - 1} times",
            expected=f"at least {least} steps: {'num_steps' if asked else 'min_steps'}",
            hint=f"give output={least + 1}",
        )
