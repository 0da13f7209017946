"""Writes files completely or not at all, makes safe file names, and JSON for people."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

# In the folder of a run.
RESULTS = "results.json"
RUN_FILE = "run.json"  # marks the folder
JOURNAL = "journal.jsonl"  # until the run has ended

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
    forget = partial(_remove, temporary, os.getpid())
    atexit.register(forget)  # a third Ctrl-C may interrupt the removal below
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        forget()  # it is there no more once it has its name
        atexit.unregister(forget)


def _remove(temporary: str, owner: int) -> None:
    if os.getpid() != owner:  # at the end of a process that was forked meanwhile
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)


def atomic_write(path: Path, data: bytes | str, *, mode: int = 0o644) -> None:
    """Writes `data` so that `path` holds all of it, or its old content if writing fails."""
    with atomic_writer(path, mode=mode) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)


def unwritten(name: str, error: Exception) -> str:
    """One line for a file that could not be written. Only errors of the system are expected."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    else:
        first = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first} (a bug of pytest-sglprof: please report it)"
    return f"{name} could not be written: {reason}"


def json_text(value: Any, is_one_line: Callable[[Any], bool], *, is_sorted: bool = False) -> str:
    """JSON for people and for `diff`: one item a line, but `is_one_line` values on one.

    is_sorted: by key, so that equal values are equal texts.
    """
    import msgspec  # not with the plugin: most runs of pytest write nothing

    encoder = msgspec.json.Encoder(order="sorted" if is_sorted else None)

    def encoded(value: Any) -> str:
        return encoder.encode(value).decode()

    def items(value: Any) -> list[tuple[Any, Any]]:
        if isinstance(value, msgspec.Struct):
            names = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
            pairs = [(encoded, getattr(value, name)) for encoded, name in names]
        elif dataclasses.is_dataclass(value):
            names_of = (field.name for field in dataclasses.fields(value))
            pairs = [(name, getattr(value, name)) for name in names_of]
        else:
            pairs = list(value.items()) if isinstance(value, dict) else []
        return sorted(pairs, key=lambda pair: str(pair[0])) if is_sorted else pairs

    def lines(value: Any, line: str) -> Iterator[str]:
        mark, end = "[]" if isinstance(value, list | tuple) else "{}"
        parts = list(value) if mark == "[" else items(value)
        if not parts or is_one_line(value):
            yield encoded(value)
            return
        for part in parts:
            yield f"{mark}{line} "
            if end == "}":
                yield f"{encoded(part[0])}: "
            yield from lines(part if end == "]" else part[1], f"{line} ")
            mark = ","
        yield f"{line}{end}"

    return "".join(lines(value, "\n")) + "\n"
