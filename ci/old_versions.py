"""What servers of older versions say, by executing the code of their wheels.

    python -m ci.old_versions [--wheels DIR] [--write] [VERSION ...]

Each wheel's formatters, routes, profiler and driver run with stubs in place of all that is heavy
(ci/stubbed.py), in a process of their own, and what they say becomes
tests/data/versions/VERSION.json. Without --write the records are compared, and the exit status is
1 where one differs. What is read from the source instead has "executed": false.

DIR holds unpacked wheels as sglang-VERSION/; by default they are downloaded once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ci.old_batches import VALUES, log_lines
from ci.old_http import answers, driver
from ci.old_profiler import windows
from ci.old_wheels import MANAGERS, lifted, opened
from ci.stubbed import Stub, Wheel

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "tests" / "data" / "versions"
CACHE = Path.home() / ".cache" / "pytest-sglprof" / "wheels"
VERSIONS = ("0.4.4", "0.5.3", "0.5.9", "0.5.14", "0.5.20", "0.5.23")
LOG_ONLY = ("0.4.4",)
RUNNER = "sglang.srt.model_executor.model_runner"
READY = "ready to roll"


def record(version: str, wheels: Path) -> dict[str, Any]:
    """All that is kept of one version."""
    wheel = opened(wheels / f"sglang-{version}")
    kept: dict[str, Any] = {
        "version": version,
        "values": dict(VALUES),
        "batches": {"executed": True, "lines": log_lines(wheel)},
        "rank": tags(wheel),
        "ready": ready_line(wheel),
    }
    if version in LOG_ONLY:
        return kept
    kept |= {"windows": windows(wheel), "spans": spans(wheel), "http": answers(wheel)}
    return {**kept, "driver": driver(wheel)}


class _Configured(Exception):
    """Ends the start of a scheduler once its log is configured."""


def tags(wheel: Wheel) -> dict[str, Any]:
    """The head of the lines of a rank, and the title of its process, with all sizes 2."""
    module = f"{MANAGERS}.scheduler"
    titles: list[str] = []
    places = {f"{each}_rank": 1 for each in ("tp", "dp", "pp", "moe_ep", "attn_cp", "moe_dp")}
    sizes = {f"{each}_size": 2 for each in ("tp", "dp", "pp", "ep", "attn_cp", "moe_dp")}

    def configured(_: Any, prefix: str = "") -> None:
        titles.append(prefix.strip())
        raise _Configured

    names: dict[str, Any] = {
        "os": os,
        "faulthandler": SimpleNamespace(enable=lambda: None),
        "psutil": Stub("psutil"),
        "kill_itself_when_parent_died": lambda: None,
        "setproctitle": SimpleNamespace(setproctitle=titles.append),
        "configure_logger": configured,
        "get_parallel": lambda: SimpleNamespace(**places, **sizes),
    }
    newer = "configure_scheduler_process"
    name = newer if newer in wheel.text(module) else "run_scheduler_process"
    start = lifted(wheel, module, name, **names)
    given = {"server_args": SimpleNamespace(**sizes), "gpu_id": 0, **places}
    with contextlib.suppress(_Configured):
        wanted = inspect.signature(start).parameters
        display = [each for each in wanted if each.startswith("display_")]
        start(**{each: given.get(each) for each in wanted if each not in display})
    title, prefix = titles
    return {"executed": True, "tags": prefix, "title": title}


def ready_line(wheel: Wheel) -> dict[str, Any]:
    """The text of the line that says so."""
    tree = ast.parse(wheel.text("sglang.srt.entrypoints.http_server"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {"executed": False, "text": next(t for t in texts if READY in str(t))}


def spans(wheel: Wheel) -> dict[str, Any]:
    """Names of the spans of a prefill and a decode step; None where steps have none."""
    plain_builder = "_build_step_span_name"
    new = "sglang.srt.utils.profile_utils"
    if "def build_step_span_name" in wheel.text(new) if wheel.has(new) else False:
        build = wheel.load(new).build_step_span_name
    elif plain_builder in wheel.text(RUNNER):
        modes = wheel.load("sglang.srt.model_executor.forward_batch_info").ForwardMode
        build = lifted(wheel, RUNNER, plain_builder, ForwardMode=modes)
    else:
        assert "step[" not in wheel.text(RUNNER), "steps are named in another way"
        return {"executed": False, "plain": None, "detailed": None}
    modes = wheel.load("sglang.srt.model_executor.forward_batch_info").ForwardMode
    lengths = SimpleNamespace(tolist=lambda: [100, 60])
    more = {"seq_lens_cpu": lengths, "extend_seq_lens_cpu": [100, 60]}
    more |= {"extend_prefix_lens_cpu": [0, 0], "spec_info": None, "extend_num_tokens": 160}
    steps = [
        SimpleNamespace(forward_mode=m, batch_size=2, **more) for m in (modes.EXTEND, modes.DECODE)
    ]
    takes = inspect.signature(build).parameters
    named = {"forward_id": 321} if "forward_id" in takes else {}
    detailed = None
    if "detailed_annotations" in takes:
        detailed = [build(step, True, **named) for step in steps]
    return {"executed": True, "plain": [build(step) for step in steps], "detailed": detailed}


def unpacked(version: str) -> Path:
    """The folder of the unpacked wheels, with that of `version`, downloaded if need be."""
    folder = CACHE / f"sglang-{version}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        words = ["download", "--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
        line = [sys.executable, "-m", "pip", *words, "-q", "-d", str(CACHE), f"sglang=={version}"]
        subprocess.run(line, check=True)
        (wheel,) = CACHE.glob(f"sglang-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
    return CACHE


def text_of(version: str, wheels: Path | None) -> str:
    """The record of a version, made in a process of its own: modules of two wheels never meet."""
    folder = wheels or unpacked(version)
    line = [sys.executable, "-W", "ignore", "-m", "ci.old_versions", "--one", version]
    made = subprocess.run(
        [*line, "--wheels", str(folder)], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return made.stdout


def main() -> int:
    """Makes records; 1 where one differs from what is kept."""
    parser = argparse.ArgumentParser(description="Records what older SGLang servers say.")
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--wheels", type=Path, help="unpacked wheels (default: download them)")
    parser.add_argument("--write", action="store_true", help="write the records")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        sys.stdout.write(json.dumps(record(given.one, given.wheels), indent=1) + "\n")
        return 0
    status = 0
    for version in given.versions:
        path = RECORDS / f"{version}.json"
        text = text_of(version, given.wheels)
        same = path.is_file() and path.read_text(encoding="utf-8") == text
        if given.write:
            RECORDS.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        status |= not (same or given.write)
        print(f"{version}: {'as it was' if same else 'written' if given.write else 'DIFFERS'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
