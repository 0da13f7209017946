"""Which report an export was made of, known without reading reports of gigabytes again."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path

EDGE = 1 << 20  # bytes at each end of a report that are looked at
BLOCK = 1 << 16  # bytes of each block between them
BLOCKS = 64
_PIECE = 1 << 20  # bytes read at once
_SIGNATURE = "SGLPROF_EXPORT"  # our table in an export


@dataclass(frozen=True)
class Origin:
    """A report, as far as an export remembers it.

    sample: SHA-256 of its size and its sampled bytes (see `sample_of`). modified: when it
    was written, Unix ns. whole: SHA-256 of all its bytes. Digests may be cut to their first
    digits, and are "" where they are not known.
    """

    sample: str
    modified: int
    whole: str

    def is_of(self, report: Path) -> bool:
        """Whether `report` is that one.

        Where size, time and sampled bytes agree it is: a report of more than 6 MB whose
        bytes were changed outside of the samples, and whose time was set back, would pass.
        Two recordings are never that alike: they are compressed, and differ from their
        first times on. Where only the time differs (a copy), all bytes are compared.
        """
        if not sample_of(report).startswith(self.sample):
            return False
        if self.sample and self.modified == report.stat().st_mtime_ns:
            return True
        return bool(self.whole) and digest_of(report).startswith(self.whole)


def origin_of(report: Path) -> Origin:
    """What an export of `report` is to remember; reads all of it."""
    return Origin(sample_of(report), report.stat().st_mtime_ns, digest_of(report))


def sample_of(report: Path) -> str:
    """SHA-256 of a file's size, its two ends and blocks spread evenly between them.

    Of a file of up to 6 MB these are all its bytes.
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
    """Writes into a SQLite export which report it was made of."""
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
    """What `sign` wrote into a SQLite export; None where nothing is written."""
    uri = f"{database.absolute().as_uri()}?mode=ro&immutable=1"
    with (
        contextlib.suppress(sqlite3.Error, TypeError, ValueError),
        contextlib.closing(sqlite3.connect(uri, uri=True)) as connection,
    ):
        whole, *more = connection.execute(f"SELECT * FROM {_SIGNATURE}").fetchone()
        sample, modified = more or ("", 0)  # an older export knows its report by all bytes only
        return Origin(str(sample), int(modified), str(whole))
    return None
