"""Generates the big inputs of the benchmark, and their truth.

Torch traces: one file a rank in the layout of today's Kineto, a decoder's steps of 220
kernels, with the host events, stacks and flow arrows that make nine tenths of a real
trace. The truth (per kernel name: count and ns, as integers) is written beside each file.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

BASE_NS = 1_790_857_026_000_000_000
KERNELS_A_STEP = 220
HOST_EVENTS = 8  # a kernel; python_function and cpu_op
KERNELS = (
    ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", 38.2),
    ("void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>, false>"
     "(flash::Flash_fwd_params)", 21.7),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, "
     "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>)", 3.1),
    ("void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*)", 4.4),
    ("fused_moe_kernel", 61.3),
    ("void act_and_mul_kernel<__nv_bfloat16, &silu>(__nv_bfloat16*, __nv_bfloat16 const*)", 5.2),
    ("void cross_device_reduce_1stage<__nv_bfloat16, 8>(RankData*, RankSignals)", 12.9),
)  # fmt: skip


def torch_rank(path: Path, rank: int, megabytes: int, *, ranks: int = 8) -> None:
    """Writes one rank's trace of about `megabytes` MB of JSON, packed, and its truth."""
    rng = random.Random(rank)
    truth: dict[str, list[int]] = {}
    size = 0
    with gzip.open(path, "wb") as out:  # at the level that torch.profiler packs with
        out.write(_head(rank, ranks).encode())
        step = 0
        while size < megabytes * 10**6:
            size += out.write("".join(_step(step, rank, rng, truth)).encode())
            step += 1
        out.write(_TAIL.encode())
    path.with_suffix(".truth").write_text(json.dumps(truth))


def _head(rank: int, ranks: int) -> str:
    info = json.dumps({"backend": "nccl", "rank": rank, "world_size": ranks})
    return (
        f'{{\n    "schemaVersion": 1,\n    "deviceProperties": [{{"id": {rank}}}],\n'
        f'    "distributedInfo": {info},\n    "displayTimeUnit": "ms",\n'
        f'    "baseTimeNanoseconds": {BASE_NS},\n    "traceEvents": [\n'
        '  {\n    "ph": "M",\n    "name": "process_name",\n    "ts": 0.000,\n    "pid": 7,\n'
        '    "tid": 0,\n    "args": {\n      "name": "sglang::scheduler"\n    }\n  }'
    )


_TAIL = '\n  ],"traceName": "trace.json" }'


def _event(cat: str, name: str, pid: int, tid: int, ns: int, dur: int, args: str) -> str:
    return (
        f',\n  {{\n    "ph": "X",\n    "cat": "{cat}",\n    "name": "{name}",\n    "pid": {pid},\n'
        f'    "tid": {tid},\n    "ts": {ns // 1000}.{ns % 1000:03d},\n'
        f'    "dur": {dur // 1000}.{dur % 1000:03d}\n    ,\n'
        f'    "args": {{\n      {args}\n    }}\n  }}'
    )


def _flow(ph: str, number: int, pid: int, tid: int, ns: int) -> str:
    return (
        f',\n  {{\n    "ph": "{ph}",\n    "id": {number},\n    "pid": {pid},\n    "tid": {tid},\n'
        f'    "ts": {ns // 1000}.{ns % 1000:03d},\n    "cat": "ac2g",\n    "name": "ac2g"\n  }}'
    )


def _step(step: int, rank: int, rng: random.Random, truth: dict[str, list[int]]) -> Iterator[str]:
    start = 4_632_854_806_531_629 + step * 9_000_000
    external = step * 1000 + 1
    name = f"step[DECODE bs=32 forward_id={step}]"
    tie = f'"External id": {external}, "Ev Idx": {step}'
    yield _event("user_annotation", name, 7, 7, start, 5_000_000, tie)
    at = start + 200_000
    kernels = []
    for position in range(KERNELS_A_STEP):
        kernel, micros = KERNELS[position % len(KERNELS)]
        dur = int(micros * 1000 * rng.uniform(0.9, 1.1))
        correlation = step * KERNELS_A_STEP + position + 1
        host = start + position * 20_000
        for depth in range(HOST_EVENTS):
            # Random digits, so that it packs about as well as a real trace (1 to 13).
            noise = rng.getrandbits(28)
            at_host, lasts = host + depth * 600 + noise % 500, 16_000 - depth * 1300 - noise % 700
            if depth % 4 == 3:
                dims = f"[[{noise % 97}, 4096], [4096, {noise % 89}]]"
                args = f'"External id": {external}, "Input Dims": {dims}, "Ev Idx": {noise}'
                yield _event("cpu_op", "aten::linear", 7, 7, at_host, lasts, args)
            else:
                frame = f"sglang/srt/layers/linear.py({noise % 900}): forward"
                args = f'"Python parent id": {noise >> 3}, "Python id": {noise}, "Ev Idx": {noise}'
                yield _event("python_function", frame, 7, 7, at_host, lasts, args)
        args = f'"External id": {external}, "cbid": 211, "correlation": {correlation}'
        yield _event("cuda_runtime", "cudaLaunchKernel", 7, 7, host + 9000, 3000, args)
        yield _flow("s", correlation, 7, 7, host + 9000)
        args = (
            f'"External id": {external}, "queued": 0, "device": {rank}, "context": 1, "stream": 7,'
            f' "correlation": {correlation}, "registers per thread": 168, "shared memory": 0,'
            ' "blocks per SM": 1.0, "warps per SM": 4.0, "grid": [132, 1, 1], "block": [384, 1, 1],'
            ' "est. achieved occupancy %": 18'
        )
        kernels.append(_event("kernel", kernel, rank, 7, at, dur, args))
        kernels.append(_flow("f", correlation, rank, 7, at))
        entry = truth.setdefault(kernel, [0, 0])
        entry[0] += 1
        entry[1] += dur
        at += dur + 500
    first = start + 200_000
    yield _event("gpu_user_annotation", name, rank, 7, first, at - first, tie)
    yield from kernels


def torch_window(folder: Path, *, ranks: int = 8, megabytes: int = 200) -> Path:
    """A folder with one trace a rank; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        path = folder / f"1-TP-{rank}.trace.json.gz"
        if not path.with_suffix(".truth").exists():
            torch_rank(path, rank, megabytes, ranks=ranks)
    return folder


def truth_of(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(rank, full kernel name) -> (count, total ns) over all files of a window."""
    truth = {}
    for path in sorted(folder.glob("*.truth")):
        rank = path.name.split("-")[2].split(".")[0]
        for name, (count, total) in json.loads(path.read_text()).items():
            truth[f"TP{rank}", name] = (count, total)
    return truth
