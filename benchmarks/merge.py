"""What merging all ranks into one trace costs: `python -m benchmarks.merge [--megabytes 207]`.

The ways go over the same generated files, each in a process of its own, by turns: ours with
the summary rows (`sglprof export --to perfetto`), ours without, the usual one (load every file with
`json`, change the process ids, write `json.dumps` of all into gzip), and SGLang's own
ProfileMerger where SGLPROF_REAL_PYTHON names its interpreter. Prints CPU and wall
seconds, peak memory, size, and the ratios of CPU time within the run. Afterwards every
event is counted, per rank and category, inputs against results.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.generate import torch_window


def with_summary(folder: Path, out: Path) -> None:
    from pytest_sglprof._cli.main import main

    assert main(["export", "--to", "perfetto", str(folder), "-o", str(out)]) == 0


def events_only(folder: Path, out: Path) -> None:
    from pytest_sglprof._trace.merge.files import merge_files

    merge_files(sorted(folder.glob("*.json.gz")), out)


def json_and_gzip(folder: Path, out: Path) -> None:
    """As SGLang's merger does it: all events in one list, dumped at once."""
    merged = []
    for path in sorted(folder.glob("*.json.gz")):
        rank = path.name.split("-")[2].split(".")[0]
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            trace = json.load(stream)
        for event in trace["traceEvents"]:
            event["pid"] = f"[TP{int(rank):02d}] {event['pid']}"
            merged.append(event)
    with gzip.open(out, "wb") as stream:
        stream.write(json.dumps({"traceEvents": merged}).encode("utf-8"))


def profile_merger(folder: Path, out: Path) -> None:
    """SGLang's own, which needs one profile id in the names of its inputs."""
    # Only in the interpreter that SGLPROF_REAL_PYTHON names.
    from sglang.srt.utils.profile_merger import ProfileMerger  # type: ignore[import-not-found]

    merged = ProfileMerger(str(folder), "1").merge_chrome_traces()
    Path(merged).replace(out)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "sglprof export --to perfetto": with_summary,
    "its events alone": events_only,
    "json + gzip": json_and_gzip,
    "ProfileMerger": profile_merger,
}


def file_of(way: str) -> str:
    return f"{way.replace(' ', '-')}.json.gz"


def measure_here(way: str, folder: Path, out: Path) -> None:
    begin = time.monotonic()
    stdout, sys.stdout = sys.stdout, sys.stderr
    WAYS[way](folder, out)
    sys.stdout = stdout
    wall = time.monotonic() - begin
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        json.dumps(
            {
                "cpu_s": sum(one.ru_utime + one.ru_stime for one in usage),
                "wall_s": wall,
                "peak_mb": usage[0].ru_maxrss / 1024,
                "out_mb": out.stat().st_size / 1e6,
            }
        )
    )


def events_of(path: Path) -> Iterator[dict[str, Any]]:
    """All events but metadata, by plain json, without holding the file."""
    decode = json.JSONDecoder().raw_decode
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        text, at = stream.read(1 << 20), 0
        at = text.index('"traceEvents"')
        at = text.index("[", at) + 1
        while True:
            while at < len(text) and text[at] in " ,\r\n\t":
                at += 1
            if text.startswith("]", at):
                return
            try:
                event, at = decode(text, at)
            except ValueError:
                more = stream.read(1 << 20)
                if not more:
                    raise
                text, at = text[at:] + more, 0
                continue
            if event["ph"] != "M":
                yield event


def check(folder: Path, out: Path) -> bool:
    """Compares the number of events of each rank and category."""
    expected: Counter[tuple[int, str]] = Counter()
    for rank, path in enumerate(sorted(folder.glob("*.json.gz"))):
        expected.update((rank, event.get("cat", event["ph"])) for event in events_of(path))
    merged = Counter(
        (int(str(event["pid"])[:3]) - 100, event.get("cat", event["ph"]))
        for event in events_of(out)
        if event["pid"] >= 1000
    )
    print("every event is there" if merged == expected else f"DIFFERENT: {expected - merged}")
    return merged == expected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "sglprof-bench"
    )
    parser.add_argument("--megabytes", type=int, default=207, help="of JSON a rank")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.folder / "merged"
    out.mkdir(parents=True, exist_ok=True)
    folder = torch_window(args.folder, ranks=args.ranks, megabytes=args.megabytes)
    if args.only:
        measure_here(args.only, folder, out / file_of(args.only))
        return 0
    pythons = dict.fromkeys(WAYS, sys.executable)
    pythons["ProfileMerger"] = os.environ.get("SGLPROF_REAL_PYTHON", "")
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS if pythons[way]}
    for _ in range(args.repeat):
        for way in results:
            command = [pythons[way], "-m", "benchmarks.merge", "--only", way]
            command += ["--folder", str(args.folder), "--megabytes", str(args.megabytes)]
            command += ["--ranks", str(args.ranks)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[way].append(json.loads(done.stdout))
    print(f"{args.ranks} ranks of {args.megabytes} MB, {os.cpu_count()} cores")
    medians = {}
    for way, runs in results.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        medians[way] = median["cpu_s"]
        print(
            f"{way:18} {median['cpu_s']:7.2f} CPU s {median['wall_s']:7.2f} s"
            f" {median['peak_mb']:7.0f} MB peak {median['out_mb']:6.1f} MB written"
        )
    for way in list(WAYS)[:2]:
        print(f"{way}: {medians['json + gzip'] / medians[way]:.1f} x less CPU than json + gzip")
    return int(not check(folder, out / file_of(next(iter(WAYS)))))


if __name__ == "__main__":
    sys.exit(main())
