"""The part of nvidia-ml-py that is used, over GPUs that do not exist.

Each call that would change a GPU is a line of $FAKE_NVML_CALLS: the pid and what was asked.
$FAKE_NVML_WRONG names what fails: "init", "lock GPU-b", "reset GPU-a".
"""

from __future__ import annotations

import os
from pathlib import Path

GPUS = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")


class NVMLError(Exception):
    """As nvidia-ml-py's, with the library's words."""


def nvmlInit() -> None:
    _try("init", "Driver Not Loaded")


def nvmlShutdown() -> None:
    pass


def nvmlDeviceGetCount() -> int:
    return len(GPUS)


def nvmlDeviceGetHandleByIndex(index: int) -> str:
    return GPUS[index]


def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
    return uuid


def nvmlDeviceGetUUID(device: str) -> str:
    return device


def nvmlDeviceGetComputeRunningProcesses(device: str) -> list[object]:
    return []


def nvmlDeviceSetGpuLockedClocks(device: str, least: int, most: int) -> None:
    assert least == most
    _try(f"lock {device}", "Insufficient Permissions")
    _write(f"lock {device} {most}")


def nvmlDeviceResetGpuLockedClocks(device: str) -> None:
    _write(f"reset {device}")
    _try(f"reset {device}", "GPU is lost")


def _try(what: str, words: str) -> None:
    if os.environ.get("FAKE_NVML_WRONG") == what:
        raise NVMLError(words)


def _write(call: str) -> None:
    with Path(os.environ["FAKE_NVML_CALLS"]).open("a", encoding="utf-8") as calls:
        calls.write(f"{os.getpid()} {call}\n")
