"""What older servers say (tests/data/versions, made by ci.old_versions) is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ci.versions_table import PAGE, page, read
from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.log_lines import EntryReader, read_batch
from pytest_sglprof.standin.answers import ROUTES
from pytest_sglprof.standin.model import places
from pytest_sglprof.standin.options import parse
from pytest_sglprof.standin.speech import SPEECHES

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
            held = values["new_seq"] + (values["inflight"] if each["role"] == "prefill" else 0)
            assert (batch.held, batch.running) == (held, values["running"] + held)
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


@pytest.mark.parametrize("version", SPEECHES)
def test_the_stand_in_writes_the_lines_of_the_version(version: str) -> None:
    kept, speech = record(version), SPEECHES[version]
    values = kept["values"]
    lines = [each for each in kept["batches"]["lines"] if each["role"] == "null"]
    assert any(each["iterations"] for each in lines) == speech.logs_steps
    for each in lines:
        decode = "Decode" in each["line"]
        number = values["step"] + (1 if "[322]" in each["line"] else 0)
        text = (speech.decode if decode else speech.prefill).format(
            **values,
            iteration=f" [{number}]" if each["iterations"] else "",
            device=each["device"],
            throughput=(values["generated"] if decode else values["new_token"]) / 2,
        )
        head = f" {each['tags']}" if each["tags"] else ""
        assert each["line"] == f"[2025-11-29 07:06:40{head}] {text}"


@pytest.mark.parametrize("version", SPEECHES)
def test_the_table_agrees_with_the_wheels(version: str) -> None:
    kept, speech = record(version), SPEECHES[version]
    http, windows = kept["http"], kept["windows"]
    absent = {path for path, methods in http["routes"].items() if methods is None}
    assert absent - {"/end_profile"} == {path for path in ROUTES if not speech.has(path)}
    assert sorted(http["profile"]["fields"]) == sorted(speech.body)
    assert (http["profile"]["sent"]["profile_id"] == "chosen") == ("profile_id" in speech.body)
    assert any("admin" in row for row in http["auth"]) == speech.admin_key
    assert (http["auth"]["api key, none sent"]["/ready"] == 200) == speech.has("/ready")
    assert set(http["server_info"]["absent"]) - {"server_args"} >= speech.no_info
    fields = list(http["get_load"][0]) if http["get_load"] else []
    assert sorted(fields) == sorted(speech.get_load)
    assert windows["recorded_steps"] == windows["asked_steps"] - (not speech.extra_pass)
    waits = 4 not in windows["by_stage_decode_min_bs_8"]["window-1-TP-0-DECODE.trace.json.gz"]
    assert waits == speech.decode_min_bs
    spans = kept["spans"]
    assert (spans["plain"] is not None) == speech.spans
    assert (spans["detailed"] is not None) == ("detailed_annotations" in speech.body)
    assert ("forward_id" in str(spans["detailed"])) == speech.forward_ids
    tags = [tag for tag in kept["rank"]["tags"].split() if tag[:-1] in speech.tags]
    assert [tag[:-1] for tag in tags] == list(speech.tags)


@pytest.mark.parametrize("version", SPEECHES)
def test_files_are_named_as_by_the_version(version: str) -> None:
    for sizes, name in record(version)["windows"]["files"].items():
        words = [f"--{word}" if word.isalpha() else word for word in sizes.replace(",", "").split()]
        if "tp" in sizes and "dp" in sizes:
            words.append("--enable-dp-attention")
        last = places(parse(["--speak", version, *words]).sizes)[-1]
        assert f"window-1-{last.file_part}.trace.json.gz" == name


def test_the_page_of_versions_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read()), "python -m ci.versions_table --write"
