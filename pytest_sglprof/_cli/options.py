"""Options that commands share, as parents of argparse, and what they select."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pytest_sglprof._config.options import OPTIONS
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._files import JOURNAL, RESULTS, RUN_FILE
from pytest_sglprof._limits import UNDECODABLE, refuse_odd
from pytest_sglprof._metrics import METRICS
from pytest_sglprof._ranks import rank_order
from pytest_sglprof._verdict.wording import text_table

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._run.measure import WindowFiles
    from pytest_sglprof._trace.table import KernelTable


NewParser = Callable[..., argparse.ArgumentParser]  # takes what argparse's `add_parser` takes
Format = Literal["table", "csv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
LATENESS = "lateness"  # how late the last rank of a sync group arrives; not in `METRICS`
_RUN_DEPTH = 4  # a trace is in RUN/windows/ID, or in a folder of its own in there


PATHS = "a run (its folder or results.json), a window (its folder), torch traces, nsys reports and "
PATHS += "exports, a folder of any of these, or a .zip of them, as CI keeps it"


def input_options(paths: str = "") -> argparse.ArgumentParser:
    """What to read, and how. paths: the help of PATH, "" for a command that names them itself."""
    parser = argparse.ArgumentParser(add_help=False)
    if paths:
        parser.add_argument("paths", nargs="+", metavar="PATH", help=paths)
    group = parser.add_argument_group("input")
    group.add_argument(
        "--window",
        default="",
        metavar="ID",
        help="which window to read, by its id or name; needed where there are several",
    )
    group.add_argument(
        "--rank",
        action="append",
        default=[],
        type=_owner_and_label,
        metavar="PID|FILE=LABEL",
        help="rank of a process in an nsys report, for example 31205=TP0, or of a file whose rank "
        "nothing tells, for example trace_7.json=TP1; can be repeated",
    )
    group.add_argument(
        "--server-info",
        type=Path,
        metavar="FILE",
        help="what the server answered to /server_info, from which its settings are read "
        "(default: server_info.json beside the traces)",
    )
    group.add_argument(
        "--allow-partial",
        action="store_true",
        help="read what is left of a truncated trace; a verdict on it is inconclusive",
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="compare ranks although their files are not of one run (other GPUs, other versions, "
        "other times)",
    )
    add_rows(group, "nsys", "step_delimiter", "executor")
    return parser


def select_options() -> argparse.ArgumentParser:
    """What to compare, and its limit."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("selection, instead of the thresholds of the configuration")
    group.add_argument(
        "--metric",
        choices=(*(row.name for row in METRICS.values() if not row.is_of_lives), LATENESS),
        help=f"default: slowdown. {LATENESS} (only here, not in thresholds): how late the last "
        "rank arrives at a collective, as a share of the work since the one before",
    )
    group.add_argument(
        "--limit",
        type=float,
        metavar="X",
        help="fail above X: a ratio, 1 or more, for slowdown and imbalance_factor; a share, "
        "0 to 1, for lost_share, spike_share, sync_lost_share, idle_share and lateness; ms for "
        "pass_wall",
    )
    group.add_argument(
        "--scope",
        help="compute (the default: all but communication and memory), communication, all, or a "
        "category such as moe",
    )
    group.add_argument(
        "--kernel", metavar="REGEX", help="kernels whose name matches, instead of a scope"
    )
    group.add_argument("--stage", help="only steps of one stage: decode, prefill, mixed or idle")
    group.add_argument(
        "--across",
        metavar="peers|sync",
        help="which ranks are compared: peers, those with the same input, or sync, all that meet "
        "in collectives, at equal work (default: peers, or sync where no rank has a peer)",
    )
    add_rows(group, "min_steps", "min_share")
    return parser


def output_options(
    file: str = "write to FILE instead of printing", form: str = ""
) -> argparse.ArgumentParser:
    """Where to write, and in which format. file, form: help of -o, start of that of --format."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("output")
    add_output_file(group, file)
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help=f"{form}table for people, csv or json for programs (default: table)",
    )
    return parser


def table_options(keys: Sequence[str], what: str = "rows") -> argparse.ArgumentParser:
    """How many rows a table has, and in which order. keys: by which it can be sorted."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("table")
    group.add_argument("--top", type=count, metavar="N", help=f"only the first N {what}")
    group.add_argument(
        "--sort",
        choices=keys,
        metavar="KEY",
        help=f"order of the {what}: numbers from the largest on, text from A to Z; one of "
        f"{', '.join(keys)}",
    )
    return parser


def settings_options() -> argparse.ArgumentParser:
    """Which configuration to use, and what to change in it."""
    parser = argparse.ArgumentParser(add_help=False)
    add_rows(parser.add_argument_group("settings"), "config", "set")
    return parser


def add_output_file(
    parser: argparse._ActionsContainer, text: str = "write to FILE instead of printing"
) -> None:
    """`-o FILE`. text: its help."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=text)


def add_rows(parser: argparse._ActionsContainer, *names: str) -> None:
    """Adds the rows of the option table that have these names."""
    for option in OPTIONS:
        if option.name in names:
            assert option.command, f"{option.name}: set command=True in its row"
            action = "append" if option.kind == "list" else "store"
            parser.add_argument(
                option.flag,
                dest=option.name,
                action=action,
                metavar=option.metavar,
                help=option.help.replace("%", "%%"),
            )


def settings_of(args: argparse.Namespace, paths: Iterable[str | Path] = ()) -> Settings:
    """The settings of a command that reads `paths`.

    They come from `--config`, else from the run that wrote the paths, else from the configuration
    file that is nearest to the working folder. Options and the environment change them.
    """
    from pytest_sglprof._config.load import read_settings

    here = Path.cwd()
    return read_settings(
        {option.name: getattr(args, option.name, None) for option in OPTIONS if option.command},
        os.environ,
        start=[here],
        rootdir=here,
        invocation_dir=here,
        of_pytest=False,
        stored=stored_configuration(paths),
    )


def stored_configuration(paths: Iterable[str | Path]) -> tuple[Path, dict[str, Any]] | None:
    """The first run.json in or above one of `paths`, and the configuration in it."""
    for path in paths:
        resolved = Path(os.path.realpath(path))
        for folder in (resolved, *resolved.parents)[: _RUN_DEPTH + 1]:
            try:
                content = json.loads((folder / RUN_FILE).read_bytes())
                refuse_odd(content)
            except (OSError, *UNDECODABLE):
                continue
            if isinstance(content, dict) and isinstance(content.get("settings"), dict):
                return folder / RUN_FILE, content["settings"]
    return None


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be a number above 0")
    return number


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _owner_and_label(text: str) -> tuple[int | str, str]:
    owner, _, label = text.rpartition("=")
    if not owner or not label.strip():
        raise argparse.ArgumentTypeError("must be PID=LABEL or FILE=LABEL, for example 31205=TP0")
    return int(owner) if owner.isdecimal() else owner, label.strip()


def given_ranks(args: argparse.Namespace) -> tuple[dict[int, str], dict[str, str]]:
    """The labels of `--rank` by process id, and by file."""
    given = dict(args.rank)
    by_pid = {owner: label for owner, label in given.items() if isinstance(owner, int)}
    return by_pid, {owner: label for owner, label in given.items() if isinstance(owner, str)}


# What a command reads (which files these are: `inputs.py`), and writes.


def read_table(
    files: WindowFiles,
    args: argparse.Namespace,
    settings: Settings,
    *,
    launches: bool = True,
    partial: bool = False,
) -> KernelTable:
    """The kernel table of a window; or `TraceError`.

    partial: also that of truncated traces, as with `--allow-partial`.
    """
    _import_numpy()
    from pytest_sglprof._run.measure import read_recorded

    return read_recorded(
        files,
        settings,
        allow_partial=partial or args.allow_partial,
        launches=launches,
        force=args.force,
    )


# By which OpenBLAS knows how many threads to start when numpy is imported.
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")


def _import_numpy() -> None:
    """Imports numpy with one thread for BLAS: those of all processors cost more than they save.

    A number that somebody set counts. What this process starts later inherits nothing of it.
    """
    if not os.environ.keys() & set(_BLAS_THREADS):
        os.environ[_BLAS_THREADS[0]] = "1"
        try:
            import numpy as np  # noqa: F401
        finally:
            del os.environ[_BLAS_THREADS[0]]


Record = Mapping[str, Any]
_Row = TypeVar("_Row", bound=Record)


@dataclass(frozen=True)
class Column:
    """One column. key: of the record. head: title in the table, by default the key.

    cell: turns a value into the text of the table. left: aligned left.
    """

    key: str
    head: str = ""
    cell: Callable[[Any], str] = str
    left: bool = False


def write_text(
    text: str,
    output: Path | None,
    inputs: Iterable[str | Path],
    slow: Collection[str] | None = None,
) -> None:
    """Prints `text`, or writes it to `output`, which must not be one of the `inputs`.

    slow: ranks that get colour on a terminal, as verdicts do; None for what gets none.
    """
    if output is None:
        from pytest_sglprof._cli.colour import coloured, wants_colour

        is_coloured = slow is not None and wants_colour(sys.stdout, os.environ)
        sys.stdout.write(coloured(text, slow or ()) if is_coloured else text)
        return
    from pytest_sglprof._files import atomic_write

    refuse_inputs(output, inputs)
    atomic_write(output, text)
    sys.stdout.write(f"{output}\n")


def ordered(records: Sequence[_Row], key: str | None, top: int | None = None) -> list[_Row]:
    """The first `top` records, sorted by `key`: numbers from the largest on; None comes last."""
    if key is None:
        return list(records)[:top]
    values = [record[key] for record in records]
    texts = [value for value in values if isinstance(value, str)]
    place = {text: at for at, text in enumerate(rank_order(set(texts)))}

    def order(record: _Row) -> tuple[bool, float]:
        value = record[key]
        return value is None, place[value] if isinstance(value, str) else -(value or 0)

    return sorted(records, key=order)[:top]


def write_notes(notes: Iterable[str]) -> None:
    """Writes a line for each to standard error."""
    sys.stderr.write("".join(f"note: {note}\n" for note in notes))


def milliseconds(ns: Any) -> str:
    """Milliseconds with three decimals; `wording.milliseconds` rounds them for prose."""
    return f"{int(ns) / 1e6:.3f}"


def render(records: Sequence[Record], columns: Sequence[Column], form: Format) -> str:
    """The records as text that ends in a newline. JSON also has the keys without a column."""
    if form == "json":
        return to_json(records)
    if form == "csv":
        return to_csv(records, [column.key for column in columns])
    rows = [[column.cell(record[column.key]) for column in columns] for record in records]
    left = [at for at, column in enumerate(columns) if column.left]
    lines = text_table([column.head or column.key for column in columns], rows, left=left)
    return "\n".join(lines) + "\n"


def to_json(value: Any) -> str:
    """Indented JSON; numbers that are not finite become null."""

    return json.dumps(json_value(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(records: Sequence[Record], keys: Sequence[str]) -> str:
    """CSV with a header line; None is an empty cell.

    Text that a spreadsheet would run as a formula gets an apostrophe before it (OWASP, "CSV
    Injection"): names of kernels and tests come from files of others.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(keys)
    for record in records:
        writer.writerow([_cell(json_value(record[key])) for key in keys])
    return stream.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return "" if value is None else value
    text = value.replace("\r", "\\r")  # which `csv` writes without quotes: it would end the row
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


GENERATOR = b'<meta name="generator" content="pytest-sglprof">'  # in the head of our pages


_HEAD = 4096  # bytes of a page that are searched for it


# What runs and servers record. No command writes such a file.
_RECORDS = (RESULTS, RUN_FILE, JOURNAL)
_RECORD_ENDINGS = (
    *(".trace.json", ".trace.json.gz", ".trace.json.zst"),
    *(".nsys-rep", ".qdstrm", ".sqlite", ".parquet", ".log", ".jsonl"),
)


def refuse_inputs(
    output: Path,
    inputs: Iterable[str | Path],
    *,
    option: str = "-o",
    which: str = "that are read",
) -> None:
    """Raises `SettingsError` if writing `output` would replace something that is read.

    inputs: files, and folders with everything recorded in them; links are followed.
    """
    for path in map(Path, inputs):
        if _is_same(output, path) or _is_record_in(output, path):
            raise SettingsError(
                f"{option} {output} is one of the files {which}",
                expected="a new file",
                hint="choose another name or another folder",
            )


def refuse_foreign(page: Path, *, hint: str) -> None:
    """Raises `SettingsError` if the default page would replace a file of somebody else."""
    if os.path.lexists(page) and not _is_our_page(page):
        raise SettingsError(
            f"{page} exists, and sglprof did not write it",
            expected="no file of that name, or a page of sglprof",
            hint=hint,
        )


def _is_same(output: Path, path: Path) -> bool:
    try:
        return output.samefile(path)
    except OSError:  # one of them does not exist
        return False


def _is_record_in(output: Path, folder: Path) -> bool:
    resolved = Path(os.path.realpath(output))
    if not folder.is_dir() or Path(os.path.realpath(folder)) not in resolved.parents:
        return False
    is_record = resolved.name in _RECORDS or resolved.name.endswith(_RECORD_ENDINGS)
    return is_record and resolved.exists()


def _is_our_page(page: Path) -> bool:
    try:
        with page.open("rb") as stream:
            return GENERATOR in stream.read(_HEAD)
    except OSError:
        return False


def json_value(value: Any) -> Any:
    """A copy that JSON can hold: str keys, lists, finite numbers; NaN and ±inf become None.

    Takes dataclasses, mappings, sequences, sets, paths and numpy scalars. Raises TypeError
    for anything else, so that nothing enters a document by its `repr`.
    """
    if value is None or isinstance(value, str | bool | int):
        return value if not isinstance(value, int) or type(value) in (bool, int) else int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((json_value(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: json_value(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return json_value(value.item())
    raise TypeError(f"{type(value).__name__} has no place in a results document")
