"""What a wheel's profiler does with a window: its lines, files, passes and stages.

The scheduler's class is executed; only torch.profiler is a stub, which notes the file that it is
asked to write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

from ci.old_wheels import MANAGERS, PARTS, Clock, logged
from ci.stubbed import Stub, Wheel

FOLDER = "/traces/w1"
ID = "window-1"
STEPS = 5
# Sizes of a server, and the place of one rank in it: (tp, dp, pp, ep).
PLACES: Mapping[str, tuple[dict[str, int], dict[str, int]]] = {
    "tp 2": ({"tp": 2}, {"tp": 1}),
    "dp 2": ({"dp": 2}, {"dp": 1}),
    "tp 2, dp 2": ({"tp": 2, "dp": 2}, {"tp": 1, "dp": 1}),
    "tp 2, pp 2": ({"tp": 2, "pp": 2}, {"tp": 1, "pp": 1}),
    "tp 4, ep 2": ({"tp": 4, "ep": 2}, {"tp": 3, "ep": 1}),
}


@dataclass
class Rank:
    """A profiler of one rank. sizes: of the batches that ran while it recorded; files: those."""

    module: ModuleType
    of: Any = None
    count: int = 0
    sizes: list[int] = field(default_factory=list)
    files: dict[str, list[int]] = field(default_factory=dict)

    def request(self, start: bool, **body: Any) -> Any:
        """A start or a stop, as the front hands it to a scheduler."""
        fields = dict.fromkeys(
            ("output_dir", "start_step", "num_steps", "activities", "with_stack", "record_shapes",
             "profile_prefix", "profile_stages")
        )  # fmt: skip
        fields |= {"profile_by_stage": False, "merge_profiles": False, "profile_id": ID}
        kinds = self.module.ProfileReqType
        kind = kinds.START_PROFILE if start else kinds.STOP_PROFILE
        body = {**fields, "detailed_annotations": False, "output_dir": FOLDER, **body}
        ask = getattr(self.of, "_profile", None) or self.of.profile
        return ask(SimpleNamespace(type=kind, req_type=kind, **body))

    def run(self, mode: str, size: int = 8) -> None:
        """One forward pass of a mode; it is recorded where the profiler runs."""
        self.count += 1
        self.of.forward_ct = self.count
        mode = getattr(self.module.ForwardMode, mode)
        self.of._profile_batch_predicate(
            SimpleNamespace(forward_mode=mode, batch_size=lambda: size)
        )
        if self.of.profile_in_progress:
            self.sizes.append(size)


def rank(wheel: Wheel, sizes: Mapping[str, int], place: Mapping[str, int], **flags: int) -> Rank:
    """A rank of a server. flags: SGLang's environment, without its prefix."""
    name = wheel.first(f"{PARTS}.profiler_manager", f"{MANAGERS}.scheduler_profiler_mixin")
    module = wheel.load(name)
    made = Rank(module)
    where = SimpleNamespace(
        tp_rank=place.get("tp", 0), dp_rank=place.get("dp", 0), pp_rank=place.get("pp", 0),
        moe_ep_rank=place.get("ep", 0), dp_size=sizes.get("dp", 1), pp_size=sizes.get("pp", 1),
        moe_ep_size=sizes.get("ep", 1), num_dp_ranks=sizes.get("dp", 1), gpu_id=0,
    )  # fmt: skip

    def export(path: str) -> None:
        made.files[path.removeprefix(f"{FOLDER}/")] = made.sizes

    class Profile:
        def __init__(self, **_: Any) -> None:
            made.sizes = []
            self.export_chrome_trace = export

        def start(self) -> None:
            return

        stop = start

    torch = Stub("torch")
    torch.profiler.__dict__["profile"] = Profile
    switches = SimpleNamespace(
        SGLANG_PROFILE_V2=_switch(False),
        SGLANG_PROFILE_BY_STAGE_DECODE_MIN_BS=_switch(
            flags.get("PROFILE_BY_STAGE_DECODE_MIN_BS", 0)
        ),
    )
    module.__dict__.update(
        torch=torch, envs=switches, time=Clock(), Path=_Folder, get_parallel=lambda: where,
        get_dp_tp_group=lambda: Stub("group"), _is_npu=False,
    )  # fmt: skip
    if name.endswith("mixin"):
        made.of = type("Scheduler", (module.SchedulerProfilerMixin,), dict(vars(where)))()
        made.of.forward_ct, made.of.tp_cpu_group, made.of.dp_tp_cpu_group = 0, None, None
        made.of.init_profiler()
        return made
    kind = module.SchedulerProfilerManager
    given = {"ps": where, "dp_tp_cpu_group": None, "get_forward_ct": lambda: made.count}
    wanted = {each.name for each in dataclasses.fields(kind) if each.init}
    made.of = kind(**{name: value for name, value in given.items() if name in wanted})
    return made


def _switch(value: Any) -> Any:
    return SimpleNamespace(get=lambda: value)


class _Folder(str):
    """A path that is never made."""

    def expanduser(self) -> _Folder:
        return self

    def exists(self) -> bool:
        return True

    def mkdir(self, **_: Any) -> None:
        return


def windows(wheel: Wheel) -> dict[str, Any]:
    """What windows of this version are like."""
    files = {}
    lines: list[str] = []
    for label, (sizes, place) in PLACES.items():
        tags = " TP1" if label == "tp 2" else ""
        with logged(wheel, tags) as written:
            one = rank(wheel, sizes, place)
            one.request(True)
            one.run("DECODE")
            one.request(False)
        files[label] = next(iter(one.files))
        lines = lines or written
    of_steps = rank(wheel, {}, {})
    of_steps.request(True, num_steps=STEPS)
    for _ in range(STEPS + 3):
        of_steps.run("DECODE")
    idle = rank(wheel, {}, {}).request(False)
    twice = rank(wheel, {}, {})
    twice.request(True)
    return {
        "executed": True,
        "lines": lines,
        "files": files,
        "asked_steps": STEPS,
        "recorded_steps": len(next(iter(of_steps.files.values()))),
        "stop_of_none": _answer(idle),
        "start_of_two": _answer(twice.request(True)),
        "by_stage": _by_stage(wheel),
        "by_stage_decode_min_bs_8": _by_stage(wheel, PROFILE_BY_STAGE_DECODE_MIN_BS=8),
    }


def _by_stage(wheel: Wheel, **flags: int) -> dict[str, list[int]]:
    """Files of a window of two steps a stage, and the sizes of their batches: 4, later 8."""
    one = rank(wheel, {}, {}, **flags)
    one.request(True, num_steps=2, profile_by_stage=True)
    order = ["EXTEND"] + 3 * ["DECODE"] + ["EXTEND"] + 5 * ["DECODE"]
    for number, mode in enumerate(order):
        one.run(mode, 4 if number < 5 else 8)
    return dict(one.files)


def _answer(reply: Any) -> dict[str, Any]:
    return {"success": reply.success, "message": reply.message}
