"""An nsys with sessions, as 2023.4.4 was seen to behave; a program of its own that tests install.

``nsys profile`` runs the server as its child. The sessions are files below TMPDIR. The report of
the first window of a session goes where `profile` was asked to write, whatever `start` says. A
report holds the pids of the ranks, and its export 100 kernels of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
VERSION = "NVIDIA Nsight Systems version 2023.4.4.54-234433681190v0"


def install(folder: Path) -> Path:
    """The command `nsys`, in a folder of its own."""
    folder.mkdir(parents=True)
    path = folder / "nsys"
    head = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    path.write_text(f"{head}from tests.support.session_nsys import main\nsys.exit(main())\n")
    path.chmod(0o755)
    return path


def main() -> int:
    words = sys.argv[1:]
    given = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    command = words[0]
    if command == "--version":
        print(VERSION)
    elif "--help" in words:
        print("  -Y, --start-later=" if command == "profile" else "sqlite")
    elif command == "profile":
        return profile(words[1:], given)
    elif command == "sessions":
        for number, path in enumerate(sorted(sessions().glob("*.json")), start=7001):
            state = json.loads(path.read_text())
            print(f"   {number}   00:03   {state['now']}   1 {path.stem}")
    elif command == "export":
        export(Path(words[-1]), Path(given["--output"]))
    else:
        return control(command, given)
    return 0


def sessions() -> Path:
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / "fake-nsys-sessions"
    folder.mkdir(exist_ok=True)
    return folder


def profile(words: list[str], given: dict[str, str]) -> int:
    at = next(number for number, word in enumerate(words) if not word.startswith("-"))
    path = sessions() / f"{given['--session-new']}.json"
    with subprocess.Popen(words[at:]) as child:
        state = {"now": "DelayedCollection", "first": given["--output"], "pid": child.pid}
        path.write_text(json.dumps(state))
        try:
            return child.wait()
        finally:
            path.unlink()


def control(command: str, given: dict[str, str]) -> int:
    path = sessions() / f"{given['--session']}.json"
    state = json.loads(path.read_text())
    if command == "start":
        output = state.pop("first", None) or given["--output"]
        state = {**state, "now": "Collection", "output": output}
    elif command == "stop":
        state["now"] = "Launched"
        ranks = {}
        for process in psutil.Process(state["pid"]).children(recursive=True):
            title = " ".join(process.cmdline())
            if title.startswith("sglang::scheduler"):
                ranks[process.pid] = title
        report = Path(state["output"])
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(sorted(ranks)))
        print(f"Generated:\n    {report}")
    path.write_text(json.dumps(state))
    return 0


def export(report: Path, target: Path) -> None:
    from tests.support.nsys_exports import STRINGS, global_id, kernel, make_export

    pids = json.loads(report.read_text())
    rows = [
        kernel(
            step * 1_000_000,
            step * 1_000_000 + 100_000 * (1 + number),
            globalPid=global_id(pid),
            deviceId=number,
        )
        for number, pid in enumerate(pids)
        for step in range(100)
    ]
    make_export(target, CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
