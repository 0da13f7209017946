"""What older servers say (tests/data/versions, made by ci.old_versions) is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.log_lines import EntryReader, read_batch

VERSIONS = ["0.4.4", "0.5.3", "0.5.9", "0.5.14", "0.5.20", "0.5.23"]


def record(version: str) -> dict[str, Any]:
    path = Path(__file__).parents[2] / "data" / "versions" / f"{version}.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept


@pytest.mark.parametrize("version", VERSIONS)
def test_every_batch_line_is_read(version: str) -> None:
    kept = record(version)
    values = kept["values"]
    lines = kept["batches"]["lines"]
    assert {each["role"] for each in lines} >= {"null"}
    for each in lines:
        (entry,) = EntryReader().read([each["line"]])
        batch = read_batch(entry)
        assert entry.kind == ("decode" if "Decode" in each["line"] else "prefill")
        assert entry.rank == (Rank.parse(each["tags"]) if each["tags"] else None)
        assert batch.token_usage == values["token_usage"]
        queues = {"prefill": ("bootstrap",), "decode": ("prealloc", "transfer", "retracted")}
        extra = sum(values[name] for name in queues.get(each["role"], ()))
        if entry.kind == "decode":
            assert (batch.running, batch.tokens) == (values["running"], values["tokens"])
            assert batch.waiting == values["waiting"] + extra
            assert batch.throughput == values["generated"] / 2
        else:
            assert batch.running == values["running"] + values["new_seq"]
            assert batch.waiting >= values["waiting"] + (extra if each["role"] == "prefill" else 0)
            assert batch.throughput is None
        named = f"[{values['step']}]" in each["line"] or f"[{values['step'] + 1}]" in each["line"]
        assert (batch.iteration is not None) == named


@pytest.mark.parametrize("version", VERSIONS)
def test_the_head_of_a_rank_with_all_sizes_is_read(version: str) -> None:
    kept = record(version)["rank"]
    line = f"[2025-11-29 07:06:40 {kept['tags']}] Decode batch, #running-req: 1, #queue-req: 0"
    (entry,) = EntryReader().read([line])
    assert entry.rank == Rank.parse(kept["tags"]) == Rank.from_process_title(kept["title"])
    assert entry.rank is not None


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_the_lines_and_files_of_a_window_are_read(version: str) -> None:
    windows = record(version)["windows"]
    entries = list(EntryReader().read(windows["lines"]))
    assert [entry.kind for entry in entries] == ["profile_start", "profile_end"]
    assert entries[0].profile_id == "window-1"
    ranks = {label: Rank.from_file_name(name) for label, name in windows["files"].items()}
    assert ranks["tp 2"] == Rank(tp=1)
    assert ranks["tp 2, dp 2"] == (Rank(tp=1) if version == "0.5.3" else Rank(tp=1, dp=1))
