"""``python -m ci.gpu_check``: asks one NVIDIA GPU what this package assumes of its traces.

Twelve questions, each put in a process of its own (`ci.gpu_recordings`), for 15 minutes at most. It
prints a table, which goes into docs/truth.md, and needs torch, a GPU, this package, for two of
them nsys, for one Triton and for one nvidia-ml-py. The exit status is 0 if every answer is yes, 1
if one is no, 3 if none is no, but something was not run.

``--out FILE`` writes the answers with all numbers as JSON. ``--keep FOLDER`` keeps the recordings
below 300 kB; ``--read FOLDER`` answers from such recordings, without a GPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ci import gpu_answers as answers
from ci.gpu_answers import NO, NOT_RUN, YES, Answer, Facts, NotRun
from pytest_sglprof._errors import NoKernels, SglprofError

ROOT = Path(__file__).resolve().parents[1]
MACHINE, MACHINE_LIMIT = "machine", 50  # the recording that only says what is there; s
MOST_KEPT = 300_000  # bytes of a recording, compressed
LOG = "log.txt"


class Check(NamedTuple):
    """One question. recording: of `ci.gpu_recordings`; limit: for making it, s."""

    name: str
    question: str
    recording: str
    answer: Callable[[Path, Facts], Answer]
    limit: int


CHECKS = (
    Check(
        "graph-correlation",
        "torch: do all kernels of a graph's replay have the correlation of `cudaGraphLaunch`?",
        "window",
        answers.graph_correlation,
        50,
    ),
    Check(
        "graph-fan-out",
        "torch: has each replay as many kernels as its graph captured?",
        "window",
        answers.graph_fan_out,
        50,
    ),
    Check(
        "runtime-launches",
        "torch: has each launch call of the runtime inside of a window exactly one kernel?",
        "window",
        answers.runtime_launches,
        50,
    ),
    Check(
        "driver-launches",
        "torch: has each `cuLaunchKernel` or `cuLaunchKernelEx` (Triton) exactly one kernel?",
        "triton",
        answers.driver_launches,
        80,
    ),
    Check(
        "edges",
        "torch: are launches without kernels, of a busy GPU, only in the first and last two steps?",
        "busy_edges",
        answers.edges,
        50,
    ),
    Check(
        "gpu-only",
        'torch: has a window with `activities=["GPU"]` neither steps nor launch calls?',
        "gpu_only",
        answers.gpu_only,
        50,
    ),
    Check(
        "durations",
        "torch: does each kernel end before the next one of its stream begins?",
        "window",
        answers.durations,
        50,
    ),
    Check(
        "nsys-earlier-graphs",
        "nsys: are all kernels recorded of graphs that were captured before `nsys start`?",
        "nsys",
        answers.nsys_earlier_graphs,
        145,
    ),
    Check(
        "nsys-graph-ids",
        "nsys: are the ids of a graph and its nodes equal in all replays and in two windows?",
        "nsys",
        answers.nsys_graph_ids,
        145,
    ),
    Check(
        "speed-after-window",
        "is a step as fast after a torch window as before (2 %)?",
        "speed",
        answers.speed_after_window,
        50,
    ),
    Check(
        "stall",
        "does stopping a torch window take at most 0.05 s per MB of JSON?",
        "stall",
        answers.stall,
        90,
    ),
    Check(
        "nvml",
        "does NVML show clocks, throttle reasons, and a process by the id that it has itself?",
        "nvml",
        answers.nvml,
        40,
    ),
)


def record(name: str, folder: Path, limit: float) -> str:
    """Makes a recording in a process of its own; what went wrong with that, "" if nothing did."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ci.gpu_recordings", name, str(folder.resolve())]
    return run_limited(command, folder, limit)


def run_limited(command: Sequence[str], folder: Path, limit: float) -> str:
    """Runs a command, with its output in a log in `folder`; what went wrong, "" if nothing did.

    limit: s; after it the command and its process group are killed.
    """
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"it took longer than {limit:g} s"
        finally:
            (folder / "stop").touch()  # ends what runs under nsys
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not status:
        return ""
    *_, last = ["", *(folder / LOG).read_text(errors="replace").split("\n")[:-1]]
    ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"its process ended with {ended}{': ' if last else ''}{last.strip()}"


def answered(check: Check, folder: Path, trouble: str = "") -> Answer:
    """The answer of a recording. trouble: what went wrong while it was made."""
    try:
        answer = check.answer(folder, answers.read_facts(folder))
    except NotRun as error:
        return Answer(NOT_RUN, trouble if trouble and not _has_facts(folder) else str(error))
    except NoKernels as error:
        answer = Answer(NO, error.what)
    except SglprofError as error:
        answer = Answer(NOT_RUN, f"its recording cannot be read: {error.what}")
    except Exception as error:  # the other answers must not be lost
        answer = Answer(NOT_RUN, f"its recording was not understood: {error!r}")
    if trouble:
        answer = Answer(answer.answer, f"{answer.reason} ({trouble})", answer.numbers)
    return answer


def _has_facts(folder: Path) -> bool:
    return (folder / "facts.json").exists()


def tidied(folder: Path) -> list[str]:
    """Removes what is not kept of a recording; the names of files that are too large for it."""
    left_out = []
    for file in filter(Path.is_file, sorted(folder.iterdir())):
        packed = file.read_bytes()
        if file.suffix != ".gz":
            packed = gzip.compress(packed)
        is_kept = file.name == "facts.json" or file.name in (answers.TRACE, *answers.REPORTS)
        if is_kept and len(packed) <= MOST_KEPT:
            continue
        if is_kept:
            left_out.append(f"{file.name} ({len(packed):,} bytes)")
        file.unlink()
    return left_out


def ask_all(checks: Sequence[Check], folder: Path, *, read_only: bool) -> dict[str, Any]:
    """The document of all answers; recordings are made in, or read from, folders below `folder`."""
    trouble = "" if read_only else record(MACHINE, folder / MACHINE, MACHINE_LIMIT)
    machine: Facts = {}
    missing = ""
    try:
        machine = answers.read_facts(folder / MACHINE)
    except NotRun as error:
        missing = "" if read_only else trouble or str(error)
    results = []
    for check in checks:
        begin = time.monotonic()
        left_out: list[str] = []
        where = folder / check.name
        if missing:
            answer = Answer(NOT_RUN, missing)
        elif read_only:
            answer = answered(check, where)
        else:
            answer = answered(check, where, record(check.recording, where, check.limit))
            left_out = tidied(where)
        results.append(
            {
                "id": check.name,
                "question": check.question,
                "answer": answer.answer,
                "reason": answer.reason,
                "numbers": dict(answer.numbers),
                "seconds": round(time.monotonic() - begin, 1),
                "left_out": left_out,
            }
        )
    if not read_only:
        tidied(folder / MACHINE)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"format": 1, "at": at, "machine": dict(machine), "checks": results}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The answers as a table in Markdown, for docs/truth.md."""
    keys = ("id", "question", "answer", "reason")
    rows = [" | ".join(str(result[key]).replace("|", "\\|") for key in keys) for result in results]
    head = ["check | question | answer | what was seen", "--- | --- | --- | ---"]
    return "\n".join(f"| {' '.join(row.split())} |" for row in [*head, *rows])


def exit_status(given: Sequence[str]) -> int:
    """0 if every answer is yes, 1 if one is no, else 3."""
    if NO in given:
        return 1
    return 0 if set(given) == {YES} else 3


def main(words: Sequence[str] | None = None) -> int:
    """Asks, prints and writes the answers."""
    parser = argparse.ArgumentParser(
        prog="python -m ci.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [check.name for check in CHECKS]
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the answers as JSON")
    folders = parser.add_mutually_exclusive_group()
    folders.add_argument("--keep", type=Path, metavar="FOLDER", help="keep small recordings")
    folders.add_argument("--read", type=Path, metavar="FOLDER", help="answer from recordings")
    parser.add_argument("--only", nargs="+", metavar="CHECK", choices=names, help="ask only these")
    options = parser.parse_args(words)
    if options.keep and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep: {options.keep} is not empty; give a new folder")
    checks = [check for check in CHECKS if check.name in (options.only or names)]
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        folder = options.read or options.keep or Path(temporary)
        document = ask_all(checks, folder, read_only=options.read is not None)
    print(table(document["checks"]))
    if options.out:
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    return exit_status([result["answer"] for result in document["checks"]])


if __name__ == "__main__":
    sys.exit(main())
