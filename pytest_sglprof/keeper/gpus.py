"""Which GPUs this machine shows, and which processes NVML sees on them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pytest_sglprof.errors import SettingsError
from pytest_sglprof.server.nvml import Nvml

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the devices that a process would see: indices, or what the variable lists."""
    listed = environment.get(VISIBLE)
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    nodes = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return [str(number) for number in sorted(int(node[1]) for node in nodes if node)]


def choose_gpus(wanted: Literal["all"] | Sequence[int], visible: Sequence[str]) -> list[str]:
    """The devices of a server; `wanted` are indices into the visible ones."""
    if wanted == "all":
        return list(visible)
    beyond = [index for index in wanted if int(index) >= len(visible)]
    if beyond:
        raise SettingsError(
            f"gpus: device {beyond[0]} does not exist",
            expected=f"indices below {len(visible)}, the number of visible GPUs",
            hint=f"check nvidia-smi and ${VISIBLE}",
        )
    return [visible[int(index)] for index in wanted]


def processes_on_gpus(pids: Iterable[int]) -> list[int]:
    """Those of `pids` that NVML lists as having a context; [] where there is no NVML."""
    try:
        nvml = Nvml()
    except (ImportError, OSError):
        return []
    try:
        listed = {pid for uuid in nvml.uuids() for pid in nvml.pids(uuid)}
    except OSError:
        return []
    finally:
        nvml.close()
    return sorted(listed & set(pids))


def log_gpus() -> str:
    """One line for the keeper's log."""
    return f"visible GPUs: {', '.join(visible_gpus(os.environ)) or 'none'}"
