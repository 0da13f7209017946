"""Drives batches of fixed shape with SGLang's `one_batch_server`, each when it is allowed to."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._bench_serving.command import (
    STATISTICS,
    LoadResult,
    json_record,
    option_words,
    parse_figure,
    strict_json,
    usage_error,
)
from pytest_sglprof._bench_serving.driver import Over
from pytest_sglprof._bench_serving.runs import DriverRuns, driver_failed
from pytest_sglprof._errors import LoadError, SettingsError
from pytest_sglprof._redact import redact, redact_command, redact_text
from pytest_sglprof._server.command import LAUNCHERS

if TYPE_CHECKING:
    from pytest_sglprof._bench_serving.driver import DriverProcess
    from pytest_sglprof._server.launch import Server

GATE = Path(__file__).with_name("gate.py")
FIXTURE = "profile_shapes"
_POLL_S = 0.01
_SKIPPED = "Skip benchmark"
# Options of the driver that profile_shapes sets, or that would send other batches than it expects.
_OWNED = (
    *("base_url", "model", "host", "port", "backend", "run_name", "result_filename"),
    *("batch_size", "input_len", "output_len", "input_len_list", "enable_multi_batch"),
    *("skip_warmup", "cache_hit_rate", "show_report"),
)
# Where the driver has it; older ones draw the prompts from a data set that they download.
_WHERE_KNOWN = {"dataset_name": "random-ids"}


def batch_command(
    server: Server,
    model: str,
    batches: Sequence[int],
    input_len: int,
    output_len: int,
    options: Mapping[str, Any],
    record: Path,
) -> list[str]:
    """The driver's command; each result goes to `record`, a line a batch.

    options: further ones of the driver, as keywords. Raises SettingsError for those that it must
    not have, ServerMissing if the server's interpreter has no such driver.
    """
    owned = sorted(name for name in options if name in _OWNED or name.startswith("profile"))
    if owned:
        raise SettingsError(
            f"{FIXTURE}(driver={{{owned[0]!r}: …}}) is set by pytest-sglprof",
            expected="options of SGLang's one_batch_server that leave shapes and address alone",
            hint=f"{FIXTURE}(batch=…, input=…, output=…) chooses the shapes",
        )
    words, known = LAUNCHERS[server.driver_kind].batch_driver(server.python)
    flags = {name: value for name, value in _WHERE_KNOWN.items() if _has(known, name)}
    asks_server = _has(known, "local_tokenizer_path")  # older ones load the tokenizer of --model
    shape: dict[str, Any] = {
        "model": "None" if asks_server or not model else model,
        "base_url": server.url,
        "batch_size": list(batches),
        "input_len": input_len,
        "output_len": output_len,
        "result_filename": record,
        "skip_warmup": True,
    }
    for name, value in {**shape, **flags, **options}.items():
        words += option_words(name, value)
    return words


def _has(known: Sequence[str] | None, name: str) -> bool:
    return known is None or name.replace("_", "-") in known


class Batches:
    """A running driver and its batches, which it sends one after the other.

    command: the driver's. sizes: requests of each batch.
    """

    def __init__(
        self,
        driver: DriverProcess,
        record: Path,
        gate: Path,
        sizes: Sequence[int],
        failed: Callable[[], Exception],
        check: Callable[[], None],
    ) -> None:
        self.driver = driver
        self._record = record
        self._gate = gate
        self._sizes = sizes
        self._failed = failed
        self._check = check

    def release(self, number: int) -> None:
        """Lets the driver send its batch of this number, from 0."""
        _allow(self._gate, number)

    def await_held(self, number: int) -> None:
        """Waits until the driver is about to send this batch, which it may not yet.

        Raises LoadError if it skips the batch or ends, ServerDied if the server does.
        """
        ready = self._gate / f"{number}.ready"
        while not ready.exists():
            self._go_on(number)
        self._refuse_other(number, int(ready.read_text()))

    def await_result(self, number: int) -> dict[str, Any]:
        """Waits for this batch; returns the driver's record of it. Raises as `await_held`."""
        while not self.is_over(number):
            self._go_on(number)
        result = json_record(self._lines()[number])
        self._refuse_other(number, result.get("batch_size"))
        return result

    def is_over(self, number: int) -> bool:
        """True once the driver has recorded this batch."""
        return len(self._lines()) > number

    def over(self, number: int) -> threading.Event:
        """An event that is set once the batch is over or the driver has ended."""
        return Over(lambda: self.is_over(number) or self.driver.status is not None)

    def finish(self) -> None:
        """Waits for the driver's end; raises LoadError if it failed."""
        if self.driver.wait(self._check):
            raise self._failed()

    def _lines(self) -> list[str]:
        text = self._record.read_text("utf-8") if self._record.exists() else ""
        return text.split("\n")[:-1]

    def _go_on(self, number: int) -> None:
        ended = self.driver.status is not None
        if ended and not self.is_over(number):
            self._refuse_skipped(number)
            raise self._failed()
        self._check()
        time.sleep(_POLL_S)

    def _refuse_other(self, number: int, size: object) -> None:
        if size != self._sizes[number]:
            self._refuse_skipped(number)
            raise LoadError(
                f"the driver sent a batch of {size}, not of {self._sizes[number]}",
                expected="the batches in the order in which they were asked for",
                hint=f"read its output: {self.driver.log}",
            )

    def _refuse_skipped(self, number: int) -> None:
        size = self._sizes[number]
        lines = redact_text(self.driver.output()).splitlines()
        skipped = [line.strip("=") for line in lines if line.strip("=").startswith(_SKIPPED)]
        of_size = [line for line in skipped if f"batch_size={size} " in line]
        if of_size:
            raise LoadError(
                f"the server has no room for a batch of {size}: the driver skipped it",
                expected=f"a server that runs {size} requests of this shape at once",
                hint="raise --max-running-requests or the memory for its KV cache, or leave this "
                "batch out",
                log=of_size[:1],
            )


@contextlib.contextmanager
def running_batches(
    server: Server,
    runs: DriverRuns,
    *,
    name: str,
    sizes: Sequence[int],
    free: int,
    make_command: Callable[[Path], list[str]],
    options: Mapping[str, Any],
    timeout: float,
) -> Iterator[Batches]:
    """Runs the driver during the block. free: how many batches it sends without being released."""
    with tempfile.TemporaryDirectory(prefix="sglprof-gate-") as folder:
        gate = Path(folder)
        for number in range(free):
            _allow(gate, number)
        env = {
            "SGLPROF_GATE": folder,
            "SGLPROF_GATE_URL": server.url,
            "SGLPROF_GATE_ADMIN_KEY": server.client.admin_key,
        }
        before = GATE.read_text("utf-8")
        with runs.run(name, make_command, env=env, before=before) as (driver, record, _):

            def failed() -> Exception:
                runs.raise_when_server_died()
                output = redact_text(driver.output())
                refused = usage_error(output, options, FIXTURE + "(driver={…})")
                return refused or driver_failed(driver, f"a result of {len(sizes)} batches")

            check = runs.check(driver, timeout, FIXTURE, "batches of fixed shape")
            yield Batches(driver, record, gate, sizes, failed, check)


def _allow(gate: Path, number: int) -> None:
    (gate / f"{number}.go").touch()


def batch_result(record: Mapping[str, Any], command: Sequence[str], started: float) -> LoadResult:
    """A batch as a load. command: that sends this batch alone. started: Unix time in s.

    The driver knows the first token of the last request alone, so only a batch of one has
    latencies: those of its one request.
    """
    figures = [parse_figure(record, key) for key in ("batch_size", "output_len", "latency")]
    numbers = [number for number in figures if number is not None and 0 < number < 2**53]
    if len(numbers) < len(figures):
        raise LoadError(
            "the driver's result cannot be read: one of its figures is missing or impossible",
            expected='at least "batch_size", "output_len" and "latency"',
            log=[json.dumps(record)[:200]],
        )
    batch, output_len, latency = int(numbers[0]), int(numbers[1]), numbers[2]
    ttft = last_ttft(record)
    steps = output_len - 1
    tpot = (1000 * latency - ttft) / steps if ttft is not None and steps else None
    is_one = batch == 1
    return LoadResult(
        requested=batch,
        completed=batch,
        duration=latency,
        request_throughput=batch / latency,
        output_throughput=parse_figure(record, "output_throughput"),
        total_throughput=parse_figure(record, "overall_throughput"),
        concurrency=float(batch),
        ttft=_of_one(ttft if is_one else None),
        tpot=_of_one(tpot if is_one else None),
        itl=_of_one(None),
        e2e=_of_one(1000 * latency if is_one else None),
        command=tuple(redact_command(command)),
        started=started,
        raw=strict_json(redact(dict(record))),
    )


def last_ttft(record: Mapping[str, Any]) -> float | None:
    """ms until every request of the batch had its first token; None if it did not say."""
    seconds = parse_figure(record, "last_ttft")
    return 1000 * seconds if seconds is not None and seconds > 0 else None


def _of_one(value: float | None) -> dict[str, float | None]:
    return dict.fromkeys(STATISTICS, value)
