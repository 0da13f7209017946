"""``python -m ci.fuzz``: what readers do with files that nobody meant to write.

Each reader gets files of the corpus (tests/data/fuzz) that hypothesis has changed, in their
structure (keys, values, rows, lines) or in their bytes. A file is read, or refused with an error of
this package, within `SECONDS` and `MEMORY`; anything else ends the run with status 1, the smallest
file that shows it, and the command that finds it again.

``--seconds`` is the time of all readers together: CI gives them 60 s. ``--reader`` chooses some.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import functools
import gzip
import io
import json
import os
import random
import re
import resource
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import hypothesis
import msgspec
from hypothesis import strategies as st

from pytest_sglprof._baselines.store import BaselineFolder, moment, usable_lives
from pytest_sglprof._bench_serving.command import (
    json_record,
    parse_result,
    record_line,
    redact_record,
)
from pytest_sglprof._bench_serving.shapes import batch_result
from pytest_sglprof._cli import main as sglprof
from pytest_sglprof._config.load import read_settings
from pytest_sglprof._errors import SglprofError
from pytest_sglprof._limits import READ_GIB
from pytest_sglprof._load.sources import read_log
from pytest_sglprof._report.results import load_document, load_results
from pytest_sglprof._server.log import ServerLog
from pytest_sglprof._server.log_lines import read_log_facts
from pytest_sglprof._trace.torch import assemble

CORPUS = Path(__file__).parents[1] / "tests/data/fuzz"
SECONDS = 10  # of CPU of one example, of which the slowest take 0.3
WAIT = 10 * SECONDS  # by the clock, where other programs share the processors
MEMORY = 1 << 30  # bytes by which the peak of this process may rise
BATCH = 40  # examples of one run of hypothesis, which has a seed of its own

ANSWERS = (0, 1, 2, 3)  # exit statuses of commands: read, a verdict, or refused
Read = Callable[[Path], str]
Change = Callable[[st.DrawFn, bytes], bytes]


class Reader(NamedTuple):
    """A kind of file. seed: its content in the corpus; file: the name under which it is read.

    structure: changes the seed, and makes a file of it. reads: ways to read that, of which each
    example takes one; they answer with what came of it. made: the file of an unchanged seed,
    whose bytes are changed. beside: seeds of what lies beside it.
    """

    name: str
    seed: str
    file: str
    structure: Change
    reads: tuple[Read, ...]
    made: Callable[[bytes], bytes] = bytes
    beside: tuple[str, ...] = ()


class Fault(AssertionError):
    """Something else than an answer or an error of this package came out."""


# Changes of bytes.

_PIECES = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"\n", b"\x00", b"\xff", b"=", b"-", b"0"),
    *(b"1e999", b"NaN", b"\\ud800", b"[" * 3_000, b'{"a":' * 3_000, b"9" * 5_000, b"a" * 70_000),
)


def change_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Up to four places of a file that hold something else, or nothing."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.sampled_from((0, 0, 1, 2, 10, 300, len(data))))
        new = draw(st.one_of(st.binary(max_size=6), st.sampled_from((b"", *_PIECES)))) + (
            data[at:end] * draw(st.sampled_from((0, 0, 0, 1, 2)))
        )
        data = data[:at] + new + data[end:]
    return data


# Changes of JSON.

_HUGE, _DEEP = "\x01huge\x01", "\x01deep\x01"  # what `json` does not write, put in as text
_ODD = (
    *(None, True, False, -1, 0, 1, 1.5, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, -(2**70)),
    *(1e308, float("nan"), float("inf"), _HUGE, _DEEP),
    *("", "x", "7", "TP0", "TP9", "\ud800", "x" * 70_000, "(a+)+$", "2026-13-45T99:00", "=1+1"),
    *([], {}, [[]], [None], {"a": 1}, [1, "x"]),
)


_HOW = ("alike", "alike", "alike", "replace", "remove", "repeat", "rename", "wrap")


def odd_value() -> st.SearchStrategy[Any]:
    """What may stand where something else is expected."""
    return st.one_of(
        st.sampled_from(_ODD).map(copy.deepcopy), st.integers(), st.floats(), st.text(max_size=5)
    )


def alike(draw: st.DrawFn, value: Any) -> Any:
    """Another value of the same type: what a schema lets pass."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from((0, 1, -1, 2, 99, 2**31, 2**53, value + 1, value // 2)))
    if isinstance(value, float):
        return draw(st.sampled_from((0.0, -1.0, 1e-9, 1e308, value * 2, -value)))
    if isinstance(value, str):
        return draw(
            st.sampled_from(("", "x", "TP0", "pass", "sync", "<b>\n", value[1:], value * 2))
        )
    if isinstance(value, list):
        return draw(st.sampled_from((value[::-1], value[: len(value) // 2], value * 2)))
    return {} if isinstance(value, dict) else value


def change_document(draw: st.DrawFn, document: Any) -> Any:
    """Up to three places of a document that hold something else, or nothing."""
    for _ in range(draw(st.integers(1, 3))):
        holder, key, value = None, None, document
        while isinstance(value, dict | list) and value and draw(st.integers(0, 4)) != 4:
            key = draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
            holder, value = value, value[key]
        how = draw(st.sampled_from(_HOW))
        if holder is None:
            document = draw(odd_value()) if how == "replace" else document
        elif how == "remove":
            del holder[key]
        elif how == "repeat" and isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(value)] * draw(st.sampled_from((1, 2, 50)))
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(("", "x", *holder)))] = holder.pop(key)
        elif how == "alike":
            holder[key] = alike(draw, value)
        else:
            holder[key] = [value] if how == "wrap" else draw(odd_value())
    return document


def _json(document: Any) -> bytes:
    text = json.dumps(document).replace(json.dumps(_HUGE), "1e400")
    return text.replace(json.dumps(_DEEP), "[" * 5_000 + "]" * 5_000).encode()


def change_json(draw: st.DrawFn, data: bytes) -> bytes:
    """Another document."""
    return _json(change_document(draw, json.loads(data)))


def change_json_lines(draw: st.DrawFn, data: bytes) -> bytes:
    """Other documents, a line each."""
    lines = change_document(draw, [json.loads(line) for line in data.splitlines()])
    return b"\n".join(map(_json, lines if isinstance(lines, list) else [lines]))


# Changes of lines: logs and TOML.

_TOKEN = re.compile(r"-?\d+(?:\.\d+)?|\"[^\"]*\"|true|false")
_ODD_TEXTS = (
    *("", "-1", "0", "9" * 400, "1e999", "nan", "inf", '"x"', '""', "true", "[]", "{}", "[1, 2]"),
    *('"("', '"(a+)+$"', "[" * 2_000, "x" * 5_000, "²", "\u2028", "\x00", "2026-11-24 03:10:51"),
)


def change_lines(draw: st.DrawFn, data: bytes) -> bytes:
    """Lines that are gone, doubled, joined, or hold other values."""
    lines = data.decode().split("\n")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        how = draw(st.sampled_from(("value", "value", "value", "remove", "repeat", "join", "swap")))
        tokens = [*_TOKEN.finditer(lines[at])]
        if how == "value" and tokens:
            token, new = draw(st.sampled_from(tokens)), draw(st.sampled_from(_ODD_TEXTS))
            lines[at] = lines[at][: token.start()] + new + lines[at][token.end() :]
        elif how == "remove" and len(lines) > 1:
            del lines[at]
        elif how == "repeat":
            lines[at:at] = [lines[at]] * draw(st.sampled_from((1, 3)))
        elif how == "join":
            lines[at] += draw(st.sampled_from(("", " ", *_ODD_TEXTS))) + lines[at - 1]
        else:
            lines[at], lines[at - 1] = lines[at - 1], lines[at]
    return "\n".join(lines).encode()


# Changes of tables.

_ODD_SQL = (
    *("NULL", "0", "-1", "1.5", "1e30", "'x'", "''", "x'00ff'", "9223372036854775807", "start"),
    *("-9223372036854775808", "99999999", "4294967296", "CAST(ZEROBLOB(70000) AS TEXT)"),
)


def change_tables(draw: st.DrawFn, data: bytes) -> bytes:
    """Another export of nsys: rows, columns and tables that are others, or are missing."""
    return database(data, lambda connection: _statement(draw, connection), draw(st.integers(1, 4)))


def database(
    script: bytes,
    statement: Callable[[sqlite3.Connection], str] = lambda connection: "",
    count: int = 0,
) -> bytes:
    """The file that a script of SQL makes, and so many further statements."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.sqlite"
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(script.decode())
            for _ in range(count):
                with contextlib.suppress(sqlite3.Error):
                    connection.execute(statement(connection))
            connection.commit()
        return file.read_bytes()


def _statement(draw: st.DrawFn, connection: sqlite3.Connection) -> str:
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master ORDER BY 1")]
    table = draw(st.sampled_from(tables or ["none"]))
    columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
    column, value = draw(st.sampled_from(columns or ["none"])), draw(st.sampled_from(_ODD_SQL))
    which = draw(st.sampled_from(("", "WHERE rowid = 1", "WHERE rowid % 2")))
    changes = (f'UPDATE "{table}" SET "{column}" = {value} {which}',) * 5
    return draw(
        st.sampled_from(
            (
                *changes,
                f'ALTER TABLE "{table}" DROP COLUMN "{column}"',
                f'ALTER TABLE "{table}" RENAME COLUMN "{column}" TO "other"',
                f'DELETE FROM "{table}" {which}',
                f'INSERT INTO "{table}" SELECT * FROM "{table}"',
                f'DROP TABLE "{table}"',
                f'ALTER TABLE "{table}" RENAME TO "other"',
                f'CREATE VIEW "CUPTI_ACTIVITY_KIND_MEMCPY" AS SELECT * FROM "{table}"',
            )
        )
    )


# Ways to read.


def command(*words: str) -> Read:
    """A command of `sglprof`; {} is the file, {folder} where it lies."""

    def read(path: Path) -> str:
        filled = [word.replace("{}", str(path)) for word in words]
        filled = [word.replace("{folder}", str(path.parent)) for word in filled]
        errors = io.StringIO()
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(sglprof, "_discard"),  # it would close what we print to
        ):
            status = sglprof.main(filled)
        if status not in ANSWERS:
            raise Fault(f"{' '.join(words)}: status {status}\n{errors.getvalue()}")
        return f"exit {int(status)}"

    return read


def scanned(read: Read) -> Read:
    """The same, as a large file is read."""

    def read_scanned(path: Path) -> str:
        with mock.patch.object(assemble, "SCAN_BYTES", 0):
            return read(path)

    return read_scanned


def _log(path: Path) -> str:
    log = ServerLog(path)
    read_log_facts(log.each(), until=2e9)
    log.reason()
    log.phase()
    log.last_line()
    return f"{len(read_log(path)) > 0} samples"


def _load(path: Path) -> str:
    text = path.read_text("utf-8", "replace")
    redact_record(text)
    result = parse_result(record_line(text), requested=4)
    keys = {"load_id": "1", "nodeid": "t", "server_key": "s"}
    msgspec.json.encode(load_document(result, attempt=1, standin=False, **keys))
    return "read"


def _batch(path: Path) -> str:
    record = json_record(path.read_text("utf-8", "replace"))
    batch_result(record, ["driver"], 1e9)
    return "read"


def _settings(path: Path) -> str:
    here = path.parent
    where = {"start": [here], "rootdir": here, "invocation_dir": here}
    settings = read_settings({"config": str(path)}, {}, **where, of_pytest=True)  # type: ignore[arg-type]
    settings.describe()
    return "read"


def _baseline(path: Path) -> str:
    folder = BaselineFolder(path.parent)
    for baseline in folder.list():
        usable_lives(baseline, now=moment("2026-12-01T00:00:00Z"), min_age_days=1)
    folder.prune(keep=1, older_than=moment("2026-12-01T00:00:00Z"), dry_run=True)
    return f"{len(folder.problems)} problems"


def _results(path: Path) -> str:
    return f"{len(load_results(path).windows)} windows"


packed = functools.partial(gzip.compress, compresslevel=1, mtime=0)


@functools.cache
def reduced(data: bytes) -> bytes:
    """As `sglprof reduce` leaves it."""
    with tempfile.TemporaryDirectory() as name:
        path, target = Path(name) / TRACES[1], Path(name) / "x.parquet"
        path.write_bytes(data)
        command("reduce", "{}", "-o", str(target))(path)
        return target.read_bytes()


CHECK = command("check", "{folder}", "--format", "json")
KERNELS = command("kernels", "{}", "--format", "json")
TRACES = ("1-TP-0.trace.json", "1-TP-1.trace.json")
EXPORT = "node.sqlite"
READERS = (
    Reader(
        "torch",
        TRACES[1],
        TRACES[1],
        change_json,
        (
            *(KERNELS, CHECK, scanned(KERNELS), scanned(CHECK)),
            command("check", "{folder}", "--metric", "lateness", "--allow-partial"),
            command("export", "--to", "perfetto", "{folder}", "-o", "{folder}/out/m.json.gz"),
        ),
        beside=TRACES[:1],
    ),
    Reader(
        "packed",
        TRACES[1],
        f"{TRACES[1]}.gz",
        lambda draw, seed: packed(change_json(draw, seed)),
        (KERNELS, CHECK, scanned(KERNELS), scanned(CHECK)),
        made=packed,
        beside=TRACES[:1],
    ),
    Reader(
        "reduced",
        TRACES[1],
        "1-TP-1.parquet",
        lambda draw, seed: change_bytes(draw, reduced(seed)),
        (KERNELS, CHECK),
        made=reduced,
        beside=TRACES[:1],
    ),
    Reader(
        "nsys",
        "node.sql",
        EXPORT,
        change_tables,
        (KERNELS, CHECK, command("export", "--to", "nsight", "{}", "--format", "csv")),
        made=database,
    ),
    Reader("ranks", "ranks.json", "node.ranks.json", change_json, (CHECK,), beside=("node.sql",)),
    Reader(
        "server_info",
        "../dp-attention-cpu/plain/server_info.json",
        "server_info.json",
        change_json,
        (CHECK,),
        beside=TRACES,
    ),
    Reader(
        "experts",
        "../dp-attention-cpu/ep2/experts.npz",
        "experts.npz",
        change_bytes,
        (CHECK,),
        beside=TRACES,
    ),
    Reader("log", "server.log", "server.log", change_lines, (_log,)),
    Reader("load", "bench.jsonl", "bench.jsonl", change_json_lines, (_load,)),
    Reader("batch", "batch.json", "batch.json", change_json, (_batch,)),
    Reader("config", "sglprof.toml", "sglprof.toml", change_lines, (_settings,)),
    Reader(
        "baseline",
        "baseline.json",
        "tests_test_serving.py_test_decode-steady-8a6b2f11-de002813.json",  # as its key says
        change_json,
        (
            _baseline,
            command("baseline", "list", "--baselines", "{folder}"),
            command("compare", "{}", "{}", "--format", "json"),
        ),
    ),
    Reader(
        "history",
        "history.jsonl",
        "history/run-1.jsonl",
        change_json_lines,
        (
            command("history", "{folder}/.."),
            command("history", "{folder}/..", "--kernel", "gemm|moe", "--since", "2026-11-01"),
            command("history", "{folder}/..", "--page", "{folder}/../out/page.html"),
        ),
    ),
    Reader(
        "results",
        "../results-1.0.json",
        "results.json",
        change_json,
        (
            _results,
            command("report", "{}", "-o", "{folder}/out.html"),
            command("compare", "{}", "{}"),
        ),
    ),
)


# Running.


def lay_out(reader: Reader, folder: Path) -> Path:
    """Writes the unchanged file, and what lies beside it, into an empty folder."""
    for name in reader.beside:
        is_script = name.endswith(".sql")
        content = (
            database((CORPUS / name).read_bytes()) if is_script else (CORPUS / name).read_bytes()
        )
        (folder / (f"{name}ite" if is_script else name)).write_bytes(content)
    path = folder / reader.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(reader.made((CORPUS / reader.seed).read_bytes()))
    return path


def run_examples(reader: Reader, seed: int, count: int, folder: Path) -> Counter[str]:
    """Reads so many changed files in an empty folder: what came of it -> how often.

    Raises whatever else came out, for the smallest file that shows it, which is left there.
    """
    path = lay_out(reader, folder)
    content, made = (CORPUS / reader.seed).read_bytes(), path.read_bytes()
    outcomes: Counter[str] = Counter()

    @st.composite
    def files(draw: st.DrawFn) -> bytes:
        by_structure = draw(st.booleans())
        return reader.structure(draw, content) if by_structure else change_bytes(draw, made)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.given(files(), st.sampled_from(reader.reads))
    def reads(data: bytes, read: Read) -> None:
        path.write_bytes(data)
        outcomes[outcome(read, path)] += 1

    reads()
    return outcomes


def outcome(read: Read, path: Path) -> str:
    """What came of reading a file, in bounded time and memory."""
    begin, peak = time.process_time(), _peak()
    with _alarms():
        try:
            came = read(path)
        except SglprofError as error:
            came = type(error).__name__
    if (seconds := time.process_time() - begin) > SECONDS:
        raise Fault(f"it took {seconds:.1f} s")
    if (more := _peak() - peak) > MEMORY:
        raise Fault(f"it took {more >> 20} MiB")
    return came


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextlib.contextmanager
def _alarms() -> Iterator[None]:
    """Raises in the body after its time, also within a search by an expression."""
    timers = (
        (signal.ITIMER_PROF, signal.SIGPROF, SECONDS),
        (signal.ITIMER_REAL, signal.SIGALRM, WAIT),
    )

    def stop(number: int, frame: object) -> None:
        raise Fault("it took too long")

    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def fuzz(reader: Reader, seed: int, seconds: float) -> bool:
    """Runs examples for so long and prints what came of them; False for a fault."""
    begin, rounds, outcomes = time.monotonic(), 0, Counter[str]()
    while not rounds or time.monotonic() - begin < seconds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "fuzz"
            folder.mkdir()
            os.environ["SGLPROF_LEASE_DIR"] = f"{name}/locks"
            os.chdir(folder)
            try:
                outcomes += run_examples(reader, seed + rounds, BATCH, folder)
            except Exception as error:
                kept = (
                    Path(tempfile.mkdtemp(prefix=f"fuzz-{reader.name}-")) / Path(reader.file).name
                )
                kept.write_bytes((folder / reader.file).read_bytes())
                print("".join(traceback.format_tb(error.__traceback__)[-8:]))
                print(f"{type(error).__name__}: {error}"[:4_000])
                print(f"{reader.name}: a fault, shown by {kept}")
                print(f"again: python -m ci.fuzz --reader {reader.name} --seed {seed + rounds}")
                return False
            finally:
                os.chdir(CORPUS)
        rounds += 1
    kinds = ", ".join(f"{what} {count}" for what, count in outcomes.most_common())
    print(f"{reader.name:12}{outcomes.total():7} examples: {kinds}", flush=True)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the readers; 1 if one of them has a fault."""
    names = [reader.name for reader in READERS]
    parser = argparse.ArgumentParser(prog="python -m ci.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all readers together")
    parser.add_argument("--reader", action="append", choices=names, help="only this one")
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args(argv)
    chosen = [reader for reader in READERS if reader.name in (args.reader or names)]
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    os.environ[READ_GIB] = "0.5"
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=hypothesis.errors.HypothesisWarning)
    faulthandler.enable()
    return 0 if all(fuzz(reader, seed, args.seconds / len(chosen)) for reader in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
