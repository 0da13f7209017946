"""What a starting server's log says that it is doing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_sglprof._server.log import ServerLog


@pytest.mark.parametrize(
    ("lines", "phase"),
    [
        ([], ""),
        (["server_args=ServerArgs(model_path='m')", "[2026-01-01] Init torch begin."], ""),
        (["[2026-01-01 TP0] Load weight begin. avail mem=78.5 GB"], "loading weights"),
        (
            [
                "[TP0] Load weight begin. avail mem=78.5 GB",
                "Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:01]\r"
                "Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:02]",
                "some library says something else",
            ],
            "loading weights 50 %",
        ),
        (["[TP0] Capture cuda graph begin. This can take minutes."], "capturing graphs"),
        (
            ["Load weight begin.", "Capturing batches (bs=8 avail_mem=4.2 GB):  80%|###| 4/5"],
            "capturing graphs 80 %",
        ),
        (["The server is fired up and ready to roll!"], "answering its first request"),
    ],
)
def test_the_newest_phase_counts(tmp_path: Path, lines: list[str], phase: str) -> None:
    log = tmp_path / "server.log"
    log.write_text("".join(f"{line}\n" for line in lines))
    assert ServerLog(log).phase() == phase


def test_phases_of_a_real_start(shared_data: Path) -> None:
    logs = [ServerLog(path) for path in sorted(shared_data.glob("logs/**/*.log"))]
    assert {log.phase() for log in logs} & {"answering its first request", "loading weights"}
