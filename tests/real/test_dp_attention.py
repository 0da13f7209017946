"""DP attention on a real SGLang: ranks of one group with loads that the test draws.

`drawn` is also for tests of what the analysis says of such a window: it has the kernel table and
the load that was sent.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_sglprof._analysis.load_split import CategorySplit
from pytest_sglprof._analysis.passes import sync_passes
from pytest_sglprof._analysis.sync import RankSplit, SyncFinding, sync_finding
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._server.series import SYNC_WAIT, read_totals
from pytest_sglprof._server.sizes import PassSettings
from pytest_sglprof._verdict.judge import judge
from tests.support.dp_attention import (
    EXPERTS,
    METRICS,
    WAITS,
    Load,
    Recorded,
    Request,
    record,
)
from tests.support.real_env import real_sglang
from tests.support.real_project import left_over

pytestmark = pytest.mark.real_server

PASSES, MANY = 60, 400
LAST = 800  # tokens of each answer: no request ends in the window
TOPK, LAYERS = 2, 2  # of the tiny model
UNTOLD = ("otherwise than within them", "beyond that of its peers")  # reasons to say nothing
ENDING = ("ending", "ending-2", "ending-3")  # windows with loads drawn alike


def draw(rng: random.Random) -> list[Request]:
    """One rank gets 4 to 7 requests with long prompts, the other 1 or 2 with short ones."""
    busy = rng.randrange(2)
    counts = {busy: rng.randint(4, 7), 1 - busy: rng.randint(1, 2)}
    prompts = {busy: (60, 120), 1 - busy: (10, 30)}
    load = [
        Request(rank, rng.randint(*prompts[rank]), LAST)
        for rank, count in counts.items()
        for _ in range(count)
    ]
    rng.shuffle(load)
    return load


def draw_ending(rng: random.Random) -> list[Request]:
    """All requests of one rank go on for longer, those of both end one after the other.

    So both ranks have few and many requests, and over the passes of both, one has 1.1 to 2.3
    times the KV of the other, whatever is drawn.
    """
    busy = rng.randrange(2)
    outputs = {busy: (320, 520), 1 - busy: (160, 320)}
    prompts = {busy: (80, 120), 1 - busy: (60, 100)}
    return [
        Request(rank, rng.randint(*prompts[rank]), rng.randint(*outputs[rank]))
        for rank in (0, 1)
        for _ in range(7)
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Recorded]]:
    """Windows of a server whose ranks have the loads that were drawn."""
    sglang = real_sglang()
    seed = int(os.environ.get("SGLPROF_SEED") or random.randrange(2**32))
    rng = random.Random(seed)
    loads = {
        "steady": Load(tuple(draw(rng)), PASSES),
        **{name: Load(tuple(draw_ending(rng)), MANY) for name in ENDING},
    }
    print(f"SGLPROF_SEED={seed}: {loads}")
    folder = tmp_path_factory.mktemp("dp_attention")
    yield record(folder, sglang, loads, args=(*EXPERTS, *METRICS), env=WAITS)
    assert left_over(folder) == []


@pytest.fixture
def drawn(recorded: dict[str, Recorded]) -> Recorded:
    """A window in which one rank has clearly more than the other, all the time."""
    return recorded["steady"]


def label(recorded: Recorded, dp_rank: int) -> str:
    (found,) = (rank for rank in recorded.table.ranks if f"DP{dp_rank} " in rank)
    return found


def test_the_steps_show_which_rank_has_more(drawn: Recorded) -> None:
    steps = drawn.table.steps
    decodes = steps[steps["substage"] == "DECODE"]
    by_rank = decodes.groupby(decodes["rank"].astype(str))
    busy = max((0, 1), key=drawn.requests)
    batches, kv = by_rank["batch_size"].median(), by_rank["kv_tokens"].median()
    for dp_rank in (0, 1):
        assert batches[label(drawn, dp_rank)] == drawn.requests(dp_rank)
    print("Σ KV of a decode pass:", kv.to_dict())
    assert kv.idxmax() == label(drawn, busy)
    for dp_rank in (0, 1):  # each request has its prompt there, and one token more in each pass
        prompts = sum(request.prompt for request in drawn.load if request.dp_rank == dp_rank)
        rows = decodes[decodes["rank"] == label(drawn, dp_rank)].sort_values("forward_id")
        assert rows["kv_tokens"].min() > prompts
        assert set(rows["kv_tokens"].diff().dropna()) == {drawn.requests(dp_rank)}


def finding_of(recorded: Recorded) -> SyncFinding:
    (group,) = sync_passes(recorded.table)
    finding = sync_finding(group)
    print(finding.sentence, finding.kinds)
    return finding


def attention_of(rank: RankSplit) -> CategorySplit:
    (attention,) = (
        each
        for each in rank.categories
        if (each.category, each.kind) == ("attention", "eager decode")
    )
    return attention


@pytest.mark.parametrize("name", ["steady", *ENDING])
def test_the_driver_is_larger_on_the_rank_that_was_sent_more(
    recorded: dict[str, Recorded], name: str
) -> None:
    """Which passes of a rank are longer is not asked: two ranks on two cores slow each other."""
    window = recorded[name]
    finding = finding_of(window)
    sent = {
        label(window, dp_rank): sum(
            request.output for request in window.load if request.dp_rank == dp_rank
        )
        for dp_rank in (0, 1)
    }
    busy = max(sent, key=lambda rank: sent[rank])
    assert finding.kinds["eager decode"] >= 0.8 * sum(finding.kinds.values())
    for rank in finding.ranks:
        attention = attention_of(rank)
        assert attention.ratio is not None
        assert (attention.ratio > 1) == (rank.rank == busy)
        print(rank.rank, attention)


def test_the_load_of_the_busy_rank_is_a_part_of_its_time(recorded: dict[str, Recorded]) -> None:
    """Two ranks on two cores slow each other, so in some windows they follow no common law.

    In others, one rank has far more than the other. Nothing is said of the load then, for one of
    these reasons and no other.
    """
    parts = []
    for name in ENDING:
        for rank in finding_of(recorded[name]).ranks:
            attention = attention_of(rank)
            print(name, rank.rank, attention)
            if attention.load is None:
                assert any(reason in attention.reason for reason in UNTOLD)
            elif attention.ratio is not None and attention.ratio > 1:
                parts.append(attention.load.ns)
    assert parts
    assert min(parts) > 0


def test_load_is_no_slow_gpu(recorded: dict[str, Recorded]) -> None:
    """No rank is called slow for certain at a limit that noise of a CPU does not reach."""
    verdict = judge(recorded["ending"].table, [Threshold(limit=2.0)])
    print(verdict.reason)
    assert verdict.word != "fail"


def test_both_ranks_run_the_same_passes(drawn: Recorded) -> None:
    steps = drawn.table.steps
    ids = {rank: set(rows["forward_id"]) for rank, rows in steps.groupby("rank", observed=True)}
    first, second = ids.values()
    assert len(first & second) >= PASSES - 2
    assert min(first) >= 0


def test_the_settings_are_those_of_the_server(drawn: Recorded) -> None:
    assert drawn.table.settings == PassSettings(
        regime="gather", graphs=False, custom_all_reduce=False, dp_attention=True
    )
    assert (drawn.folder / "server_info.json").is_file()


def test_experts_get_the_tokens_of_both_ranks(drawn: Recorded) -> None:
    """Gathered decode batches are padded to the larger one, and experts compute the padding."""
    experts, steps = drawn.table.experts, drawn.table.steps
    counted = experts.groupby(["step", "layer"])["tokens"].sum().unstack()
    assert len(counted) >= PASSES - 2
    assert list(counted.columns) == list(range(LAYERS))
    own = steps.pivot_table(index="step", columns="rank", values="tokens", observed=True).dropna()
    both = counted.index.intersection(own.index)
    real, padded = TOPK * own.sum(axis=1)[both], TOPK * 2 * own.max(axis=1)[both]
    for layer in range(LAYERS):
        assert ((counted[layer][both] == real) | (counted[layer][both] == padded)).all()
    owners = experts.groupby("expert")["rank"].unique()
    assert [sorted(map(str, ranks)) for ranks in owners] == [
        [label(drawn, rank)] for rank in (0, 0, 1, 1)
    ]


def test_the_window_says_what_the_recorder_cost(drawn: Recorded) -> None:
    (note,) = drawn.outcome.windows()[drawn.name]["notes"]
    print(note)
    assert note.startswith("experts: ")
    assert "passes recorded" in note


def test_schedulers_say_how_long_they_wait(drawn: Recorded) -> None:
    """In the names and labels of a real server: of each DP rank, for every pass that it traced."""
    totals = read_totals(drawn.metrics)
    waits = {dp: total for (name, dp), total in totals.items() if name == SYNC_WAIT}
    print(waits)
    assert set(waits) == {0, 1}
    for total in waits.values():
        assert total.count >= PASSES
        assert 0 < total.sum < 0.1 * total.short + 30 * (total.count - total.short)
        assert 0 < total.short <= total.count


def test_no_dump_is_left(drawn: Recorded) -> None:
    assert list(Path(drawn.outcome.folder).rglob("expert_distribution_recorder_*.pt")) == []
