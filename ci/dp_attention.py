"""Records the two ranks of a real DP-attention server on this CPU: `tests/data/dp-attention-cpu`.

    eval "$(python3 ci/real_env.py)"
    python -m ci.dp_attention tests/data/dp-attention-cpu

Two servers one after the other, each with `--tp 2 --dp 2 --enable-dp-attention` and DP1 starved by
routed requests: `plain`, and `ep2` with experts on both ranks and their tokens recorded. To be
small, the traces have only the outermost CPU operators, and of these only `OPERATORS`.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support.dp_attention import EXPERTS, Load, Request, record
from tests.support.real_env import real_sglang

# DP0 has six requests with long prompts and gets one more in the window. DP1 gets a short one in
# the window, so that it runs idle passes before that, and after its end.
LOAD = (
    *(Request(0, 40 + 8 * number, 800) for number in range(6)),
    Request(1, 20, 36, late=True),
    Request(0, 64, 16, late=True),
)
PASSES = 60
VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (("plain", ()), ("ep2", EXPERTS))
KEPT = ("displayTimeUnit", "baseTimeNanoseconds", "distributedInfo", "schemaVersion")
OPERATORS = frozenset(
    "aten::" + name
    for name in (
        *("linear", "scaled_dot_product_attention", "silu", "topk", "softmax", "embedding"),
        *("pow", "mean", "rsqrt", "index_add_", "cat", "argmax"),
    )
)
COLLECTIVES = "c10d::"


def main(target: Path) -> None:
    """Records both variants into folders of `target`."""
    for name, args in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            recorded = record(
                Path(folder), real_sglang(), {"dp_attention": Load(LOAD, PASSES)}, args=args
            )["dp_attention"]
            place = target / name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            for trace in sorted(recorded.folder.glob("*.trace.json.gz")):
                ending = trace.name[trace.name.index("-TP-") :]
                content = pruned(json.loads(gzip.decompress(trace.read_bytes())))
                text = json.dumps(content, separators=(",", ":")).encode()
                (place / f"dp{ending}").write_bytes(gzip.compress(text, 9, mtime=0))
            for file in ("server_info.json", "experts.npz"):
                if (recorded.folder / file).exists():
                    shutil.copy(recorded.folder / file, place / file)
            load = [asdict(request) for request in LOAD]
            (place / "load.json").write_text(json.dumps(load, indent=1) + "\n")


def pruned(trace: dict[str, Any]) -> dict[str, Any]:
    """The trace with annotations and the outermost operators, without their arguments.

    Times in µs, to 0.1 µs.
    """
    spans = [
        event
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ("user_annotation", "cpu_op")
    ]
    spans.sort(key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    kept: list[dict[str, Any]] = []
    ends: dict[Any, float] = {}  # thread -> end of its last operator that is outside of all others
    for event in spans:
        if event["cat"] == "cpu_op":
            if event["ts"] < ends.get(event["tid"], 0.0):
                continue
            ends[event["tid"]] = event["ts"] + event["dur"]
            if event["name"] not in OPERATORS and not event["name"].startswith(COLLECTIVES):
                continue
        slim = {key: event[key] for key in ("ph", "cat", "name", "pid", "tid")}
        kept.append({**slim, **{key: round(event[key], 1) for key in ("ts", "dur")}})
    return {**{key: trace[key] for key in KEPT if key in trace}, "traceEvents": kept}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
