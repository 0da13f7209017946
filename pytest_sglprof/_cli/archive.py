"""A `.zip` that CI kept: unpacked into a folder that is removed when the command ends.

Whoever made the archive may have meant harm: nothing is written outside of that folder, and no
more than the disk can hold.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import time
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory

from pytest_sglprof._errors import SglprofError

MOST_FILES = 100_000
MOST_RATIO = 200  # unpacked / packed; results.json shrinks to a 20th, zeros to a 1000th
SMALL = 256 * 2**20  # bytes; up to here no ratio is suspicious
SPARE = 0.9  # of the free space
_PIECE = 1 << 20  # bytes copied at once
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError),
    NotImplementedError,  # a compression that Python does not know
    *(FileExistsError, NotADirectoryError, IsADirectoryError),  # one name twice
)


def is_archive(path: Path) -> bool:
    """Whether a file is a zip, by its name and its first bytes.

    Under the name of a trace it is a mistake, which the reader of traces names.
    """
    if path.suffix.lower() != ".zip":
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    except OSError:
        return False


def unpacked(archive: Path, temporary: ExitStack) -> Path:
    """A folder with the files of the archive, which goes when `temporary` is closed.

    Links are left out. Raises `SglprofError` for what is damaged, encrypted, too large, or
    would be written elsewhere; then nothing is left.
    """
    folder = Path(temporary.enter_context(TemporaryDirectory(prefix="sglprof-")))
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [each for each in opened.infolist() if not each.is_dir()]
            _refuse(archive, entries, folder)
            for entry in entries:
                if not stat.S_ISLNK(entry.external_attr >> 16):
                    _write(opened, entry, folder / entry.filename)
    except _DAMAGED as error:
        raise SglprofError(
            f"{archive} cannot be unpacked: {error}",
            expected="a complete .zip, as CI offers it for download",
            hint="download it again, or unpack it and give the folder",
        ) from error
    return folder


def _refuse(archive: Path, entries: list[zipfile.ZipInfo], folder: Path) -> None:
    """Raises `SglprofError` where unpacking could do harm."""
    outside = next((each.filename for each in entries if _leads_out(each.filename)), None)
    if outside is not None:
        raise _refusal(archive, f"its entry {outside!r} lies outside of it", "relative paths")
    if locked := next((each.filename for each in entries if each.flag_bits & 1), None):
        raise _refusal(archive, f"{locked} is encrypted", "files without a password")
    if len(entries) > MOST_FILES:
        raise _refusal(archive, f"it has {len(entries):,} files", f"at most {MOST_FILES:,}")
    size = sum(each.file_size for each in entries)
    packed = max(1, archive.stat().st_size)
    if size > max(SMALL, MOST_RATIO * packed):
        much = f"{packed / 1e6:,.1f} MB would become {size / 1e6:,.0f} MB"
        raise _refusal(archive, much, f"at most {MOST_RATIO} times its size")
    free = int(SPARE * shutil.disk_usage(folder).free)
    if size > free:
        much = f"it needs {size / 1e6:,.0f} MB in {folder.parent}"
        raise _refusal(archive, much, f"at most {free / 1e6:,.0f} MB (TMPDIR names another disk)")


def _refusal(archive: Path, what: str, expected: str) -> SglprofError:
    return SglprofError(
        f"{archive} is not unpacked: {what}",
        expected=expected,
        hint="if you trust it, unpack it yourself and give the folder",
    )


def _leads_out(name: str) -> bool:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return bool(posix.is_absolute() or windows.drive or ".." in (*posix.parts, *windows.parts))


def _write(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Writes one file, of no more bytes than the archive said: `ZipFile` reads no further."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(entry) as source, target.open("xb") as stream:
        shutil.copyfileobj(source, stream, _PIECE)
    written = time.mktime(
        (*entry.date_time, 0, 0, -1)
    )  # whether an export is older than its report
    os.utime(target, (written, written))
