"""Values as a stored document may hold them, and times as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec

from pytest_sglprof.redact import HIDDEN, is_secret_name, redact_text

T = TypeVar("T")


def storable(value: T) -> T:
    """`value` without secrets, and with None for each NaN or ±inf, which JSON cannot hold.

    Walks Structs, dataclasses, dicts, lists and tuples. What holds nothing of the kind comes
    back as it is, not copied: a window has millions of numbers. An interval (a field of that
    name) with an end that is not finite is None as a whole.
    """
    stored: T = _storable(value)
    return stored


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        text = redact_text(value)
        return value if text == value else text
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, msgspec.Struct):
        changes = _changes(value, value.__struct_fields__)
        return msgspec.structs.replace(value, **changes) if changes else value
    if isinstance(value, list | tuple):
        if all(type(item) is int for item in value):
            return value
        items = [_storable(item) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if isinstance(value, dict):
        entries = {key: _storable_item(str(key), item) for key, item in value.items()}
        return value if all(entries[key] is item for key, item in value.items()) else entries
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = _changes(value, tuple(field.name for field in dataclasses.fields(value)))
        return dataclasses.replace(value, **changes) if changes else value
    return value


def _changes(value: object, names: tuple[str, ...]) -> dict[str, Any]:
    changes = {}
    for name in names:
        old = getattr(value, name)
        new = _storable(old)
        if name.endswith("interval") and new is not None and None in new:
            new = None
        if new is not old:
            changes[name] = new
    return changes


def _storable_item(key: str, item: Any) -> Any:
    hidden = item and isinstance(item, str) and is_secret_name(key)
    return HIDDEN if hidden else _storable(item)


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


@overload
def utc(moment: float | str) -> str: ...
@overload
def utc(moment: float | str | None) -> str | None: ...
def utc(moment: float | str | None) -> str | None:
    """Unix time in seconds as `2026-11-24T06:08:42.123Z`; text and None stay as they are."""
    if moment is None or isinstance(moment, str):
        return moment
    text = datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
