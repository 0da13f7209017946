"""Which expert got how many tokens while a window was open, from SGLang's recorder of experts.

Only where `/server_info` says that the server has one: its endpoints kill any other server.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._capture.recording import POLL, LifeWatch
from pytest_sglprof._errors import ServerError
from pytest_sglprof._server.command import EXPERT_DUMPS
from pytest_sglprof._server.sizes import EXPERTS

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server

CONVERTER = Path(__file__).with_name("convert_experts.py")
DUMP = re.compile(r"expert_distribution_recorder_(\d+(?:\.\d+)?)(?:_\d+)?\.pt")
CALL_SECONDS = 30.0  # s; the ranks answer between two passes
DUMP_SECONDS = 30.0  # s to wait for the files of all ranks, which answer before they write
CONVERT_SECONDS = 120.0  # s; most of it is the import of torch
TOTALS = ("stat", "stat_approx")  # modes that add up the passes; the others keep each


class ExpertRecording:
    """The recorder of one server during one window. Nothing here raises: notes say what failed.

    folder: of the window; the counts become a file there, which `_trace.beside` reads.
    """

    def __init__(self, server: Server, folder: Path, life: LifeWatch) -> None:
        self._server = server
        self._folder = folder
        self._life = life
        self._started = False
        self._start_s = 0.0
        self._notes: list[str] = []

    def start(self) -> None:
        """Starts to record, before the window opens, if the server can do so."""
        if not self._server.info.get("expert_distribution_recorder_mode"):
            return
        if reason := refusal(self._server):
            self._notes.append(f"experts are not recorded: {reason}")
            return
        began = time.monotonic()
        with self._noting("not recorded"):
            self._call("start")
            self._started = True
        self._start_s = time.monotonic() - began

    def finish(self) -> tuple[str, ...]:
        """Stops, and writes the counts into the folder. Returns notes: what it cost and lacks."""
        if self._started:
            self._started = False
            with self._noting("lost"):
                self._notes += self._finished()
        return tuple(self._notes)

    def abort(self) -> None:
        """Stops, and drops the counts."""
        if self._started:
            self._started = False
            with contextlib.suppress(ServerError):
                self._call("stop")

    def _finished(self) -> list[str]:
        began, dumped = time.monotonic(), time.time()
        self._call("stop")
        self._call("dump")
        if _reports_balance(self._server.info):  # it recorded before the window, too
            self._call("start")
        dumps = self._dumps(dumped)
        stop_s = time.monotonic() - began
        if not dumps:
            raise _Lost(f"no dump was written into {dump_folder(self._server)} on this machine")
        began = time.monotonic()
        report = convert(self._server, dumps, self._folder / EXPERTS)
        convert_s = time.monotonic() - began
        self._remove(dumps)
        what = f"{report['passes']} passes"
        if self._server.info["expert_distribution_recorder_mode"] in TOTALS:
            what = "totals"
        cost = (
            f"experts: {what} recorded; the server took {self._start_s:.1f} s to start the "
            f"recorder and {stop_s:.1f} s to write its counts, which were read in {convert_s:.1f} "
            "s; while it records, each pass also copies its counts"
        )
        return [cost, *(f"experts: {note}" for note in report["notes"])]

    def _call(self, action: Any) -> None:
        deadline = time.monotonic() + CALL_SECONDS
        client = self._server.client
        self._life.call(
            lambda left: client.record_experts(action, left), deadline, f"{action} of the recorder"
        )

    def _dumps(self, since: float) -> list[Path]:
        """The dumps of all ranks since a Unix time; after `DUMP_SECONDS` those that are there."""
        folder = dump_folder(self._server)
        mode = self._server.info["expert_distribution_recorder_mode"]
        expected = 1 if mode in TOTALS else self._server.sizes.tp
        over = time.monotonic() + DUMP_SECONDS
        while True:
            whole = [
                file
                for file in sorted(folder.glob("*.pt"))
                if (match := DUMP.fullmatch(file.name))
                and float(match[1]) >= since
                and zipfile.is_zipfile(file)
            ]
            if len(whole) >= expected or time.monotonic() >= over or self._life.death():
                return whole
            time.sleep(POLL)

    def _remove(self, dumps: list[Path]) -> None:
        """Removes the dumps in our own folder; in one that the user chose they stay."""
        if not _chosen_folder(self._server):
            for file in dumps:
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _noting(self, what: str) -> Any:
        try:
            yield
        except (ServerError, _Lost, OSError, ValueError, LookupError) as error:
            reason = error.what if isinstance(error, ServerError) else str(error)
            self._notes.append(f"experts are {what}: {reason}")


class _Lost(Exception):
    """Why there are no counts."""


def _reports_balance(info: Mapping[str, Any]) -> bool:
    return str(info.get("expert_balancedness_report_mode") or "off") != "off"


def _is_placed(info: Mapping[str, Any]) -> bool:
    """Whether experts may be elsewhere than in their order; totals do not say where."""
    trivial = info.get("init_expert_location", "trivial") == "trivial"
    return not trivial or bool(info.get("ep_num_redundant_experts"))


def _sends_tokens(info: Mapping[str, Any]) -> bool:
    """Whether tokens are sent to the ranks of their experts, each rank counting its own tokens."""
    return info.get("moe_a2a_backend") not in (None, "none")


# (whether it holds for a server, why its experts are not recorded)
_REFUSALS: tuple[tuple[Callable[[Server], object], str], ...] = (
    (
        lambda server: server.attached,
        "this server was started by somebody else, so that neither the interpreter that can read "
        "its counts nor their folder is known",
    ),
    (lambda server: server.info.get("enable_eplb"), "EPLB uses the recorder itself"),
    (
        lambda server: server.sizes.dp > 1 or server.sizes.pp > 1 or server.sizes.moe_dp > 1,
        "dumps of replicas and of pipeline stages cannot be distinguished",
    ),
    (
        lambda server: server.info.get("elastic_ep_backend") is not None,
        "with elastic experts, ranks may join",
    ),
    (
        lambda server: "moe_a2a_backend" not in server.info,
        "/server_info does not say how tokens reach their experts (moe_a2a_backend)",
    ),
    (
        lambda server: _has_totals(server) and server.sizes.is_cpu,
        "a server on a CPU dies when it dumps totals",
    ),
    (
        lambda server: _has_totals(server) and _is_placed(server.info),
        "totals do not say on which rank an expert is",
    ),
)


def _has_totals(server: Server) -> bool:
    return server.info.get("expert_distribution_recorder_mode") in TOTALS


def refusal(server: Server) -> str:
    """Why the experts of a server that has a recorder are not recorded; "" if they can be."""
    return next((reason for holds, reason in _REFUSALS if holds(server)), "")


def dump_folder(server: Server) -> Path:
    """Where a server that we started dumps."""
    return Path(_chosen_folder(server) or server.folder / "tmp" / "experts")


def _chosen_folder(server: Server) -> str:
    return dict(server.spec.env).get(EXPERT_DUMPS) or os.environ.get(EXPERT_DUMPS, "")


def convert(server: Server, dumps: list[Path], out: Path) -> dict[str, Any]:
    """Writes the counts of `dumps` into `out`; returns what the converter reports."""
    ranks = {rank.label: rank.ep or 0 for rank in server.sizes.ranks()}
    summed = ["--summed"] if _sends_tokens(server.info) else []
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    command = [server.python, "-I", str(CONVERTER), str(out), "--ranks", json.dumps(ranks)]
    nice = shutil.which("nice")
    try:
        ran = subprocess.run(
            [*([nice] if nice else []), *command, *summed, *map(str, dumps)],
            env={**keep, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=CONVERT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _Lost(f"they were not read within {CONVERT_SECONDS:.0f} s") from error
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise _Lost(f"{last} (the dumps are in {dumps[0].parent})")
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return report
