"""What is taken from one event of a Kineto trace, and the batches it travels in.

Times: a Kineto file writes µs with up to three decimals. While `ts` stays below 2**43 µs
(files with `baseTimeNanoseconds`), the nearest float64 is off by less than 0.49 ns, so
the integer part and the rounded fraction give exactly the ns of the text. Larger stamps
(older files, absolute) are converted from the text itself.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from pytest_sglprof._limits import UNDECODABLE

if TYPE_CHECKING:  # reader processes use this module, and start faster without numpy
    import numpy as np
    import numpy.typing as npt

    from pytest_sglprof._trace.table import Ints

FLOAT_LIMIT = float(2**43)  # µs; beyond it float64 cannot hold three decimals
KINDS = ("kernel", "memcpy", "memset", "launch", "op", "collective")
KERNEL, MEMCPY, MEMSET, LAUNCH, OPERATOR, COLLECTIVE = range(len(KINDS))
GPU_KINDS = frozenset({KERNEL, MEMCPY, MEMSET})
CPU_SPAN, GPU_SPAN = "user_annotation", "gpu_user_annotation"

# Of spans, only those on the CPU whose names begin with COMMUNICATION are activities.
KIND_OF_CATEGORY = {
    "kernel": KERNEL,
    "Kernel": KERNEL,
    "gpu_memcpy": MEMCPY,
    "Memcpy": MEMCPY,
    "gpu_memset": MEMSET,
    "Memset": MEMSET,
    "cuda_runtime": LAUNCH,
    "cuda_driver": LAUNCH,
    "hip_runtime": LAUNCH,
    "Runtime": LAUNCH,
    "Driver": LAUNCH,
    "cpu_op": OPERATOR,
    "Operator": OPERATOR,
    CPU_SPAN: COLLECTIVE,
    GPU_SPAN: COLLECTIVE,
}
# Categories of other accelerators, lower case, by device. Their kernels, where Kineto has them
# as such (XPU, PrivateUse1: NPU and others), are of category `kernel`. These are calls on the
# host, or events of which Kineto does not say whether they nest: named, but never added up.
OTHER_DEVICES = {
    "mtia_ccp_events": "MTIA",
    "mtia_runtime": "MTIA",
    "mtia_insight": "MTIA",
    "mtia_counters": "MTIA",
    "hpu_op": "HPU",
    "xpu_runtime": "XPU",
    "xpu_driver": "XPU",
    "xpu_sync": "XPU",
    "xpu_scope_profiler": "XPU",
    "privateuse1_runtime": "a PrivateUse1 device",
    "privateuse1_driver": "a PrivateUse1 device",
    "mlu_memcpy": "MLU",
    "mlu_memset": "MLU",
    "mlu_runtime": "MLU",
    "mlu_notifier": "MLU",
}
COMMUNICATION = ("gloo:", "nccl:", "mpi:")
SUBMITTED = "c10d::"  # asynchronous: their time is that of submitting, not of communicating
# torch.distributed describes a collective in an operator of this name; Kineto copies its
# process group, not its sequence number, to the kernel that it launched.
ANNOUNCEMENT = "record_param_comms"
PROCESS_GROUP: str = "Process Group Name"
SEQUENCE: str = "Seq"
OPERATION: str = "Collective name"
GROUP_SIZE: str = "Group size"


def communicates(kernel: str) -> bool:
    """Whether a kernel of this name, in an event with a process group, is a collective.

    A copy that torch.distributed launches beside its collective has a process group, too.
    """
    return "nccl" in kernel.lower()


_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Args(msgspec.Struct, gc=False, frozen=True):
    """The arguments of a GPU event that the table needs; absent ones are -1, 0 or "".

    group, sequence, operation, size: of a kernel that torch.distributed launched, what was asked
    for and by how many ranks; the sequence stands mostly only
    in the `ANNOUNCEMENT` operator of the same `external`.
    """

    device: _Int64 = -1
    context: _Int64 = -1
    stream: _Int64 = -1
    correlation: _Int64 = -1
    graph_node: _Int64 = msgspec.field(name="graph node id", default=0)
    external: _Int64 = msgspec.field(name="External id", default=-1)
    group: str = msgspec.field(name=PROCESS_GROUP, default="")
    sequence: _Int64 = msgspec.field(name=SEQUENCE, default=-1)
    operation: str = msgspec.field(name=OPERATION, default="")
    size: _Int64 = msgspec.field(name=GROUP_SIZE, default=-1)


class _OddArgs(msgspec.Struct, gc=False):
    device: Any = None
    context: Any = None
    stream: Any = None
    correlation: Any = None
    graph_node: Any = msgspec.field(name="graph node id", default=None)
    external: Any = msgspec.field(name="External id", default=None)
    group: Any = msgspec.field(name=PROCESS_GROUP, default=None)
    sequence: Any = msgspec.field(name=SEQUENCE, default=None)
    operation: Any = msgspec.field(name=OPERATION, default=None)
    size: Any = msgspec.field(name=GROUP_SIZE, default=None)


_ARGS = msgspec.json.Decoder(Args)
_ODD_ARGS = msgspec.json.Decoder(_OddArgs)


def arguments(text: bytes | msgspec.Raw) -> Args:
    """The arguments of an event by their text; each that is not of its type counts as absent."""
    with suppress(*UNDECODABLE):
        return _ARGS.decode(text)
    with suppress(*UNDECODABLE):
        odd = _ODD_ARGS.decode(text)
        return Args(
            device=_integer(odd.device, -1),
            context=_integer(odd.context, -1),
            stream=_integer(odd.stream, -1),
            correlation=_integer(odd.correlation, -1),
            graph_node=_integer(odd.graph_node, 0),
            external=_integer(odd.external, -1),
            group=odd.group if isinstance(odd.group, str) else "",
            sequence=_integer(odd.sequence, -1),
            operation=odd.operation if isinstance(odd.operation, str) else "",
            size=_integer(odd.size, -1),
        )
    return Args()


def _integer(value: Any, otherwise: int) -> int:
    fits = type(value) is int and -(2**63) <= value < 2**63
    return value if fits else otherwise


class Event(msgspec.Struct, gc=False, kw_only=True, tag_field="ph", tag="X"):
    """A span whose times fit a float (see the module's text). `dur` -inf: absent."""

    # In the order of the file, which msgspec decodes fastest.
    cat: str = ""
    name: str
    ts: float
    dur: float = float("-inf")
    args: Args = Args()


def _no_span(phase: str) -> type[msgspec.Struct]:
    return msgspec.defstruct("NoSpan", (), tag_field="ph", tag=phase, gc=False)


# What else stands among the spans, flows for the most part; nothing of it is looked at. The
# phases are all others of the "Trace Event Format".
NO_SPANS = tuple(map(_no_span, "BEiICbneSTpFstfPNODMVvRc()"))


class FullEvent(msgspec.Struct, gc=False):
    """Any event by its text, with the fields whose type differs from file to file."""

    name: str
    ts: msgspec.Raw
    args: msgspec.Raw = msgspec.Raw(b"{}")
    dur: msgspec.Raw = msgspec.Raw(b"")
    cat: str = ""
    ph: str = ""
    pid: int | str | float | None = None
    tid: int | str | float | None = None


class ProcessName(msgspec.Struct, gc=False):
    """What names a process; every process of a trace has one."""

    pid: int | str | float | None = None


class Annotation(msgspec.Struct, frozen=True, gc=False):
    """A span that names a step; ns. `gpu`: on the GPU's timeline, `thread` is its stream.

    external: the id that the CPU's span and its projections onto the GPU share; -1: none.
    """

    owner: int
    name: str
    start: int
    dur: int
    gpu: bool
    thread: str = ""
    external: int = -1


class Batch(msgspec.Struct):
    """Columns of many activities; what a worker sends and the reader joins.

    start and dur are µs as float64 when `exact` is false, else ns as int64. name and
    owner are codes of the file's own tables; kind is one of KINDS. stream: of an operator,
    the code of its thread. call_row: rows of which
    the process group is known; parallel to it are call_group and call_operation (codes of the
    file's own tables), call_sequence, call_external and call_size, -1 where they are not known.
    """

    exact: bool
    start: array[float] | array[int]
    dur: array[float] | array[int]
    name: array[int]
    kind: array[int]
    stream: array[int]
    correlation: array[int]
    graph: array[int]
    device: array[int]
    context: array[int]
    owner: array[int]
    call_row: array[int]
    call_group: array[int]
    call_sequence: array[int]
    call_external: array[int]
    call_operation: array[int]
    call_size: array[int]

    def __len__(self) -> int:
        return len(self.start)


class FileFacts(msgspec.Struct):
    """What a trace file says beside its activities.

    owners: pids of a merged file (`[TP00-DP01] 83`, as JSON text), else "". groups: names
    of process groups; operations: what they were asked for. sequences: (code of the owner,
    external id) -> number of that collective in its process group. base: JSON text of
    `baseTimeNanoseconds`, distributed: of `distributedInfo`; "" for none. run: what it says of
    its run, by the names of `FACTS`.
    recording: the id of the profile. host: the machine that wrote the file. devices: how many
    GPUs it names. elsewhere: events of each
    category of `OTHER_DEVICES`, only of a file that was decoded. skipped: (code of the owner, what
    was left out) -> count. unsafe: why the file must be read exactly, "" when it was read.
    """

    names: list[str] = msgspec.field(default_factory=list)
    owners: list[str] = msgspec.field(default_factory=list)
    groups: list[str] = msgspec.field(default_factory=list)
    operations: list[str] = msgspec.field(default_factory=list)
    sequences: dict[tuple[int, int], int] = msgspec.field(default_factory=dict)
    annotations: list[Annotation] = msgspec.field(default_factory=list)
    base: str = ""
    distributed: str = ""
    run: dict[str, str] = msgspec.field(default_factory=dict)
    recording: str = ""
    host: str = ""
    devices: int = 0
    elsewhere: dict[str, int] = msgspec.field(default_factory=dict)
    skipped: dict[tuple[int, str], int] = msgspec.field(default_factory=dict)
    truncated: bool = False
    unsafe: str = ""
    notes: list[str] = msgspec.field(default_factory=list)


# What stands in a trace beside its events.


class Header(msgspec.Struct):
    """What stands in a torch trace beside its events, as JSON text; empty where it does not."""

    base: msgspec.Raw = msgspec.field(name="baseTimeNanoseconds", default=msgspec.Raw(b""))
    distributed: msgspec.Raw = msgspec.field(name="distributedInfo", default=msgspec.Raw(b""))
    devices: msgspec.Raw = msgspec.field(name="deviceProperties", default=msgspec.Raw(b""))
    cuda_runtime: msgspec.Raw = msgspec.field(name="cuda_runtime_version", default=msgspec.Raw(b""))
    cuda_driver: msgspec.Raw = msgspec.field(name="cuda_driver_version", default=msgspec.Raw(b""))
    hip_runtime: msgspec.Raw = msgspec.field(name="hip_runtime_version", default=msgspec.Raw(b""))
    trace_id: msgspec.Raw = msgspec.field(default=msgspec.Raw(b""))
    host: msgspec.Raw = msgspec.field(name="host_name", default=msgspec.Raw(b""))
    hip_driver: msgspec.Raw = msgspec.field(name="hip_driver_version", default=msgspec.Raw(b""))


class _Device(msgspec.Struct):
    name: str = ""


class _Distributed(msgspec.Struct):
    world_size: int | None = None
    nccl_version: str | None = None


_DEVICES = msgspec.json.Decoder(list[_Device])
_DISTRIBUTED = msgspec.json.Decoder(_Distributed)
_STRING = msgspec.json.Decoder(str)


class Fact(NamedTuple):
    """One thing that is equal in all files of a run. read: its value in a torch trace, or ""."""

    name: str
    read: Callable[[Header], str]


def device_names(devices: Any) -> tuple[str, ...]:
    """The models in `deviceProperties` (JSON text), one for each GPU."""
    return tuple(device.name for device in _decoded(_DEVICES, devices, []))


def _models(header: Header) -> str:
    return ", ".join(sorted({name for name in device_names(header.devices) if name}))


def _processes(header: Header) -> str:
    return str(_decoded(_DISTRIBUTED, header.distributed, _Distributed()).world_size or "")


def _nccl(header: Header) -> str:
    return _decoded(_DISTRIBUTED, header.distributed, _Distributed()).nccl_version or ""


def _version(raw: msgspec.Raw) -> str:
    return bytes(raw).decode("utf-8", "replace").strip('" ')


FACTS: tuple[Fact, ...] = (
    Fact("processes", _processes),
    Fact("GPU", _models),
    Fact("CUDA runtime", lambda header: _version(header.cuda_runtime)),
    Fact("CUDA driver", lambda header: _version(header.cuda_driver)),
    Fact("HIP runtime", lambda header: _version(header.hip_runtime)),
    Fact("HIP driver", lambda header: _version(header.hip_driver)),
    Fact("NCCL", _nccl),
)


def run_facts(header: Header) -> dict[str, str]:
    """The facts that a torch trace tells of its run, by the names of `FACTS`."""
    facts = ((fact.name, fact.read(header)) for fact in FACTS)
    return {name: value for name, value in facts if value}


def take_header(header: Header, facts: FileFacts) -> None:
    """Adds what a header says to the facts of its file."""
    facts.base = bytes(header.base).decode("utf-8", "replace") or facts.base
    facts.distributed = bytes(header.distributed).decode("utf-8", "replace") or facts.distributed
    facts.devices = len(device_names(header.devices)) or facts.devices
    facts.run |= run_facts(header)
    facts.recording = _version(header.trace_id) or facts.recording
    facts.host = _version(header.host) or facts.host


def _decoded(decoder: msgspec.json.Decoder[Any], raw: Any, otherwise: Any) -> Any:
    try:
        return decoder.decode(raw) if raw else otherwise
    except UNDECODABLE:  # null, or fields of other types
        return otherwise


def string_of(raw: bytes) -> str:
    """The string that a JSON text is; the text itself if it is something else."""
    with suppress(*UNDECODABLE):
        return _STRING.decode(raw)
    return raw.decode("utf-8", "replace")


# The activities of one file as numpy columns.


_NARROW = (("name", "i4"), ("kind", "i1"), ("graph", "i1"), ("device", "i2"), ("owner", "i2"))


@dataclass(frozen=True)
class Calls:
    """Collectives of which the process group is known; parallel arrays.

    group, operation: codes of the file's own tables. sequence: its number in the group;
    external: the id that its announcement has; size: ranks of the group; -1 where they are not
    known.
    """

    group: npt.NDArray[Any]
    sequence: npt.NDArray[Any]
    external: npt.NDArray[Any]
    operation: npt.NDArray[Any]
    size: npt.NDArray[Any]


@dataclass(frozen=True)
class Columns:
    """Parallel arrays; start is int64 ns, dur ns, all but start the smallest integers that fit.

    name, owner: codes of the file's own tables. kind: index into `KINDS`. graph: 1 for the
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
    context: npt.NDArray[Any]
    owner: npt.NDArray[Any]
    call: npt.NDArray[np.int32] | None = None
    calls: Calls | None = None

    def __len__(self) -> int:
        return len(self.start)

    def take(self, chosen: npt.NDArray[Any]) -> Columns:
        """The rows that a mask or indices select."""
        columns = vars(self)
        taken = {key: columns[key][chosen] for key in columns if key not in ("call", "calls")}
        call = None if self.call is None else self.call[chosen]
        return Columns(**taken, call=call, calls=self.calls)


def joined(batches: Sequence[Batch]) -> Columns:
    """All batches of a file in one."""
    import numpy as np

    columns: dict[str, Any] = {}
    for key in ("start", "dur"):
        parts = [exact_ns(getattr(batch, key), batch.exact) for batch in batches]
        columns[key] = np.concatenate([np.empty(0, np.int64), *parts])
    columns["dur"] = _compact(columns["dur"])
    for key, kind in _NARROW:
        arrays = [np.asarray(getattr(batch, key)) for batch in batches]
        columns[key] = np.concatenate([np.empty(0, kind), *arrays]).astype(kind, copy=False)
    for key in ("context", "stream", "correlation"):
        arrays = [np.asarray(getattr(batch, key)) for batch in batches]
        columns[key] = _compact(np.concatenate([np.empty(0, np.int64), *arrays]))
    return Columns(**columns, **_calls(batches))


CALL_COLUMNS = ("call_group", "call_sequence", "call_external", "call_operation", "call_size")


def _calls(batches: Sequence[Batch]) -> dict[str, Any]:
    """`call` and `calls` of the batches; nothing where no process group is known."""
    import numpy as np

    if not any(len(batch.call_row) for batch in batches):
        return {}
    sizes = np.array([len(batch) for batch in batches])
    calls = Calls(
        *(
            np.concatenate([np.asarray(getattr(batch, key)) for batch in batches])
            for key in CALL_COLUMNS
        )
    )
    before = (np.cumsum(sizes) - sizes).tolist()
    rows = [np.asarray(b.call_row) + at for b, at in zip(batches, before, strict=True)]
    call = np.full(int(sizes.sum()), -1, np.int32)
    call[np.concatenate(rows)] = np.arange(len(calls.group))
    return {"call": call, "calls": calls}


def exact_ns(times: Any, exact: bool) -> Ints:
    """Exact ns of a batch's `start` or `dur`.

    See the docstring of this module for why the fraction rounds right.
    """
    import numpy as np

    values = np.asarray(times)
    if exact:
        return np.asarray(values, dtype=np.int64)
    whole = np.floor(values)
    fraction = np.rint((values - whole) * 1000.0)
    ns: Ints = whole.astype(np.int64) * 1000 + fraction.astype(np.int64)
    return ns


def _compact(values: Ints) -> npt.NDArray[Any]:
    import numpy as np

    small = np.iinfo(np.int32)
    fits = not len(values) or (values.min() >= small.min and values.max() <= small.max)
    return values.astype(np.int32) if fits else values


# Exact times from the text of a trace.


# Times as traces write them: which can be true, and how many ns a string means.

_NUMBER = re.compile(r'^"?\s*(-?)(\d{1,30})(?:\.(\d{0,40}))?(?:[eE]([+-]?\d{1,3}))?\s*"?$')


LARGEST_NS = 2**62  # two of them can be added in int64


LONGEST_NS = 2**50  # of one duration, 13 days: thousands of them can be added in int64


def unfit(start: int | None, dur: int | None) -> str:
    """What is wrong with the times (ns) of an event; "" if nothing is."""
    if start is None or dur is None:
        return "a missing or unreadable"
    if dur < 0:
        return "a negative"
    return "an impossible" if dur >= LONGEST_NS else ""


def ns(raw: bytes) -> int | None:
    """Exact ns of a time in µs from its JSON text (a number or a quoted one).

    None when it is absent or not a finite number. Digits below 1 ns are rounded half up.
    """
    match = _NUMBER.match(bytes(raw).decode("ascii", "replace").strip())
    if match is None:
        return None
    sign, whole, fraction, exponent = match.groups()
    fraction = fraction or ""
    shift = 3 + int(exponent or 0) - len(fraction)
    if abs(shift) > 60:
        return None
    value: int = int(whole + fraction)
    if shift >= 0:
        value *= int(10**shift)
    else:
        value = (2 * value + 10**-shift) // (2 * 10**-shift)
    if value >= LARGEST_NS:
        return None
    return -value if sign else value


def base_time(path: Path, text: str) -> tuple[int, list[str]]:
    """The ns to add to every time of a file, and notes.

    Newer files write times relative to `baseTimeNanoseconds`. text: its JSON text, "" if the
    file has none.
    """
    number = text.strip('" ')
    if number.isdecimal() and number.isascii() and len(number) <= 19 and int(number) < LARGEST_NS:
        return int(number), []
    if number in ("", "null"):
        return 0, []
    note = (
        f"{path.name}: baseTimeNanoseconds {number[:40]} is not a time; "
        "this rank's clock is not aligned with the others"
    )
    return 0, [note]
