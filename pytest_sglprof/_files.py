"""Writes files completely or not at all, and makes safe file names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+@-]+")
MAX_NAME_BYTES = 120  # a file system allows 255; suffixes, ranks and temporary names are added


def safe_name(text: str, *, limit: int = MAX_NAME_BYTES) -> str:
    """A safe file name for any string (a pytest node id, a kernel name).

    Unsafe characters become ``_``. A changed or cut name ends in a hash of the original, so
    that different strings get different names.
    """
    name = _UNSAFE.sub("_", text).strip("._") or "_"
    if name == text and len(name) <= limit:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[: limit - 9]}-{digest}"


@contextlib.contextmanager
def atomic_writer(path: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path`, renamed to it if the body raises nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def atomic_write(path: Path, data: bytes | str, *, mode: int = 0o644) -> None:
    """Writes `data` so that `path` holds all of it, or its old content if writing fails."""
    with atomic_writer(path, mode=mode) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
