"""Values as plain JSON data, and times as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """A copy that JSON can hold: str keys, lists, finite numbers; NaN and ±inf become None.

    Takes dataclasses, mappings, sequences, sets, paths and numpy scalars. Raises TypeError
    for anything else, so that nothing enters a document by its `repr`.
    """
    if value is None or isinstance(value, str | bool | int):
        return value if not isinstance(value, int) or type(value) in (bool, int) else int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if all(type(item) is int for item in value):  # the long lists of a window
            return list(value)
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} has no place in a results document")


def unix_ns(text: str) -> int:
    """The Unix time in ns of what `utc` wrote."""
    return round(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000) * 10**6


def utc(moment: float | str | None) -> str | None:
    """Unix time in seconds as `2026-11-24T06:08:42.123Z`; text and None stay as they are."""
    if moment is None or isinstance(moment, str):
        return moment
    text = datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
