"""Generates the torch traces of the benchmarks, and their truth.

One file a rank, in the layout of today's Kineto and in the shape of real windows: an extend
step, whose kernels have a launch each below many Python frames, then decode steps that are one
graph launch each. Half of the events are Python functions, a sixth operators, a twelfth kernels.
The truth (per kernel name: count and ns, as integers) is written beside each file.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

BASE_NS = 1_790_857_026_000_000_000
FIRST_NS = 4_632_854_806_531_000
EXTEND_NS, DECODE_NS = 95_000_000, 18_000_000  # from one step's begin to the next one's
DECODES = 3  # after each extend step
LAYERS = 64  # of the model; a kernel of each family runs in each
FRAMES, OPERATORS = 20, 7  # an extend step has so many a kernel, a decode step a twelfth of it
QUERIES = 1  # calls that launch nothing, for each launch
VARIANTS = 5
FAMILIES = (
    ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<"
     "cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>, "
     "cutlass::gemm::collective::CollectiveMma<cutlass::gemm::MainloopSm90TmaGmmaWarpSpecialized<"
     "{n}, cute::tuple<cute::C<2>, cute::C<1>, cute::C<1> >, "
     "cutlass::gemm::KernelTmaWarpSpecializedPingpong>, cute::tuple<cute::C<64>, cute::C<128>, "
     "cute::C<64> >, cutlass::bfloat16_t, cute::tuple<long, cute::C<1>, long> > > > >(Params)", 38),
    ("nvjet_tst_192x{n}92_64x4_2x1_v_bz_coopB_TNN", 31),
    ("void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, {n}, false, false,"
     " cutlass::bfloat16_t, Flash_kernel_traits<128, 64, 128, {n}, cutlass::bfloat16_t> >, true, "
     "false, false, false, true, true, false, false>(Flash_fwd_params)", 22),
    ("void at::native::elementwise_kernel<128, {n}, at::native::gpu_kernel_impl_nocast<"
     "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda()#3}}::operator()() "
     "const::{{lambda()#12}}::operator()() const::{{lambda(c10::BFloat16)#1}}>("
     "at::TensorIteratorBase&, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::"
     "{{lambda()#3}}::operator()() const::{{lambda()#12}}::operator()() const::"
     "{{lambda(c10::BFloat16)#1}} const&)::{{lambda(int)#1}}>(int, at::native::copy)", 3),
    ("void flashinfer::norm::FusedAddRMSNormKernel<{n}u, __nv_bfloat16>(__nv_bfloat16*, "
     "__nv_bfloat16*, __nv_bfloat16*, unsigned int, unsigned int, unsigned int, float)", 4),
    ("fused_moe_kernel_{n}", 61),
    ("void act_and_mul_kernel<__nv_bfloat16, &silu, {n}>(__nv_bfloat16*, __nv_bfloat16 const*)", 5),
    ("void sglang::cross_device_reduce_1stage<__nv_bfloat16, {n}>(sglang::RankData*, "
     "sglang::RankSignals, sglang::Signal*, __nv_bfloat16*, int, int)", 13),
)  # fmt: skip
KERNELS = [
    (text.format(n=layer % VARIANTS + 1), micros) for layer in range(LAYERS)
    for text, micros in FAMILIES
]  # fmt: skip
COPY, FILL = "Memcpy HtoD (Pinned -> Device)", "Memset (Device)"
SLOW_BY = 1.07  # the kernels of SLOW_FAMILY on the last rank but one
SLOW_FAMILY = "nvjet"


def torch_window(
    root: Path, *, ranks: int = 8, megabytes: int = 207, processes: int | None = None
) -> Path:
    """A folder in `root` with one trace a rank, of so many MB of JSON; made if not there."""
    folder = root / f"traces-{ranks}x{megabytes}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"1-TP-{rank}.trace.json.gz" for rank in range(ranks)]
    todo = [rank for rank in range(ranks) if not paths[rank].with_suffix(".truth").exists()]
    if todo:
        with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
            jobs = [
                pool.submit(torch_rank, paths[rank], rank, megabytes, ranks=ranks) for rank in todo
            ]
            for job in jobs:
                job.result()
    return folder


def truth_of(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(rank, full kernel name) -> (count, total ns) over all files of a window."""
    truth = {}
    for path in sorted(folder.glob("*.truth")):
        rank = path.name.split("-")[2].split(".")[0]
        for name, (count, total) in json.loads(path.read_text()).items():
            truth[f"TP{rank}", name] = (count, total)
    return truth


def torch_rank(path: Path, rank: int, megabytes: int, *, ranks: int = 8) -> None:
    """Writes one rank's trace of about `megabytes` MB of JSON, packed, and its truth."""
    steps = _Steps(rank, slow=rank == max(ranks - 2, 0))
    size = 0
    with gzip.open(path, "wb", compresslevel=6) as out:
        out.write(_head(rank, ranks).encode())
        for text in steps.texts():
            size += out.write(text.encode())
            if size >= megabytes * 10**6:
                break
        out.write(b'\n  ],"traceName": "trace.json" }')
    path.with_suffix(".truth").write_text(json.dumps(steps.truth))


def _head(rank: int, ranks: int) -> str:
    info = json.dumps({"backend": "nccl", "rank": rank, "world_size": ranks})
    return (
        f'{{\n  "schemaVersion": 1,\n  "deviceProperties": [{{"id": {rank}}}],\n'
        f'  "distributedInfo": {info},\n  "with_stack": 1,\n  "displayTimeUnit": "ms",\n'
        f'  "baseTimeNanoseconds": {BASE_NS},\n  "traceEvents": [\n'
        '  {\n    "ph": "M", "name": "process_name", "ts": 0.000, "pid": 7, "tid": 0,\n'
        '    "args": {\n      "name": "sglang::scheduler"\n    }\n  }'
    )


def _event(category: str, name: str, place: str, times: str, args: str) -> str:
    """place: pid and tid. times: ts and dur."""
    return (
        f',\n  {{\n    "ph": "X", "cat": "{category}", "name": "{name}", {place},\n'
        f'    {times},\n    "args": {{\n      {args}\n    }}\n  }}'
    )


def _flow(phase: str, number: object, place: str, micros: object) -> str:
    bind = ', "bp": "e"' if phase == "f" else ""
    return (
        f',\n  {{\n    "ph": "{phase}", "id": {number}, {place}, "ts": {micros},\n'
        f'    "cat": "ac2g", "name": "ac2g"{bind}\n  }}'
    )


def _micros(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"


class _Host:
    """The host's events of one step, as a string with a `%d` for each number that steps change.

    These are times (whole µs), correlation ids and the external id. lasts: of the step, ns.
    """

    PLACE = '"pid": 7, "tid": 7'

    def __init__(self, launches: int, frames: int, operators: int, call: str, rng: random.Random):
        self._parts: list[str] = []
        self._slots: list[tuple[int, int]] = []  # (which base, what is added to it)
        spacing = 55_000 if launches > 1 else 2_000_000  # ns
        self.lasts = launches * spacing + 100_000
        for number in range(operators):
            at = 1_000 + number * spacing * launches // operators
            dims = f"[[{rng.randrange(9000)}, 4096], [4096, {rng.randrange(9000)}]]"
            args = (
                '"External id": %d, "Record function id": 0, "Input type": ["c10::BFloat16", '
                f'"c10::BFloat16"], "Input Dims": {dims}, "Ev Idx": {number}'
            )
            self._add("cpu_op", f"aten::op_{number % 61}", at, rng, args, (2, 0))
        for number in range(frames):
            at = 1_000 + number * spacing * launches // frames
            line, parent = rng.randrange(900), rng.randrange(number + 1)
            self._add("python_function", f"sglang/srt/layers/linear.py({line}): forward", at, rng,
                      f'"Python parent id": {parent}, "Python id": {number}, '
                      f'"Ev Idx": {operators + number}')  # fmt: skip
        for number in range(launches):
            at = 2_000 + number * spacing
            args = '"External id": %d, "cbid": 211, "correlation": %d'
            self._add("cuda_runtime", call, at, rng, args, (2, 0), (1, number))
            self._slots += [(1, number), (0, at // 1000)]
            self._parts.append(_flow("s", "%d", self.PLACE, f"%d.{at % 1000:03d}"))
            for query in range(QUERIES):
                at += 9_000
                args = f'"cbid": {317 + query}, "correlation": %d'
                idle = (1, number + launches * (query + 1) + 2)
                self._add("cuda_runtime", "cudaStreamIsCapturing", at, rng, args, idle)
        self._text = "".join(self._parts)

    def _add(
        self, category: str, name: str, at: int, rng: random.Random, args: str,
        *slots: tuple[int, int],
    ) -> None:  # fmt: skip
        at += rng.randrange(1000)
        times = f'"ts": %d.{at % 1000:03d}, "dur": {_micros(rng.randrange(500, 5000))}'
        self._parts.append(_event(category, name, self.PLACE, times, args))
        self._slots += [(0, at // 1000), *slots]

    def text(self, micros: int, correlation: int, external: int) -> str:
        """The events of a step that begins at `micros`."""
        bases = (micros, correlation, external)
        return self._text % tuple(bases[which] + more for which, more in self._slots)


class _Steps:
    """The steps of one rank. truth: name -> [count, ns] of what was written so far."""

    def __init__(self, rank: int, *, slow: bool) -> None:
        self.truth: dict[str, list[int]] = {}
        self._rank, self._slow, self._rng = rank, slow, random.Random(rank)
        count = len(KERNELS)
        self._extend = _Host(
            count, FRAMES * count, OPERATORS * count, "cudaLaunchKernelExC", self._rng
        )
        few = (FRAMES * count // 12, OPERATORS * count // 60)
        self._decode = _Host(1, *few, "cudaGraphLaunch", self._rng)

    def texts(self) -> Iterator[str]:
        """One step after the other, without end."""
        step, ns = 0, FIRST_NS
        while True:
            is_extend = step % (DECODES + 1) == 0
            yield self._step(step, ns, self._extend if is_extend else self._decode)
            ns += EXTEND_NS if is_extend else DECODE_NS
            step += 1

    def _step(self, step: int, ns: int, host: _Host) -> str:
        is_graph = host is self._decode
        correlation = step * 4 * len(KERNELS) + 1
        external = step + 1
        stage = (
            f"DECODE bs=32 forward_id={step}" if is_graph else f"EXTEND toks=2048 forward_id={step}"
        )
        gpu: list[str] = []
        begin = at = ns + 300_000
        copy, fill = correlation + len(KERNELS), correlation + len(KERNELS) + 1
        at = self._activity(gpu, "gpu_memcpy", COPY, at, 2_000, copy)
        at = self._activity(gpu, "gpu_memset", FILL, at, 1_000, fill)
        for number, (name, micros) in enumerate(KERNELS):
            launch_id = correlation if is_graph else correlation + number
            node = f', "graph node id": {4_294_967_296 + number}' if is_graph else ""
            lasts = micros * (700 if is_graph else 3_000)
            at = self._activity(gpu, "kernel", name, at, lasts, launch_id, node)
        span = f'"External id": {external}, "Ev Idx": {step}'
        name = f"step[{stage}]"
        host_times = f'"ts": {_micros(ns)}, "dur": {_micros(host.lasts)}'
        gpu_times = f'"ts": {_micros(begin)}, "dur": {_micros(at - begin)}'
        return "".join(
            (
                _event("user_annotation", name, host.PLACE, host_times, span),
                host.text(ns // 1000, correlation, external),
                _event("gpu_user_annotation", name, self._place(), gpu_times, span),
                *gpu,
            )
        )

    def _place(self) -> str:
        return f'"pid": {self._rank}, "tid": 7'

    def _activity(
        self, texts: list[str], category: str, name: str, at: int, ns: int, correlation: int,
        more: str = "",
    ) -> int:  # fmt: skip
        """Adds an activity of about `ns` and what belongs to it; when the next one starts."""
        dur = int(ns * self._rng.uniform(0.95, 1.05))
        dur = int(dur * SLOW_BY) if self._slow and name.startswith(SLOW_FAMILY) else dur
        args = (
            f'"External id": {correlation}, "queued": 0, "device": {self._rank}, "context": 1, '
            f'"stream": 7, "correlation": {correlation}, "registers per thread": 168, '
            '"shared memory": 0, "blocks per SM": 1.0, "warps per SM": 4.0, "grid": [132, 1, 1], '
            f'"block": [384, 1, 1], "est. achieved occupancy %": 18{more}'
        )
        times = f'"ts": {_micros(at)}, "dur": {_micros(dur)}'
        texts.append(_event(category, name, self._place(), times, args))
        texts.append(_flow("f", correlation, self._place(), _micros(at)))
        entry = self.truth.setdefault(name, [0, 0])
        entry[0] += 1
        entry[1] += dur
        return at + dur + 500
