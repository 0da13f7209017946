"""Requests to ``/start_profile``: their body, folder and size, and those that must be refused."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import Inconclusive, WindowRefused, did_you_mean
from pytest_sglprof._files import safe_name
from pytest_sglprof._process import shares_files
from pytest_sglprof._server.client import is_local_url, port_of
from pytest_sglprof._server.journal import run_of
from pytest_sglprof._server.lease import listener_of
from pytest_sglprof._server.sizes import Role, ServerSizes, version_of

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server


ACTIVITIES = ("CPU", "GPU", "MEM", "RPD", "CUDA_PROFILER", "XPU")
TRACING = frozenset({"CPU", "GPU", "RPD", "XPU"})  # those that leave a trace of kernels
STAGES = {"prefill": "EXTEND", "extend": "EXTEND", "decode": "DECODE"}
NAME_LIMIT = 80  # characters of an id or a prefix: rank, stage and suffix follow in the name
# The oldest versions that have `detailed_annotations`, take the id that a client gives (0.5.14
# does not, 0.5.20 does), and skip the placeholder batches of a decode server in windows by stage.
KNOWS_ANNOTATIONS = (0, 5, 19)
TAKES_ID = (0, 5, 20)
SKIPS_PLACEHOLDERS = (0, 5, 23)
# Until then a window of N steps ended before its Nth forward pass: one more is asked for.
ALL_STEPS = (0, 5, 16)
# A window armed at a step that never comes replaces the trigger of an earlier one.
FAR_STEP = 10**15
DISARM: Mapping[str, Any] = {"start_step": FAR_STEP, "num_steps": 1}


def default_activities(device: str) -> tuple[str, ...]:
    """CPU alone on a CPU server, else CPU and the accelerator."""
    if device == "cpu":
        return ("CPU",)
    return ("CPU", "XPU") if device == "xpu" else ("CPU", "GPU")


def request_body(
    spec: WindowSpec, *, profile_id: str, output_dir: str, sizes: ServerSizes
) -> dict[str, Any]:
    """The parameters of `spec` as ``/start_profile`` takes them, without those unset."""
    activities = (
        spec.activities if spec.activities is not None else default_activities(sizes.device)
    )
    body: dict[str, Any] = {
        "output_dir": output_dir,
        "profile_id": profile_id,
        "activities": list(activities),
        "with_stack": spec.with_stack,
        "record_shapes": spec.record_shapes,
    }
    if spec.num_steps is not None:
        body["num_steps"] = spec.num_steps + lost_steps(spec, sizes.version)
    if spec.start_step is not None:
        body["start_step"] = spec.start_step
    if spec.profile_by_stage:
        body["profile_by_stage"] = True
        if spec.profile_stages:
            body["profile_stages"] = list(spec.profile_stages)
    if spec.merge_profiles:
        body["merge_profiles"] = True
    if spec.profile_prefix:
        body["profile_prefix"] = safe_name(spec.profile_prefix, limit=NAME_LIMIT)
    if spec.detailed_annotations and knows_annotations(sizes.version):
        body["detailed_annotations"] = True
    return body


def knows_annotations(version: str) -> bool:
    """True if the server is known to accept ``detailed_annotations``."""
    return version_of(version) >= KNOWS_ANNOTATIONS


def takes_id(version: str) -> bool:
    """True if the server is known to name a window's files by the client's ``profile_id``."""
    return version_of(version) >= TAKES_ID


def lost_steps(spec: WindowSpec, version: str) -> int:
    """How many of the steps that are asked for are not recorded, so that more have to be."""
    counts_itself = spec.profile_by_stage or spec.start_step is not None
    return int(not counts_itself and () < version_of(version) < ALL_STEPS)


def wanted_stages(spec: WindowSpec) -> tuple[str, ...]:
    """Suffixes of the files of a by-stage window; empty for an ordinary one."""
    if not spec.profile_by_stage:
        return ()
    stages = [STAGES[stage.lower()] for stage in spec.profile_stages or ("prefill", "decode")]
    return tuple(dict.fromkeys(stages))


def refuse_request(
    spec: WindowSpec,
    sizes: ServerSizes,
    *,
    under_nsys: bool,
    standin: bool,
    env: Mapping[str, str],
    last_step: int | None,
    role: Role = "",
) -> None:
    """Raises `WindowRefused` for a request that is known to break the server or the data.

    under_nsys: whether the server runs under nsys. standin: whether it is the stand-in. env: of
    the server, as far as known. last_step: the highest step in its log; None if unknown. role:
    of the server.
    """
    if env.get("SGLANG_PROFILE_V2", "").lower() in ("1", "true", "yes", "y"):
        raise WindowRefused(
            "the server runs with SGLANG_PROFILE_V2, where a start without stages, and any stop, "
            "kills it",
            expected="a server without SGLANG_PROFILE_V2",
            hint="remove the variable from the server's env",
        )
    if under_nsys and not sizes.is_cpu and not standin:
        raise WindowRefused(
            "a torch window on a GPU server that runs under nsys: CUPTI takes one subscriber",
            expected="backend='nsys', or a server that was started without nsys",
            hint="mark the test sglang_server(nsys=False), or the window backend='nsys'",
        )
    _refuse_activities(spec, sizes)
    _refuse_stages(spec, sizes, role)
    _refuse_steps(spec, last_step)


def _refuse_activities(spec: WindowSpec, sizes: ServerSizes) -> None:
    if spec.activities is None:
        return
    unknown = [name for name in spec.activities if name not in ACTIVITIES]
    if unknown or not TRACING.intersection(spec.activities):
        raise WindowRefused(
            f"activities={list(spec.activities)} would record no kernel: the server accepts "
            "it, records nothing, and then refuses to stop",
            expected=f"one or more of {', '.join(ACTIVITIES)}, and CPU or GPU among them",
            hint="for CUDA_PROFILER use backend='nsys' with num_steps"
            if "CUDA_PROFILER" in spec.activities
            else did_you_mean(unknown, ACTIVITIES, "names are upper case"),
        )
    deadly = [name for name in spec.activities if name not in ("CPU",)]
    if sizes.is_cpu and deadly:
        raise WindowRefused(
            f"activities {', '.join(deadly)} on a CPU server: its torch has no such device, "
            "and the request kills it",
            expected="activities=['CPU'] (the default there)",
            hint="leave activities out",
        )


def _refuse_stages(spec: WindowSpec, sizes: ServerSizes, role: Role) -> None:
    if not spec.profile_by_stage:
        if spec.profile_stages:
            raise WindowRefused(
                "profile_stages without profile_by_stage",
                expected="profile_by_stage=True beside it",
            )
        return
    if spec.num_steps is None:
        raise WindowRefused(
            "profile_by_stage without num_steps: the server dies at its next batch",
            expected="a number of steps",
            hint="give num_steps",
        )
    if sizes.dp_attention and sizes.attn_dp > 1:
        raise WindowRefused(
            "profile_by_stage under DP attention: each rank counts its own stages, so their "
            "files hold different steps",
            expected="a window without profile_by_stage",
            hint="leave profile_by_stage out; kernels are assigned to stages when they are read",
        )
    if role == "decode" and version_of(sizes.version) < SKIPS_PLACEHOLDERS:
        raise WindowRefused(
            f"profile_by_stage on a decode server of version {sizes.version or 'unknown'}: the "
            "batches of requests that arrive are of no stage that it knows, and it dies of them",
            expected="a window without profile_by_stage",
            hint="leave profile_by_stage out: a decode server runs decode steps alone",
        )
    unknown = [stage for stage in spec.profile_stages or () if stage.lower() not in STAGES]
    if unknown:
        raise WindowRefused(
            f"unknown profile_stages: {', '.join(unknown)}",
            expected="prefill, decode, or both",
            hint=did_you_mean(unknown, STAGES),
        )


def _refuse_steps(spec: WindowSpec, last_step: int | None) -> None:
    if spec.num_steps is not None and spec.num_steps < 1:
        raise WindowRefused(f"num_steps={spec.num_steps}", expected="1 or more")
    if spec.start_step is None:
        return
    if spec.start_step < 1 or (last_step is not None and spec.start_step <= last_step):
        seen = f"; the server is at {last_step}" if last_step is not None else ""
        raise WindowRefused(
            f"start_step={spec.start_step} is past{seen}",
            expected="a step that is still to come, counted from the server's start",
            hint="leave start_step out and use delay, which counts from now",
        )


# The output folder, by its path on the server and by its path on this machine.


@dataclass(frozen=True)
class OutputFolder:
    """Where a window is written. server: path on the server. local: path on this machine.

    ours: True if it was made for this window alone, so that it is removed afterwards.
    """

    server: str
    local: Path
    ours: bool

    def prepare(self, *, shared: bool) -> None:
        """Makes the folder and tries to write into it, since an unwritable one kills the server.

        shared: whether a server that may run as another user must be able to write here.
        """
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            if shared and self.ours:
                self.local.chmod(0o777)
            with tempfile.TemporaryFile(dir=self.local):
                pass
        except OSError as error:
            raise WindowRefused(
                f"{self.local} cannot be written: {error.strerror or error}",
                expected="a folder that the server can write its traces into",
                hint="choose another output_dir; a server that cannot write there dies",
            ) from error

    def collect(self, files: Mapping[Path, str], target: Path) -> dict[Path, Path]:
        """Moves `files` into `target`, each under its name; returns old path -> new path.

        Files in a folder of the user are copied (or linked) instead.
        """
        target.mkdir(parents=True, exist_ok=True)
        moved = {}
        for path, name in files.items():
            new = target / name
            if self.ours:
                shutil.move(path, new)
            else:
                _copy(path, new)
            moved[path] = new
        self.remove()
        return moved

    def remove(self) -> None:
        """Removes the folder with everything in it, if it was made for this window."""
        if self.ours:
            shutil.rmtree(self.local, ignore_errors=True)


def _copy(path: Path, new: Path) -> None:
    """Hard-links the file if the file system can, else copies it."""
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
    except OSError:
        shutil.copy2(path, new)


def output_folder(server: Server, spec: WindowSpec, window_id: str) -> OutputFolder:
    """The folder of a window. Raises `WindowRefused` if its files could not be read here."""
    if not server.attached:
        if spec.output_dir:
            local = Path(spec.output_dir).expanduser().absolute()
            if server.is_gathered and not local.is_relative_to(run_of(server.folder)):
                raise WindowRefused(
                    f"output_dir {local} is a folder of nodes that share no disk with this machine",
                    expected="a folder below the results, whose files are brought here",
                    hint="leave output_dir out",
                )
            return OutputFolder(str(local), local, ours=False)
        local = server.trace_root.absolute() / _fresh(server.trace_root, window_id)
        return OutputFolder(str(local), local, ours=True)
    if server.server_dir is None:
        return _folder_on_this_machine(server, spec, window_id)
    theirs, ours = PurePosixPath(server.server_dir[0]), Path(server.server_dir[1]).absolute()
    if not spec.output_dir:
        name = _fresh(ours, window_id)
        return OutputFolder(str(theirs / name), ours / name, ours=True)
    wanted = PurePosixPath(spec.output_dir)
    try:
        below = wanted.relative_to(theirs)
    except ValueError:
        raise WindowRefused(
            f"output_dir {spec.output_dir} is a folder of the server's machine that cannot be "
            "read from here",
            expected=f"a folder below {theirs}",
            hint="leave output_dir out, or name another pair with --sglprof-server-dir",
        ) from None
    return OutputFolder(str(wanted), ours / below, ours=False)


def _folder_on_this_machine(server: Server, spec: WindowSpec, window_id: str) -> OutputFolder:
    """The folder of a window of an attached server for which nobody named one."""
    if not is_local_url(server.url):
        raise WindowRefused(
            f"the server at {server.url} is on another machine, and it is not known which of its "
            "folders can be read from here",
            expected="a folder that both machines (or containers) share",
            hint="give --sglprof-server-dir (--server-dir of a command) DIR, which both see under "
            "this path, or SERVER:LOCAL; if they share none, name one of the server's machine, "
            "such as /tmp: the window says how to fetch its files",
        )
    if spec.output_dir:
        chosen = Path(spec.output_dir).expanduser().absolute()
        return OutputFolder(str(chosen), chosen, ours=False)
    listener = listener_of(port_of(urlsplit(server.url)))
    if listener is not None and shares_files(listener):
        root = server.trace_root.absolute()
        local = root / _fresh(root, window_id)
    else:  # another user's, or behind a forwarded port: every machine has this one
        local = Path("/tmp") / f"sglprof-{secrets.token_hex(6)}"
    return OutputFolder(str(local), local, ours=True)


def how_to_fetch(folder: OutputFolder, url: str) -> str:
    """What to do if a window's files did not come into `folder`, as a note of the window."""
    name, theirs = folder.local.name, folder.server
    host = urlsplit(url).hostname
    return (
        f"nothing came into {folder.local}. If the server's {theirs} is on another machine or in a "
        f"container, fetch it with one of: scp -r {host}:{theirs} {name} | docker cp "
        f"CONTAINER:{theirs} {name} | kubectl cp POD:{theirs} {name}, and then run: "
        f"sglprof check {name}"
    )


def _fresh(root: Path, window_id: str) -> str:
    """An unused name below `root`, so that the folder holds only files of this window."""
    name = safe_name(window_id)
    number = 1
    while (root / name).exists():
        number += 1
        name = safe_name(f"{window_id}-{number}")
    return name


# Estimates of a window's size, checked against the disk and the server's watchdog.

# Uncompressed JSON of one step of one rank: a decode step of a large model, without stacks, has
# about 3,000 GPU activities and their launches.
STEP_BYTES = 4_000_000
STACK_FACTOR = 5.0  # measured: stacks make a trace 3 to 6 times larger
SHAPES_FACTOR = 1.5
STEPS_BY_HAND = 100  # assumed for a window without steps or duration
STEPS_PER_SECOND = 50  # assumed for a window with a duration
EXPORT_BYTES_PER_SECOND = 20_000_000  # of one rank: serialising and compressing


class TooLittleSpace(WindowRefused, Inconclusive):
    """The disk is too full for the window's traces, so it is not opened: inconclusive."""

    exit_status = Inconclusive.exit_status


def bytes_per_rank(spec: WindowSpec) -> int:
    """Estimated size of one rank's trace before compression, bytes."""
    if spec.num_steps is not None:
        steps = spec.num_steps * (2 if spec.profile_by_stage else 1)
    elif spec.duration is not None:
        steps = max(int(spec.duration * STEPS_PER_SECOND), 1)
    else:
        steps = STEPS_BY_HAND
    factor = (STACK_FACTOR if spec.with_stack else 1.0) * (
        SHAPES_FACTOR if spec.record_shapes else 1.0
    )
    return int(steps * STEP_BYTES * factor)


def check_space(spec: WindowSpec, sizes: ServerSizes, folders: Iterable[Path]) -> None:
    """Raises `TooLittleSpace` if a folder's disk cannot hold the traces of all ranks.

    Torch writes uncompressed JSON into the server's TMPDIR before it compresses it.
    """
    needed = bytes_per_rank(spec) * max(len(sizes.ranks()), 1)
    for folder in folders:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise TooLittleSpace(
                f"{folder} has {_gigabytes(free)} free, the window is estimated at "
                f"{_gigabytes(needed)} before compression",
                expected="room for the traces of all ranks",
                hint="take fewer steps, turn with_stack and record_shapes off, or free space",
            )


def check_watchdog(spec: WindowSpec, limit: float | None) -> None:
    """Raises `WindowRefused` if the export may take over half of ``--watchdog-timeout``.

    limit: the timeout, s; None if unknown. The export runs inside the scheduler's loop, so the
    watchdog kills a server whose export takes too long.
    """
    seconds = bytes_per_rank(spec) / EXPORT_BYTES_PER_SECOND
    if limit and limit > 0 and seconds > limit / 2:
        raise WindowRefused(
            f"writing this window is estimated at {seconds:.0f} s, and the server's watchdog "
            f"kills it after {limit:.0f} s without progress",
            expected="an export of less than half of the watchdog's limit",
            hint="take fewer steps or no stacks, or start the server with a larger "
            "--watchdog-timeout",
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
