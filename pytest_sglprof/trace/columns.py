"""The activities of one file as numpy columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_sglprof.trace.arrays import Ints
from pytest_sglprof.trace.kineto import Batch

_NARROW = (("name", "i4"), ("kind", "i1"), ("graph", "i1"), ("device", "i2"), ("owner", "i2"))


@dataclass(frozen=True)
class Calls:
    """Collectives of which the process group is known; parallel arrays.

    group: code of the file's own table. sequence: its number in the group; external: the
    id that its announcement has; -1 where they are not known.
    """

    group: npt.NDArray[Any]
    sequence: npt.NDArray[Any]
    external: npt.NDArray[Any]


@dataclass(frozen=True)
class Columns:
    """Parallel arrays; start is int64 ns, dur ns, all but start the smallest integers that fit.

    name, owner: codes of the file's own tables. kind: of `kineto.KINDS`. graph: 1 for the
    node of a graph. call: index into `calls`, -1 for none; None when no row has one.
    """

    start: Ints
    dur: npt.NDArray[Any]
    name: npt.NDArray[Any]
    kind: npt.NDArray[Any]
    stream: npt.NDArray[Any]
    correlation: npt.NDArray[Any]
    graph: npt.NDArray[Any]
    device: npt.NDArray[Any]
    owner: npt.NDArray[Any]
    call: npt.NDArray[np.int32] | None = None
    calls: Calls | None = None

    def __len__(self) -> int:
        return len(self.start)

    def take(self, chosen: npt.NDArray[Any]) -> Columns:
        """The rows that a mask or indices select."""
        own = vars(self)
        taken = {key: own[key][chosen] for key in own if key not in ("call", "calls")}
        call = None if self.call is None else self.call[chosen]
        return Columns(**taken, call=call, calls=self.calls)


def joined(batches: Sequence[Batch]) -> Columns:
    """All batches of a file in one."""
    columns: dict[str, Any] = {}
    for key in ("start", "dur"):
        parts = [exact_ns(getattr(batch, key), batch.exact) for batch in batches]
        columns[key] = np.concatenate([np.empty(0, np.int64), *parts])
    columns["dur"] = _compact(columns["dur"])
    for key, kind in _NARROW:
        arrays = [np.asarray(getattr(batch, key)) for batch in batches]
        columns[key] = np.concatenate([np.empty(0, kind), *arrays]).astype(kind, copy=False)
    for key in ("stream", "correlation"):
        arrays = [np.asarray(getattr(batch, key)) for batch in batches]
        columns[key] = _compact(np.concatenate([np.empty(0, np.int64), *arrays]))
    return Columns(**columns, **_calls(batches))


def _calls(batches: Sequence[Batch]) -> dict[str, Any]:
    """`call` and `calls` of the batches; nothing where no process group is known."""
    if not any(len(batch.call_row) for batch in batches):
        return {}
    sizes = np.array([len(batch) for batch in batches])
    calls = Calls(
        *(
            np.concatenate([np.asarray(getattr(batch, key)) for batch in batches])
            for key in ("call_group", "call_sequence", "call_external")
        )
    )
    before = (np.cumsum(sizes) - sizes).tolist()
    rows = [np.asarray(b.call_row) + at for b, at in zip(batches, before, strict=True)]
    call = np.full(int(sizes.sum()), -1, np.int32)
    call[np.concatenate(rows)] = np.arange(len(calls.group))
    return {"call": call, "calls": calls}


def exact_ns(times: Any, exact: bool) -> Ints:
    """Exact ns of a batch's `start` or `dur`.

    See the module text of `kineto` for why the fraction rounds right.
    """
    values = np.asarray(times)
    if exact:
        return np.asarray(values, dtype=np.int64)
    whole = np.floor(values)
    fraction = np.rint((values - whole) * 1000.0)
    ns: Ints = whole.astype(np.int64) * 1000 + fraction.astype(np.int64)
    return ns


def _compact(values: Ints) -> npt.NDArray[Any]:
    small = np.iinfo(np.int32)
    fits = not len(values) or (values.min() >= small.min and values.max() <= small.max)
    return values.astype(np.int32) if fits else values
