from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._cli.options import Column, render
from pytest_sglprof._trace.table import KernelTable
from tests.support.kernel_tables import build, slow
from tests.support.passes import TWO, decoding, slower

Sglprof = Callable[..., tuple[int, str]]


@pytest.fixture
def sglprof(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sglprof:
    """Runs `sglprof check` on a table instead of a file: (exit status, output)."""

    def run(table: KernelTable, *words: str) -> tuple[int, str]:
        monkeypatch.setattr("pytest_sglprof._trace.read.read_window", lambda *a, **k: table)
        status = main(["check", "window", *words])
        return status, capsys.readouterr().out

    return run


def check(text: str) -> dict[str, Any]:
    """What the one check of a JSON answer says, and the answer's own verdict."""
    document: dict[str, Any] = json.loads(text)
    (only,) = document["checks"]
    assert (only["verdict"], only["reason"]) == (document["verdict"], document["reason"])
    return {**only, "source": document["source"]}


SLOW = build(scale=slow("TP1", "moe", 1.4))


@pytest.mark.parametrize(
    ("words", "status", "verdict"),
    [
        (["--limit", "1.1"], 1, "fail"),
        (["--limit", "1.3"], 0, "pass"),
        ([], 0, "measured"),
        (["--scope", "moe", "--limit", "1.39"], 1, "fail"),
        (["--scope", "gemm", "--limit", "1.01"], 0, "pass"),
        (["--kernel", "fused", "--limit", "1.3"], 1, "fail"),
        (["--metric", "imbalance_factor", "--limit", "1.09"], 1, "fail"),
        (["--metric", "lost_share", "--limit", "0.2"], 0, "pass"),
        (["--stage", "prefill"], 3, "inconclusive"),
        (["--min-steps", "51"], 3, "inconclusive"),
        (["--scope", "nothing"], 3, "inconclusive"),
    ],
)
def test_the_exit_status_is_the_verdict(
    sglprof: Sglprof, words: list[str], status: int, verdict: str
) -> None:
    found, out = sglprof(SLOW, *words, "--format", "json")
    assert (found, check(out)["verdict"]) == (status, verdict)


def test_json_has_the_figures_of_the_deciding_group(sglprof: Sglprof) -> None:
    status, out = sglprof(SLOW, "--scope", "moe", "--limit", "1.1", "--format", "json")
    found = check(out)
    assert status == 1
    assert found["slowdown"] == pytest.approx(1.4)
    assert found["factor"] == pytest.approx(1.4 / 1.2)
    assert found["lost_ns"] == 50 * 120_000
    assert [(item["rank"], item["total_ns"]) for item in found["ranks"]] == [
        ("TP0", 30_000_000),
        ("TP1", 42_000_000),
    ]
    assert (found["scope"], found["slowest"], found["limit"]) == ("moe", "TP1", 1.1)
    assert found["reason"].startswith("TP1 is 1.40x slower than its peers in moe (limit 1.10)")
    four = ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1")
    _, out = sglprof(build(four, scale=slow("DP1 TP0", "moe", 2.0)), "--format", "json")
    assert check(out)["slowest"] == "DP1 TP0"
    assert [group["group"] for group in check(out)["groups"]] == ["DP0", "DP1"]
    two = build(four, scale=slow("DP1 TP0", "moe", 2.0))
    _, out = sglprof(two, "--metric", "lost_share", "--format", "json")
    assert check(out)["group"] == "DP1"


def test_without_a_limit_none_is_spoken_of(sglprof: Sglprof) -> None:
    status, out = sglprof(SLOW)
    assert status == 0
    assert "limit" not in out
    assert out.splitlines()[0] == (
        "measured: TP1 is 1.22x slower than its peers in compute: 67.0 ms against 55.0 ms "
        "over 50 steps"
    )
    _, document = sglprof(SLOW, "--format", "json")
    assert check(document)["limit"] is None


def test_the_table_shows_ranks_and_what_makes_the_difference(sglprof: Sglprof) -> None:
    _, out = sglprof(SLOW, "--limit", "1.1")
    assert "slowdown 1.22, imbalance factor 1.10, lost share 9.0 %" in out
    assert ", lost 6.00 ms (" in out
    assert "TP1         67.0       100 %" in out
    assert "most of it: fused_moe_kernel, 12.0 ms longer on TP1 than on its peers" in out


def test_work_and_cost_of_a_token_are_told(sglprof: Sglprof) -> None:
    _, out = sglprof(SLOW)
    # 8 requests a step, of which 120 µs are lost.
    lost = "lost 6.00 ms (9.0 %, 0.0 % by noise), 15.0 µs an output token"
    assert f"{lost}; TP1 with the same work" in out
    more = build(scale=lambda rank, category, step: 1.5 if rank == "TP1" else 1.0)
    more.steps.loc[more.steps["rank"] == "TP1", ["tokens", "batch_size"]] = 12
    status, out = sglprof(more, "--limit", "1.1")
    assert status == 1
    assert "with 1.50x the tokens: more work; most of all in moe" in out
    _, out = sglprof(more, "--limit", "1.1", "--format", "json")
    found = check(out)
    assert (found["work"], found["work_ratio"], found["work_by"]) == ("more_work", 1.5, "tokens")
    assert found["other_input_steps"] == 50
    assert found["output_tokens"] == 50 * 12
    assert found["lost_ns_per_token"] == pytest.approx(275_000 / 12)


def test_sums_are_shown_beside_where_kernels_overlap(sglprof: Sglprof) -> None:
    assert "summed ms" not in sglprof(SLOW)[1]
    early = build(scale=slow("TP1", "moe", 1.4))
    gemm = (early.frame["rank"] == "TP1") & (early.frame["category"] == "gemm")
    early.frame.loc[gemm, "start_ns"] -= 100_000
    early.frame.loc[gemm, "dur_ns"] += 100_000
    _, out = sglprof(early)
    assert "rank  summed ms  compute ms  slowest in" in out
    assert "TP1        72.0        67.0       100 %" in out
    _, out = sglprof(early, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["total_ns"], row["busy_ns"]) for row in rows] == [
        ("55000000", "55000000"),
        ("72000000", "67000000"),
    ]


def test_csv_has_a_row_a_rank(sglprof: Sglprof) -> None:
    _, out = sglprof(SLOW, "--limit", "1.1", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["rank"], row["total_ns"], row["verdict"]) for row in rows] == [
        ("TP0", "55000000", "fail"),
        ("TP1", "67000000", "fail"),
    ]


def test_a_metric_of_whole_steps_shows_what_a_step_is_made_of(sglprof: Sglprof) -> None:
    """Of each step of 2 ms 1.3 are work; the last one ends with its own work."""
    words = ("--metric", "idle_share", "--stage", "decode")
    status, text = sglprof(SLOW, *words, "--limit", "0.2")
    assert status == 1
    assert text.startswith("fail: TP0's GPU is idle for 34.54 % of a decode step (limit 20.00 %)")
    lines = text.splitlines()
    at = lines.index("what a mean decode step is made of, ms")
    assert lines[at + 1].split() == [
        *("rank", "steps", "wall", "ms", "compute", "transfer", "copies", "between"),
    ]
    assert lines[at + 3].split() == ["TP0", "50", "1.99", "1.10", "0.150", "0.050", "0.686"]
    assert sglprof(SLOW, *words, "--limit", "0.4")[0] == 0
    status, text = sglprof(SLOW, "--metric", "pass_wall", "--limit", "1.5", "--power", "0.95")
    assert status == 1
    assert "this window finds a pass wall from " in text
    assert sglprof(SLOW, *words)[1].startswith("measured: TP0's GPU is idle for 34.54 % of a dec")


def test_json_and_csv_have_the_budget(sglprof: Sglprof) -> None:
    words = ("--metric", "pass_wall", "--limit", "1.5")
    status, text = sglprof(SLOW, *words, "--format", "json")
    assert status == 1
    found = check(text)
    assert (found["metric"], found["limit"], found["verdict"]) == ("pass_wall", 1.5, "fail")
    (group,) = found["groups"]
    assert [rank["rank"] for rank in group["ranks"]] == ["TP0", "TP1"]
    document = json.loads(text)
    (budget,) = document["budgets"]
    assert (budget["stage"], budget["steps"], document["stragglers"]) == ("decode", 50, None)
    parts = ("compute_ns", "communication_ns", "copies_ns", "idle_ns")
    for rank in budget["ranks"]:
        assert sum(rank[part] for part in parts) == rank["wall_ns"]
    # Any other check has it in its JSON too, and not on the terminal.
    text = sglprof(SLOW, "--format", "json")[1]
    assert json.loads(text)["budgets"] == document["budgets"]
    assert "is made of" not in sglprof(SLOW)[1]
    rows = list(csv.DictReader(io.StringIO(sglprof(SLOW, *words, "--format", "csv")[1])))
    assert [row["rank"] for row in rows] == ["TP0", "TP1"]
    assert int(rows[0]["wall_ns"]) == budget["ranks"][0]["wall_ns"]
    assert (rows[0]["slowdown"], rows[0]["metric"]) == ("", "pass_wall")


@pytest.mark.parametrize("words", [["--scope", "moe"], ["--kernel", "flash"]])
def test_a_metric_of_whole_steps_has_no_scope(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "nowhere", "--metric", "idle_share", *words]) == 2
    assert "idle_share is of whole steps" in capsys.readouterr().err


def test_a_trace_without_steps_needs_consent(sglprof: Sglprof) -> None:
    table = build(with_steps=False, scale=slow("TP1", "moe", 1.4))
    assert sglprof(table, "--limit", "1.1")[0] == 3
    assert sglprof(table, "--limit", "1.1", "--min-steps", "0")[0] == 1


def test_no_rank_at_all_is_inconclusive(sglprof: Sglprof) -> None:
    for form in ("json", "csv", "table"):
        assert sglprof(build(()), "--format", form)[0] == 3


@pytest.mark.parametrize(
    "words",
    [
        ["--limit", "0.5"],
        ["--limit", "nan"],
        ["--limit", "x"],
        ["--min-steps", "-1"],
        ["--metric", "speed"],
        ["--kernel", "("],
        ["--metric", "lost_share", "--limit", "1.5"],
    ],
)
def test_a_wrong_option_is_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "window", *words]) == 2
    assert words[-2] in capsys.readouterr().err


def _cut(path: Path) -> None:
    whole = gzip.compress(json.dumps({"traceEvents": [{"ph": "X"}] * 9999}).encode())
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t-TP-0.trace.json.gz", b""),
        ("t-TP-0.trace.json.gz", _cut),
        ("t-TP-0.trace.json", b'{"hello": 1}'),
        ("t-TP-0.trace.json", b"no json"),
        ("a.sqlite", b"no database"),
        (None, None),
    ],
)
def test_unreadable_input_is_2_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None, content: Any
) -> None:
    path = tmp_path if name is None else tmp_path / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    assert main(["check", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert path.name in captured.err


def test_a_real_report_of_two_gpus_agrees_with_sql(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = shared_data / "nsys" / "mfu_2gpu_after.sqlite"
    words = ["--scope", "all", "--kernel", "flash_fwd", "--format", "json"]
    assert main(["check", str(report), *words]) == 3
    found = check(capsys.readouterr().out)
    with sqlite3.connect(f"file:{report}?mode=ro&immutable=1", uri=True) as database:
        truth = database.execute(
            "select deviceId, sum(end - start) from CUPTI_ACTIVITY_KIND_KERNEL kernel "
            "join StringIds on id = demangledName where value like '%flash_fwd%' "
            "group by deviceId order by deviceId"
        ).fetchall()
    database.close()
    assert [item["total_ns"] for item in found["ranks"]] == [total for _, total in truth]
    assert main(["check", str(report), *words, "--min-steps", "0"]) == 0


def test_one_real_gpu_has_nobody_to_be_compared_with(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = next((shared_data / "torch" / "sglang-mi300x").glob("*_decode*"))
    assert main(["check", str(trace), "--limit", "1.1", "--format", "json"]) == 3
    found = check(capsys.readouterr().out)
    assert found["reason"] == (
        "TP0 is the only rank with this input, so it has no peer to compare with"
    )


def test_a_real_server_of_two_ranks_is_compared_step_by_step(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared_data / "torch" / "sglang-cpu-tp2-nostack"
    assert main(["check", str(folder), "--format", "json", "--min-steps", "10"]) == 0
    found = check(capsys.readouterr().out)
    spans = {}
    for path in folder.glob("*-TP-*.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        rank = "".join(re.findall(r"(TP)-(\d+)", path.name)[0])
        named = [event for event in events if str(event.get("name", "")).startswith("step[")]
        spans[rank] = sum(event.get("cat") == "user_annotation" for event in named)
    assert set(spans) == {"TP0", "TP1"} == {item["rank"] for item in found["ranks"]}
    assert found["steps"] + found["dropped_steps"] == min(spans.values())
    assert found["source"] == "cpu_op"


def test_columns_hold_text_to_the_left_and_figures_to_the_right() -> None:
    records = [{"name": "a", "ns": 5, "more": None}, {"name": "bcd", "ns": 1234, "more": 1}]
    columns = [Column("name", left=True), Column("ns", "time", lambda ns: f"{ns:,}")]
    assert render(records, columns, "table") == (
        "name   time\n----  -----\na         5\nbcd   1,234\n"
    )
    assert render(records, columns, "csv") == "name,ns\na,5\nbcd,1234\n"
    assert json.loads(render(records, columns, "json")) == records
    assert render([], columns, "table") == "name  time\n----  ----\n"


# Who is compared.


def test_across_says_who_is_compared_and_the_table_says_it_as_well(sglprof: Sglprof) -> None:
    table = decoding(scale=slower("DP1 TP3", 1.2))
    status, out = sglprof(table, "--across", "sync", "--limit", "1.05")
    assert status == 1
    assert out.startswith(
        "fail: DP1 TP3 is 1.20x slower than the other ranks in gemm, norm and quantization of "
        "equal shapes (limit 1.05): "
    )
    assert "\nacross sync: slowdown 1.20, " in out
    assert "longer on DP1 TP3 than on the others" in out
    status, peers = sglprof(table, "--across", "peers", "--limit", "1.05")
    assert status == 1
    assert peers == sglprof(table, "--limit", "1.05")[1]  # the default, where ranks have a peer
    assert "\nDP1: slowdown 1.20, " in peers
    _, out = sglprof(table, "--across", "sync", "--format", "csv")
    assert [row["across"] for row in csv.DictReader(io.StringIO(out))] == ["sync"] * 4
    _, out = sglprof(table, "--across", "sync", "--format", "json")
    assert check(out)["across"] == "sync"


def test_across_is_the_default_without_peers_and_no_figure_of_it_is_shown_with_them(
    sglprof: Sglprof,
) -> None:
    assert "\nacross sync: slowdown 1.20, " in sglprof(decoding(TWO, scale=slower(TWO[1], 1.2)))[1]
    tensor = sglprof(SLOW)[1]
    assert "sync" not in tensor
    assert "\nslowdown 1.22, imbalance factor 1.10, lost share 9.0 %, spike share 0.0 %, lost" in (
        tensor
    )
    status, out = sglprof(decoding(TWO), "--metric", "sync_lost_share", "--limit", "0.9")
    assert (status, out[:5]) == (0, "pass:")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--across", "synch"], "did you mean sync?"),
        (["--across", "peers", "--metric", "sync_lost_share"], "across sync, or no across"),
        (["--scope", "moe", "--metric", "sync_lost_share"], "sync_lost_share is of whole steps"),
        (["--across", "sync", "--metric", "pass_wall"], "pass_wall is of each rank alone"),
        (["--across", "sync", "--metric", "lateness"], "leave --across out"),
    ],
)
def test_across_is_refused_where_it_has_no_meaning(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["check", "window", *words]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert "expected: " in text


@pytest.mark.parametrize("words", [[], ["--across", "sync"], ["--across", "peers"]])
def test_real_replicas_never_meet_and_one_had_nothing_to_do(
    shared_data: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    folder = shared_data / "torch" / "sglang-cpu-tp2dp2"
    assert main(["check", str(folder), "--limit", "1.1", *words]) == 3
    out = capsys.readouterr().out
    assert out.startswith(
        "inconclusive: DP0: replicas that never meet: DP0, DP1; DP0 had no pass; DP1: "
    )
