"""Servers made by code: one for each tensor-parallel size."""

from pytest_sglprof import ServerSpec

MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def pytest_sglprof_servers(config):
    return {
        f"tp{size}": ServerSpec(name=f"tp{size}", model_path=MODEL, args=("--tp", str(size)))
        for size in (2, 4, 8)
    }
