"""Reduced windows: what a kernel table is made of, of all ranks that were read, in one small file.

Most of a trace are events that no figure needs. `sglprof reduce` reads the traces where they lie,
on each node, and leaves a Parquet file: one row for each rank, of which each column is an array of
numbers (activities, calls that launch kernels, collectives; see `_packed`), and the text of one
JSON object has the rest (names, steps, notes). Nothing is rounded and nothing added up, so that
several of these files give the table that their traces give together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
import numpy as np

from pytest_sglprof._errors import TraceError
from pytest_sglprof._limits import refuse_large
from pytest_sglprof._trace.completeness import Unrecorded
from pytest_sglprof._trace.paths import REDUCED_KEY
from pytest_sglprof._trace.table import CollectiveCalls, Launches, RankActivities, Step

if TYPE_CHECKING:
    from pytest_sglprof._trace.paths import Activities, ReadOptions

FORMAT = 1

# Numbers of a rank -> of which object they are, and its field. Of one object all are equally long.
_COLUMNS = {
    "start": ("", "start"),
    "dur": ("", "dur"),
    "name": ("", "name_codes"),
    "kind": ("", "kind_codes"),
    "stream": ("", "stream"),
    "step": ("", "step"),
    "launch_start": ("launches", "start"),
    "launch_step": ("launches", "step"),
    "launch_recorded": ("launches", "recorded"),
    "launch_is_graph": ("launches", "is_graph"),
    "launch_graph": ("launches", "graph"),
    "call_row": ("calls", "row"),
    "call_sequence": ("calls", "sequence"),
    "call_size": ("calls", "size"),
}
_GROUP, _OPERATION = "call_group", "call_operation"  # codes of texts
_GROWING = ("start", "launch_start")  # their differences are stored


class _Rest(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank has besides numbers; fields as in `RankActivities`. file: that it was read from.

    groups, operations: texts of the collectives, by code; None without them.
    """

    file: str
    rank: str
    names: list[str]
    kinds: list[str]
    steps: list[Step]
    source: str
    notes: list[str]
    partial: bool
    unusable: int
    run: dict[str, str]
    recording: str
    clock_ns: int | None
    unrecorded: dict[str, Any] | None
    host: str
    has_launches: bool
    groups: list[str] | None
    operations: list[str] | None


class Beside(msgspec.Struct, frozen=True):
    """What is said of all ranks. server_info: the server's settings, as stands beside traces.

    settle_s: seconds to drop from the front. unlike: why the ranks must not be compared, as far as
    only the files themselves or their run say so.
    """

    format: int = FORMAT
    server_info: dict[str, Any] | None = None
    settle_s: float = 0.0
    unlike: tuple[str, ...] = ()


def reduced(parts: Activities, beside: Beside) -> bytes:
    """The contents of a reduced file; see `write_reduced`."""
    out = BytesIO()
    write_reduced(out, parts, beside)
    return out.getvalue()


def write_reduced(
    out: IO[bytes], parts: Iterable[tuple[Path, RankActivities]], beside: Beside
) -> int:
    """Writes a reduced file, one rank after the other, and returns the number of ranks in it.

    parts: with the files that they were read from. Raises `TraceError` without pyarrow.
    """
    pyarrow, _ = _pyarrow("writing a reduced file")
    ranks: set[str] = set()
    with _writer(out, beside) as writer:
        for file, part in parts:
            numbers = _numbers(part)
            cells = {name: [_packed(name, numbers)] for name in numbers}
            row = {"rest": [_rest(file, part)], **cells}
            writer.write_table(pyarrow.table(row, schema=writer.schema))
            ranks.add(part.rank)
    return len(ranks)


def join_reduced(out: IO[bytes], files: Iterable[Path], beside: Beside) -> int:
    """Writes one reduced file of several, as `write_reduced`, without looking into the ranks."""
    ranks: set[str] = set()
    with _writer(out, beside) as writer:
        for file in files:
            for row in _rows(file):
                writer.write_batch(row.replace_schema_metadata(writer.schema.metadata))
                rest = row.column("rest")[0].as_py()
                ranks.add(msgspec.json.decode(rest, type=_Rest).rank)
    return len(ranks)


def _writer(out: IO[bytes], beside: Beside) -> Any:
    pyarrow, parquet = _pyarrow("writing a reduced file")
    kinds = {"rest": pyarrow.string()}
    kinds |= dict.fromkeys((*_COLUMNS, _GROUP, _OPERATION), pyarrow.binary())
    schema = pyarrow.schema(kinds.items(), metadata={REDUCED_KEY: msgspec.json.encode(beside)})
    return parquet.ParquetWriter(
        out,
        schema,
        compression="zstd",
        compression_level=9,
        use_dictionary=False,
        write_statistics=False,
    )


def read_reduced(files: Sequence[Path], options: ReadOptions) -> Activities:
    """The activities of all ranks in these files. Raises `TraceError` for one that is damaged."""
    return [part for file in files for part in _parts(file, launches=options.launches)]


def beside_of(file: Path) -> Beside:
    """What a reduced file says of all its ranks."""
    _, parquet = _pyarrow(f"reading {file}")
    try:
        text = parquet.read_metadata(file).metadata[REDUCED_KEY.encode()]
        beside = msgspec.json.decode(text, type=Beside)
    except Exception as error:
        raise _damaged(file, error) from error
    if beside.format > FORMAT:
        raise TraceError(
            f"{file} is a reduced file of format {beside.format}",
            expected=f"format {FORMAT} or older",
            hint="read it with the version of pytest-sglprof that wrote it, or a later one",
        )
    return beside


def _parts(file: Path, *, launches: bool) -> Iterator[tuple[Path, RankActivities]]:
    try:
        for row in _rows(file):
            yield _part(file, row, launches=launches)
    except Exception as error:
        raise _damaged(file, error) from error


def _rows(file: Path) -> Iterator[Any]:
    """One rank after the other. Raises whatever is wrong with a damaged file."""
    _, parquet = _pyarrow(f"reading {file}")
    beside_of(file)
    with parquet.ParquetFile(file) as stored:
        groups = [stored.metadata.row_group(at) for at in range(stored.num_row_groups)]
        refuse_large(file, sum(each.total_byte_size for each in groups), error=TraceError)
        for number in range(stored.num_row_groups):
            yield from stored.read_row_group(number).to_batches()


Numbers = np.ndarray[Any, np.dtype[np.int64]]


def _packed(name: str, numbers: Mapping[str, Numbers]) -> bytes:
    """An array as bytes that zstd makes small: equal bytes of all numbers beside each other.

    Durations stand in the order of their names, since those of one name are alike. A list of
    Parquet would take twice the room for times, and be smaller in the file than in memory.
    """
    values = numbers[name]
    if name == "dur":
        values = values[np.argsort(numbers["name"], kind="stable")]
    elif name in _GROWING:
        values = np.diff(values, prepend=0)
    return values.astype("<i8").view(np.uint8).reshape(-1, 8).T.tobytes()


def _unpacked(name: str, packed: bytes, names: Numbers | None = None) -> Numbers:
    """The inverse of `_packed`. names: codes of the activities, for their durations."""
    planes = np.frombuffer(packed, np.uint8).reshape(8, -1)
    values = np.ascontiguousarray(planes.T).view("<i8").ravel().astype(np.int64)
    if names is not None:
        durations = np.empty_like(values)
        durations[np.argsort(names, kind="stable")] = values
        return durations
    return np.cumsum(values) if name in _GROWING else values


def _numbers(part: RankActivities) -> dict[str, Numbers]:
    calls, objects = part.calls, {"": part, "launches": part.launches, "calls": part.calls}
    numbers = {
        column: np.zeros(0, np.int64)
        if (rows := objects[name]) is None
        else np.asarray(getattr(rows, field), np.int64)
        for column, (name, field) in _COLUMNS.items()
    }
    for column, texts in (
        (_GROUP, calls.group if calls else ()),
        (_OPERATION, calls.operation if calls else ()),
    ):
        codes = {text: code for code, text in enumerate(dict.fromkeys(texts))}
        numbers[column] = np.array([codes[text] for text in texts], np.int64)
    return numbers


def _rest(file: Path, part: RankActivities) -> str:
    calls = part.calls
    rest = _Rest(
        file=file.name,
        rank=part.rank,
        names=[*part.names],
        kinds=[*part.kinds],
        steps=[*part.steps],
        source=part.source,
        notes=[*part.notes],
        partial=part.partial,
        unusable=part.unusable,
        run=dict(part.run),
        recording=part.recording,
        clock_ns=part.clock_ns,
        unrecorded=None if part.unrecorded is None else asdict(part.unrecorded),
        host=part.host,
        has_launches=part.launches is not None,
        groups=None if calls is None else list(dict.fromkeys(calls.group)),
        operations=None if calls is None else list(dict.fromkeys(calls.operation)),
    )
    return msgspec.json.encode(rest).decode()


def _part(file: Path, row: Any, *, launches: bool) -> tuple[Path, RankActivities]:
    rest = msgspec.json.decode(row.column("rest")[0].as_py(), type=_Rest)

    def numbers(column: str) -> Any:
        packed = row.column(column)[0].as_py()
        return _unpacked(column, packed, numbers("name") if column == "dur" else None)

    fields: dict[str, dict[str, Any]] = {"": {}, "launches": {}, "calls": {}}
    for column, (name, field) in _COLUMNS.items():
        fields[name][field] = numbers(column)
    _refuse_contradictions(fields, rest)
    calls = None
    if rest.groups is not None and rest.operations is not None:
        calls = CollectiveCalls(
            group=[rest.groups[code] for code in numbers(_GROUP).tolist()],
            operation=[rest.operations[code] for code in numbers(_OPERATION).tolist()],
            **fields["calls"],
        )
    launched = fields["launches"] | {"is_graph": fields["launches"]["is_graph"].astype(bool)}
    return file / rest.file, RankActivities(
        rank=rest.rank,
        names=rest.names,
        kinds=rest.kinds,
        steps=rest.steps,
        source=rest.source,
        notes=rest.notes,
        partial=rest.partial,
        calls=calls,
        launches=Launches(**launched) if launches and rest.has_launches else None,
        unusable=rest.unusable,
        run=rest.run,
        recording=rest.recording,
        clock_ns=rest.clock_ns,
        unrecorded=None if rest.unrecorded is None else Unrecorded(**rest.unrecorded),
        host=rest.host,
        **fields[""],
    )


def _refuse_contradictions(fields: dict[str, dict[str, Any]], rest: _Rest) -> None:
    """Raises ValueError for numbers that cannot be of one rank: a file that was changed."""
    whole, launched, called = fields[""], fields["launches"], fields["calls"]
    if any(len({len(each) for each in same.values()}) > 1 for same in fields.values()):
        raise ValueError("its columns are not equally long")
    for values, number in (
        (whole["name_codes"], len(rest.names)),
        (whole["kind_codes"], len(rest.kinds)),
        (called["row"], len(whole["start"])),
        (launched["step"] + 1, len(rest.steps) + 1),
    ):
        if len(values) and not 0 <= values.min() <= values.max() < number:
            raise ValueError("a number names nothing")
    if len(whole["dur"]) and whole["dur"].min() < 0:
        raise ValueError("a duration is negative")


def _pyarrow(doing: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TraceError(
            f"{doing} needs pyarrow, which is not installed here",
            expected="the package pyarrow",
            hint="pip install 'pytest-sglprof[parquet]'",
        ) from error
    return pyarrow, pyarrow.parquet


def _damaged(file: Path, error: Exception) -> TraceError:
    return (
        error
        if isinstance(error, TraceError)
        else TraceError(
            f"{file} is damaged: {type(error).__name__}",
            expected="a file that sglprof reduce wrote, as a whole",
            hint="reduce the traces again",
        )
    )
