"""Exports an nsys report to SQLite or Parquet, without the credentials in it."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_sglprof._errors import NsysError
from pytest_sglprof._nsys import NsysTool, run
from pytest_sglprof._redact import HIDDEN, is_secret_env, redact_text

_HELP_TIMEOUT = 30.0  # s
_ASSIGNMENT = re.compile(rb"([A-Za-z_][A-Za-z0-9_]*)=.", re.S)
_AMONG_OTHERS = re.compile(rb"(^|[;\n])([A-Za-z_][A-Za-z0-9_]*)=([^;\n]+)")


def export(
    tool: NsysTool,
    report: Path,
    kind: Literal["sqlite", "parquet"],
    target: Path,
    timeout: float,
) -> Path:
    """Exports `report` to `target`: a SQLite file, or a folder of Parquet files.

    The target is written completely or not at all, and replaces an existing one. Since nsys
    puts the environment of every readable process into a report, the values of variables that
    are named like credentials are hidden. A SQLite export also records which report it was
    made from (see `exported_from`). Raises `NsysError`.
    """
    if not report.is_file():
        raise NsysError(f"{report}: no such report", expected="a .nsys-rep file")
    target.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".sqlite" if kind == "sqlite" else ""
    partial = target.with_name(f".{target.name[:80]}.{threading.get_native_id()}.partial{suffix}")
    option = "sqlite" if kind == "sqlite" else "parquetdir"
    words = [f"--type={option}", "--force-overwrite=true", f"--output={partial}", str(report)]
    origin = origin_of(report) if kind == "sqlite" else None  # before nsys reads it
    try:
        process = run([tool.path, "export", *words], timeout)
        if process.returncode != 0 or not partial.exists():
            raise NsysError(
                f"nsys {tool.version} could not export {report} as {kind} "
                f"(exit {process.returncode})",
                expected="a complete report, written by this nsys or an older one",
                hint="if a newer nsys wrote the report, export it with that one",
                log=process.stdout.strip().splitlines()[-8:],
            )
        if origin is not None:
            hide_credentials(partial)
            sign(partial, origin)
        else:
            _hide_in_folder(partial)
        _put(partial, target)
    finally:
        _remove(partial)
    return target


def can_export_parquet(tool: NsysTool) -> bool:
    """Whether this nsys writes folders of Parquet files."""
    with contextlib.suppress(NsysError):
        return "parquetdir" in run([tool.path, "export", "--help"], _HELP_TIMEOUT).stdout
    return False


def exported_from(database: Path) -> str:
    """The digest of the report that a SQLite file was made from; "" if it is not recorded."""
    origin = signed_origin(database)
    return origin.whole if origin else ""


def _put(partial: Path, target: Path) -> None:
    """Moves an export to its place. An old folder is moved away first, an old file replaced."""
    if not target.is_dir():
        partial.replace(target)
        return
    old = partial.with_name(f"{partial.name}.old")
    target.rename(old)
    partial.replace(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def hide_credentials(database: Path) -> int:
    """Hides secrets in every string of an export; returns the number of changed rows."""
    changed = 0
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA secure_delete = ON")  # else the old text stays in the file
        tables = _text_columns(connection)
        connection.text_factory = bytes  # environments may hold any bytes
        for table, column in tables:
            rows = connection.execute(
                f'SELECT rowid, "{column}" FROM "{table}" WHERE "{column}" IS NOT NULL'
            )
            hidden = [(safe, row) for row, text in rows if (safe := _hide(text)) != text]
            connection.executemany(
                f'UPDATE "{table}" SET "{column}" = CAST(? AS TEXT) WHERE rowid = ?', hidden
            )
            changed += len(hidden)
        connection.commit()
    return changed


def _text_columns(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return [
        (table, name)
        for (table,) in tables
        for _, name, kind, *_ in connection.execute(f'PRAGMA table_info("{table}")').fetchall()
        if kind.upper() == "TEXT"
    ]


def _hide_in_folder(folder: Path) -> None:
    """Hides secrets in Parquet files; without pyarrow removes the files with environments."""
    for file in folder.glob("*.parquet"):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            if file.stem == "StringIds" or file.stem.startswith(("TARGET_INFO", "META_DATA")):
                file.unlink()
            continue
        try:
            schema = pyarrow.parquet.read_schema(file)
            names = [field.name for field in schema if pyarrow.types.is_string(field.type)]
            texts = pyarrow.parquet.read_table(file, columns=names)
            safe = {name: _hidden_column(texts[name]) for name in names}
            if any(not column.equals(texts[name]) for name, column in safe.items()):
                table = pyarrow.parquet.read_table(file)
                for name, column in safe.items():
                    at = table.schema.get_field_index(name)
                    table = table.set_column(at, table.schema.field(at), column)
                pyarrow.parquet.write_table(table, file)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise NsysError(
                f"nsys wrote {file.name}, which cannot be read: {error}",
                expected="a complete Parquet export",
                hint="export to SQLite instead",
            ) from error


def _hidden_column(column: Any) -> Any:
    """A chunked array of strings with secrets hidden. Each distinct string is looked at once."""
    import pyarrow

    safe = {text: text and _hidden(text) for text in column.unique().to_pylist()}
    return pyarrow.chunked_array([[safe[text] for text in column.to_pylist()]], column.type)


def _hidden(text: str) -> str:
    raw = text.encode("utf-8", errors="surrogateescape")
    return _hide(raw).decode("utf-8", errors="replace")


def _hide(text: bytes) -> bytes:
    """`A=1;MY_TOKEN=x` with the value of MY_TOKEN and known secrets hidden. NUL also separates."""
    if b"\0" in text:  # a whole environment, whose values may hold anything else
        return b"\0".join(map(_hide, text.split(b"\0")))
    assignment = _ASSIGNMENT.match(text)
    if assignment and _is_secret(assignment[1]):
        return assignment[1] + b"=" + HIDDEN.encode()
    if b"=" in text:
        text = _AMONG_OTHERS.sub(
            lambda m: m[1] + m[2] + b"=" + HIDDEN.encode() if _is_secret(m[2]) else m[0], text
        )
    known_hidden = redact_text(text.decode("utf-8", errors="surrogateescape"))
    return known_hidden.encode("utf-8", errors="surrogateescape")


def _is_secret(name: bytes) -> bool:
    return is_secret_env(name.decode("ascii"))


# Recording which report an export was made from, so that reports of gigabytes are not read again.

EDGE = 1 << 20  # bytes at each end of a report that are sampled
BLOCK = 1 << 16  # bytes of each block between them
BLOCKS = 64
_PIECE = 1 << 20  # bytes read at once
_SIGNATURE = "SGLPROF_EXPORT"  # table in an export


@dataclass(frozen=True)
class Origin:
    """What an export records about its report.

    sample: SHA-256 of its size and sampled bytes (see `sample_of`). modified: Unix time in ns
    at which it was written. whole: SHA-256 of all its bytes. Digests may be cut to their first
    digits, and are "" if unknown.
    """

    sample: str
    modified: int
    whole: str

    def is_of(self, report: Path) -> bool:
        """True if `report` is the report that was exported.

        It is if size, time and sampled bytes agree. So a report of more than 6 MB would pass
        if bytes outside of the samples were changed and its time set back. Two recordings are
        never that similar: they are compressed, and differ from their first time stamps on.
        If only the time differs, as for a copy, all bytes are compared.
        """
        if not sample_of(report).startswith(self.sample):
            return False
        if self.sample and self.modified == report.stat().st_mtime_ns:
            return True
        return bool(self.whole) and digest_of(report).startswith(self.whole)


def origin_of(report: Path) -> Origin:
    """What an export of `report` will record; reads all of the report."""
    return Origin(sample_of(report), report.stat().st_mtime_ns, digest_of(report))


def sample_of(report: Path) -> str:
    """SHA-256 of a file's size, its two ends and blocks spread evenly between them.

    A file of up to 6 MB is read completely.
    """
    size = report.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with report.open("rb") as stream:
        if size <= 2 * EDGE + BLOCKS * BLOCK:
            digest.update(stream.read())
            return digest.hexdigest()
        digest.update(stream.read(EDGE))
        between = size - 2 * EDGE - BLOCK
        for number in range(BLOCKS):
            stream.seek(EDGE + between * number // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
        stream.seek(size - EDGE)
        digest.update(stream.read(EDGE))
    return digest.hexdigest()


def digest_of(report: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with report.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def sign(database: Path, origin: Origin) -> None:
    """Records in a SQLite export which report it was made from."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute(
            f"CREATE TABLE {_SIGNATURE} (report_sha256 TEXT, sample TEXT, modified_ns INTEGER)"
        )
        connection.execute(
            f"INSERT INTO {_SIGNATURE} VALUES (?, ?, ?)",
            (origin.whole, origin.sample, origin.modified),
        )
        connection.commit()


def signed_origin(database: Path) -> Origin | None:
    """What `sign` wrote into a SQLite export; None if it is not signed."""
    uri = f"{database.absolute().as_uri()}?mode=ro&immutable=1"
    with (
        contextlib.suppress(sqlite3.Error, TypeError, ValueError),
        contextlib.closing(sqlite3.connect(uri, uri=True)) as connection,
    ):
        whole, *more = connection.execute(f"SELECT * FROM {_SIGNATURE}").fetchone()
        sample, modified = more or ("", 0)  # older exports recorded only this digest
        return Origin(str(sample), int(modified), str(whole))
    return None
