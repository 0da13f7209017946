"""Generates the big nsys input of the benchmark, as SQLite and as Parquet, and its truth.

Eight processes on a GPU each: decode steps that are one CUDA graph (all kernels are its
nodes), extend steps whose kernels have a launch each, copies and sets, a second stream for
collectives that ends a little later than what waits for it starts, `scheduler.run_batch`
ranges. Rows are in order of start, as nsys writes them, with the columns of schema 3.19.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

DEVICES = 8
KERNELS_A_STEP = 220
GRAPH_STEPS = 7  # of ten are decode steps, as one CUDA graph each
KERNEL_COLUMNS = (
    "start", "end", "deviceId", "contextId", "greenContextId", "streamId", "correlationId",
    "globalPid", "demangledName", "shortName", "mangledName", "launchType", "cacheConfig",
    "registersPerThread", "gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ",
    "staticSharedMemory", "dynamicSharedMemory", "localMemoryPerThread", "localMemoryTotal",
    "gridId", "sharedMemoryExecuted", "graphNodeId", "sharedMemoryLimitConfig",
    "qmdBulkReleaseDone", "qmdPreexitDone", "qmdLastCtaDone", "graphId", "clusterX", "clusterY",
    "clusterZ", "clusterSchedulingPolicy", "maxPotentialClusterSize", "maxActiveClusters",
    "sharedMemoryRequestedPercentage", "tensorSizeMinusOneElements",
)  # fmt: skip
COLUMNS: dict[str, Sequence[str]] = {
    "CUPTI_ACTIVITY_KIND_KERNEL": KERNEL_COLUMNS,
    "CUPTI_ACTIVITY_KIND_MEMCPY": (
        "start", "end", "deviceId", "contextId", "streamId", "correlationId", "globalPid",
        "bytes", "copyKind", "srcKind", "dstKind", "graphNodeId",
    ),
    "CUPTI_ACTIVITY_KIND_MEMSET": (
        "start", "end", "deviceId", "contextId", "streamId", "correlationId", "globalPid",
        "value", "bytes", "graphNodeId", "memKind",
    ),
    "CUPTI_ACTIVITY_KIND_RUNTIME": (
        "start", "end", "eventClass", "globalTid", "correlationId", "nameId", "returnValue",
    ),
    "NVTX_EVENTS": ("start", "end", "eventType", "textId", "globalTid"),
    "StringIds": ("id", "value"),
    "PROCESSES": ("globalPid", "pid", "name"),
    "META_DATA_EXPORT": ("name", "value"),
}  # fmt: skip
TEXT_TABLES = ("StringIds", "PROCESSES", "META_DATA_EXPORT")
SHORT, MANGLED, LAUNCH, DRIVER, EVENT, GRAPH_LAUNCH, BATCH = range(1001, 1008)  # ids of texts
FAMILIES = (
    ("nvjet_tst_{n}x64_64x6_2x1_v_bz_TNT", 18_000),
    ("void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, {n}, 128, 4>, false>"
     "(flash::Flash_fwd_params)", 21_700),
    ("void at::native::vectorized_elementwise_kernel<{n}, at::native::CUDAFunctor_add<float>, "
     "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>)", 3_100),
    ("void flashinfer::norm::FusedAddRMSNormKernel<{n}u, __nv_bfloat16>(__nv_bfloat16*)", 4_400),
    ("fused_moe_kernel_{n}", 61_300),
    ("void act_and_mul_kernel<__nv_bfloat16, &silu, {n}>(__nv_bfloat16*)", 5_200),
)  # fmt: skip
COLLECTIVE = "void cross_device_reduce_1stage<__nv_bfloat16, {n}>(RankData*, RankSignals)"
VARIANTS = 8
NAMES = tuple(text.format(n=n + 1) for text, _ in FAMILIES for n in range(VARIANTS))
COLLECTIVES = tuple(COLLECTIVE.format(n=n + 1) for n in range(VARIANTS))
KERNEL_NAMES = (*NAMES, *COLLECTIVES)  # the id of a name is its place + 1

Truth = dict[tuple[str, str, str], list[int]]
Rows = dict[str, list[tuple[Any, ...]]]


def global_pid(device: int) -> int:
    return (0x1_0000 << 32) | ((4000 + device) << 24)


def generate(kernels: int, truth: Truth) -> Iterator[Rows]:
    """Rows of all tables, step by step; adds (rank, name, kind) -> [count, ns] to `truth`."""
    rng = random.Random(0)
    texts = [*enumerate(KERNEL_NAMES, 1), (SHORT, "kernel"), (MANGLED, "_Z6kernelv")]
    texts += [(LAUNCH, "cudaLaunchKernel_v7000"), (DRIVER, "cuLaunchKernel")]
    texts += [(EVENT, "cudaEventRecord_v3020"), (GRAPH_LAUNCH, "cudaGraphLaunch_v10000")]
    yield {
        "StringIds": [*texts, (BATCH, "scheduler.run_batch")],
        "PROCESSES": [(global_pid(n), 4000 + n, "sglang::schedul") for n in range(DEVICES)],
        "META_DATA_EXPORT": [("EXPORT_SCHEMA_VERSION", "3.19.0")],
    }
    for step in range(-(-kernels // (DEVICES * KERNELS_A_STEP))):
        yield _step(step, rng, truth)


def _step(step: int, rng: random.Random, truth: Truth) -> Rows:
    rows: Rows = {name: [] for name in COLUMNS if name.startswith(("CUPTI", "NVTX"))}
    begin = 1_000_000_000 + step * 8_000_000
    for device in range(DEVICES):
        _rank_step(rows, step, begin + device * 1_700, device, rng, truth)
    for table in rows.values():
        table.sort(key=lambda row: row[0])
    return rows


def _rank_step(
    rows: Rows, step: int, begin: int, device: int, rng: random.Random, truth: Truth
) -> None:
    decode = step % 10 < GRAPH_STEPS
    rank, process, thread = f"GPU{device}", global_pid(device), global_pid(device) + 4000 + device
    correlation = step * (KERNELS_A_STEP + 4) + 1
    rows["NVTX_EVENTS"].append((begin, begin + 2_000_000, 59, BATCH, thread))
    calls = rows["CUPTI_ACTIVITY_KIND_RUNTIME"]
    if decode:
        calls.append((begin + 1_000, begin + 90_000, 0, thread, correlation, GRAPH_LAUNCH, 0))
    at = begin + 100_000
    for place in range(KERNELS_A_STEP):
        family, variant = place % (len(FAMILIES) + 1), (place // 7 + step) % VARIANTS
        collective = family == len(FAMILIES)
        name = len(NAMES) + variant if collective else family * VARIANTS + variant
        base = 12_900 if collective else FAMILIES[family][1]
        dur = base + int(base * 0.2 * rng.random())
        if not decode:
            correlation += 1
            call = begin + 1_000 + place * 5_000
            calls.append((call, call + 3_500, 0, thread, correlation, LAUNCH, 0))
            calls.append((call + 200, call + 3_400, 0, thread, correlation, DRIVER, 0))
            unlaunched = correlation + 1_000_000_000  # calls that launch nothing
            calls.append((call + 3_600, call + 3_900, 1, thread, unlaunched, EVENT, 0))
            calls.append((call + 4_000, call + 4_400, 1, thread, unlaunched, EVENT, 0))
        rows["CUPTI_ACTIVITY_KIND_KERNEL"].append((
            at, at + dur, device, 1, 0, 13 if collective else 7, correlation, process, name + 1,
            SHORT, MANGLED, 1, 1, 168, 132, 1, 1, 384, 1, 1, 0, 232_448, 0, 162_000_000,
            step * KERNELS_A_STEP + place, 233_472, 17_179_869_184 + place if decode else None, 0,
            None, None, None, 7 if decode else None, 2, 1, 1, 0, 0, None, None, "[]",
        ))  # fmt: skip
        _add(truth, rank, KERNEL_NAMES[name], "kernel", dur)
        at += dur - 400 if place % 11 == 5 else dur + 500  # now and then a dependent launch
    head = (device, 1, 7, correlation + 1, process)
    rows["CUPTI_ACTIVITY_KIND_MEMCPY"].append((at, at + 1_300, *head, 4096, 1, 0, 2, None))
    _add(truth, rank, "[CUDA memcpy Host-to-Device]", "memcpy", 1_300)
    head = (device, 1, 7, correlation + 2, process)
    rows["CUPTI_ACTIVITY_KIND_MEMSET"].append((at + 2_000, at + 2_900, *head, 0, 64, None, 2))
    _add(truth, rank, "[CUDA memset]", "memset", 900)


def _add(truth: Truth, rank: str, name: str, kind: str, dur: int) -> None:
    entry = truth.setdefault((rank, name, kind), [0, 0])
    entry[0] += 1
    entry[1] += dur


def nsys_inputs(
    folder: Path, *, kernels: int = 4_130_000, parquet: bool = True, in_order: bool = True
) -> Path:
    """`report.sqlite`, `report.parquet/` and `report.truth` in a folder; kept if there already.

    in_order: whether the rows of the SQLite export are sorted; nsys promises that no longer
    since 2025.6. Those in Parquet always are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "report.truth"
    if done.exists() and (not parquet or (folder / "report.parquet").is_dir()):
        return folder
    truth: Truth = {}
    (folder / "report.sqlite").unlink(missing_ok=True)
    with closing(sqlite3.connect(folder / "report.sqlite")) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        for name, columns in COLUMNS.items():
            words = ", ".join(
                f'"{c}" {"TEXT" if _is_text(name, c) else "INTEGER"}' for c in columns
            )
            database.execute(f"CREATE TABLE {name} ({words})")
        files = _Parquet(folder / "report.parquet") if parquet else None
        for rows in generate(kernels, truth):
            for name, some in rows.items():
                marks = ", ".join("?" * len(COLUMNS[name]))
                database.executemany(f"INSERT INTO {name} VALUES ({marks})", some)
                if files is not None:
                    files.write(name, some)
        database.commit()
        if not in_order:
            _shuffle(database)
        if files is not None:
            files.close()
    done.write_text(json.dumps([[*key, *value] for key, value in truth.items()]))
    return folder


def shuffled(folder: Path) -> Path:
    """Where the inputs of `folder` are kept with their rows in no order."""
    return folder.with_name(f"{folder.name}-shuffled")


def _shuffle(database: sqlite3.Connection) -> None:
    """Gives the rows of every table of activities another order, the same every time."""
    for name in (name for name in COLUMNS if name.startswith(("CUPTI", "NVTX"))):
        (statement,) = database.execute(
            "SELECT sql FROM sqlite_schema WHERE name = ?", (name,)
        ).fetchone()
        database.execute(f"ALTER TABLE {name} RENAME TO sorted")
        database.execute(statement)
        database.execute(  # Knuth's multiplicative hash
            f"INSERT INTO {name} SELECT * FROM sorted ORDER BY rowid * 2654435761 & 4294967295"
        )
        database.execute("DROP TABLE sorted")
    database.commit()
    database.execute("VACUUM")


def _is_text(table: str, column: str) -> bool:
    named = table in TEXT_TABLES and column in ("value", "name")
    return named or column == "tensorSizeMinusOneElements"


class _Parquet:
    """One file a table; ids that nsys keeps in 64 bits are unsigned, as in its own export."""

    GROUP = 1 << 17  # rows

    def __init__(self, folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        folder.mkdir(exist_ok=True)
        self._arrow: Any = pyarrow
        self._folder = folder
        self._waiting: Rows = {}
        self._writers: dict[str, Any] = {}

    def write(self, name: str, rows: Sequence[tuple[Any, ...]]) -> None:
        waiting = self._waiting.setdefault(name, [])
        waiting += rows
        if len(waiting) >= self.GROUP:
            self._flush(name)

    def close(self) -> None:
        for name in list(self._waiting):
            self._flush(name)
        for writer in self._writers.values():
            writer.close()

    def _flush(self, name: str) -> None:
        rows = self._waiting.pop(name)
        if not rows:
            return
        fields = [(column, self._type(name, column)) for column in COLUMNS[name]]
        schema = self._arrow.schema(fields)
        if name not in self._writers:
            path = self._folder / f"{name}.parquet"
            self._writers[name] = self._arrow.parquet.ParquetWriter(path, schema)
        columns = [
            self._arrow.array(values, type=kind)
            for values, (_, kind) in zip(zip(*rows, strict=True), fields, strict=True)
        ]
        self._writers[name].write_table(self._arrow.Table.from_arrays(columns, schema=schema))

    def _type(self, table: str, column: str) -> Any:
        if _is_text(table, column):
            return self._arrow.string()
        if column in ("globalPid", "globalTid", "graphNodeId"):
            return self._arrow.uint64()
        return self._arrow.int64() if column in ("start", "end", "bytes") else self._arrow.int32()


def truth_of(folder: Path) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(rank, full name, kind) -> (count, total ns)."""
    rows = json.loads((folder / "report.truth").read_text())
    return {(rank, name, kind): (count, ns) for rank, name, kind, count, ns in rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "sglprof-bench"
    )
    parser.add_argument("--kernels", type=int, default=4_130_000)
    parser.add_argument("--shuffled", action="store_true", help="rows in no order")
    options = parser.parse_args()
    folder = options.folder / f"nsys-{options.kernels}"
    if options.shuffled:
        print(nsys_inputs(shuffled(folder), kernels=options.kernels, parquet=False, in_order=False))
    else:
        print(nsys_inputs(folder, kernels=options.kernels))
