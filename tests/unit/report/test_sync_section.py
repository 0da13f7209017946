"""Ranks with different input in the document of a window, on its page and in the terminal."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pytest_sglprof._analysis.sync import SyncFinding
from pytest_sglprof._report.model import RecordedWindow
from pytest_sglprof._report.page.page import page
from pytest_sglprof._report.page.sync import sync_pictures
from pytest_sglprof._report.terminal import rank_table
from tests.support.dp_windows import planted, read_back
from tests.support.kernel_tables import build
from tests.support.windows import SLOW, as_run, as_window, run, window


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return window(read_back(planted("e", 4), tmp_path_factory.mktemp("dp")))


def finding_of(document: dict[str, Any]) -> SyncFinding:
    (finding,) = as_window(document).syncs or ()
    return finding


def test_under_plain_tensor_parallel_nothing_is_new() -> None:
    plain = window(SLOW)
    assert plain["syncs"] == []
    text = page([as_run(run([plain]))])
    assert '<section class="sync"' not in text
    assert "<h3>Ranks with different input" not in text
    assert "Ranks with different input</h3>" not in text
    assert all("waits" not in line for line in rank_table(as_window(plain)))


@pytest.mark.parametrize(
    "ranks",
    [("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"), ("PP0 TP0", "PP1 TP0"), ("left", "right")],
)
def test_replicas_stages_and_unnamed_ranks_have_none(ranks: tuple[str, ...]) -> None:
    assert window(build(ranks))["syncs"] == []


def test_a_document_without_it_can_be_read(document: dict[str, Any]) -> None:
    older = {key: value for key, value in document.items() if key != "syncs"}
    assert msgspec.convert(older, RecordedWindow).syncs is None
    assert finding_of(document).latest == "DP1 TP1 EP1"


def test_page_and_terminal_say_the_sentence(document: dict[str, Any]) -> None:
    sentence = document["syncs"][0]["sentence"]
    assert "most of it for DP1" in sentence
    assert sentence in rank_table(as_window(document))
    text = page([as_run(run([document]))])
    assert text.count('<section class="sync"') == 1
    assert sentence.split(";")[0] in text


def test_parts_stand_beside_each_other_on_one_scale(document: dict[str, Any]) -> None:
    finding = finding_of(document)
    (picture,) = sync_pictures([finding]) or []
    by_rank = {rank.rank: rank for rank in finding.ranks}
    for row in picture.rows:
        rank = by_rank[row.rank]
        widths = {part.part: part.width for part in row.segments}
        sizes = {
            "load": rank.load.ns, "speed": rank.speed.ns, "rest": rank.rest.ns,
            "not-known": rank.unknown_ns,
        }  # fmt: skip
        top = by_rank[picture.rows[0].rank].load.ns
        scale = next(s.width for s in picture.rows[0].segments if s.part == "load") / top
        assert widths == pytest.approx({name: abs(ns) * scale for name, ns in sizes.items()})
        for name, ns in sizes.items():
            (part,) = [each for each in row.segments if each.part == name]
            assert (part.left >= picture.zero - 1e-6) == (ns > 0)
    edges = [
        edge for row in picture.rows for s in row.segments for edge in (s.left, s.left + s.width)
    ]
    assert min(edges) == pytest.approx(0)
    assert max(edges) == pytest.approx(100)


def test_a_reason_is_shown_instead_of_bars(document: dict[str, Any]) -> None:
    finding = finding_of(document)
    empty = msgspec.structs.replace(
        finding, reason="passes cannot be aligned", ranks=(), cost=None, sentence=""
    )
    document = {**document, "syncs": [msgspec.to_builtins(empty)]}
    text = page([as_run(run([document]))])
    assert "Not compared: passes cannot be aligned." in text
    assert '<table class="ranks">' not in text


def test_the_servers_measure_of_the_waits_before_a_pass_is_shown(document: dict[str, Any]) -> None:
    heads = [
        {"rank": each, "idle_ns": 12e3, "wall_ns": 4e6, "passes": 99, "waited_ns": 15e3,
         "waited_passes": 130, "long_waits": 0}
        for each in document["ranks"]
    ]  # fmt: skip
    sync = {**document["syncs"][0], "heads": heads}
    text = page([as_run(run([{**document, "syncs": [sync]}]))])
    assert "Before a pass, µs: DP0 idles 12, its scheduler waits 15; DP1 idles 12" in text
    assert "(means of 99 traced passes, and of 130 by SGLang&#39;s own measure)." in text
    assert "Before a pass" not in page([as_run(run([document]))])


def test_a_cost_that_is_not_known_is_said(document: dict[str, Any]) -> None:
    finding = msgspec.structs.replace(finding_of(document), cost=None)
    (picture,) = sync_pictures([finding]) or []
    assert picture.cost is None
    text = page([as_run(run([{**document, "syncs": [msgspec.to_builtins(finding)]}]))])
    assert "What is lost is not known: no times of GPUs" in text
    assert 'class="stack wall"' not in text
