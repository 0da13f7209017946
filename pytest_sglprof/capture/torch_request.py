"""The body of ``/start_profile``, and the requests that would kill the server or the data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pytest_sglprof.errors import WindowRefused
from pytest_sglprof.files import safe_name
from pytest_sglprof.server.sizes import ServerSizes
from pytest_sglprof.spelling import did_you_mean
from pytest_sglprof.values import WindowSpec

ACTIVITIES = ("CPU", "GPU", "MEM", "RPD", "CUDA_PROFILER", "XPU")
TRACING = frozenset({"CPU", "GPU", "RPD", "XPU"})  # those that leave a trace of kernels
STAGES = {"prefill": "EXTEND", "extend": "EXTEND", "decode": "DECODE"}
NAME_LIMIT = 80  # characters of an id or a prefix: rank, stage and suffix follow in the name
KNOWS_ANNOTATIONS = (0, 5, 23)  # the first version read that has detailed_annotations
# Arming a plain window at a step that never comes takes away the trigger of an earlier one.
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
    """The parameters of `spec` as ``/start_profile`` wants them; unset ones are left out."""
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
        body["num_steps"] = spec.num_steps
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
    """True for servers that are known to take ``detailed_annotations``."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return match is not None and tuple(map(int, match.groups())) >= KNOWS_ANNOTATIONS


def wanted_stages(spec: WindowSpec) -> tuple[str, ...]:
    """Suffixes of the files of a by-stage window; empty for a plain one."""
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
) -> None:
    """Raises `WindowRefused` for a request that is known to break the server or the data.

    under_nsys: the server runs below nsys. env: of the server, as far as known.
    last_step: the highest step that its log has shown; None when unknown.
    """
    if env.get("SGLANG_PROFILE_V2", "").lower() in ("1", "true", "yes", "y"):
        raise WindowRefused(
            "the server runs with SGLANG_PROFILE_V2, and there a plain start, and every stop, "
            "kills it",
            expected="a server without SGLANG_PROFILE_V2",
            hint="take the variable out of the server's env",
        )
    if under_nsys and not sizes.is_cpu and not standin:
        raise WindowRefused(
            "a torch window on a GPU server that runs under nsys: CUPTI takes one subscriber",
            expected="backend='nsys', or a server that was started without nsys",
            hint="mark the test sglang_server(nsys=False), or the window backend='nsys'",
        )
    _refuse_activities(spec, sizes)
    _refuse_stages(spec, sizes)
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


def _refuse_stages(spec: WindowSpec, sizes: ServerSizes) -> None:
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
            "profile_by_stage under DP attention: each rank counts its stages alone, so their "
            "files hold different steps",
            expected="a plain window",
            hint="leave profile_by_stage out; kernels are divided by stage when they are read",
        )
    unknown = [stage for stage in spec.profile_stages or () if stage.lower() not in STAGES]
    if unknown:
        raise WindowRefused(
            f"profile_stages has {', '.join(unknown)}",
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
