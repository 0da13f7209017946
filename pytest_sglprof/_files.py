"""Files that are never half written, and names that are always safe."""

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
    """A file name made from any text (a pytest node id, a kernel name).

    Unsafe characters become ``_``; a changed or cut name ends in a hash of the
    original, so that two different texts never share a name.
    """
    name = _UNSAFE.sub("_", text).strip("._") or "_"
    if name == text and len(name) <= limit:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[: limit - 9]}-{digest}"


@contextlib.contextmanager
def atomic_writer(path: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Writes to a temporary file beside `path`; renames it only when the body ends well."""
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
    """Writes `data` so that `path` holds either the old content or all of the new one."""
    with atomic_writer(path, mode=mode) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
