"""Torch windows of servers that choose ids, leave ranks out of names, or answer by a gateway."""

from __future__ import annotations

import gzip
import json
import threading
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import pytest

from pytest_sglprof._capture import torch
from pytest_sglprof._capture.torch import read_progress
from pytest_sglprof._capture.torch_files import TraceFiles, full_name
from pytest_sglprof._ranks import Rank
from pytest_sglprof._redact import learn
from pytest_sglprof._server.sizes import ServerSizes
from tests.support.fake_server import TRACE

ATTENTION = ServerSizes(tp=4, attn_dp=2, dp_attention=True)
STARTS = "Profiling starts. Traces will be saved to: {}"


def own_ids(http):
    """As before 0.5.20: the client's profile id is ignored."""
    http.sizes = replace(http.sizes, version="0.5.3")

    def choose(body):
        body["profile_id"] = "1795982641.55"

    http.on_start = choose


def test_a_window_is_ours_by_its_folder(http, server, new_window):
    own_ids(http)
    server.sizes = http.sizes
    window = new_window(num_steps=5)
    window.open()
    window.wait()
    capture = window.close()
    assert (capture.state, capture.reason) == ("complete", "")
    assert len(capture.artifacts) == 2


def test_in_a_folder_of_the_user_new_files_are_ours(http, server, new_window, tmp_path: Path):
    own_ids(http)
    server.sizes = http.sizes
    folder = tmp_path / "theirs"
    folder.mkdir()
    before = folder / "1795.1-TP-0.trace.json.gz"
    before.write_bytes(gzip.compress(b"{}"))
    window = new_window(num_steps=5, output_dir=str(folder), profile_id="chosen")
    window.open()
    window.wait()
    capture = window.close()
    assert (capture.state, capture.reason) == ("complete", "")
    assert all("1795982641.55" in artifact.path.name for artifact in capture.artifacts)
    assert "the server chose a profile id itself, not 'chosen'" in capture.notes
    assert before.exists()


@pytest.mark.parametrize(
    ("line", "strangers"),
    [
        (STARTS.format("/w/a (with profile id: 17.5)"), ()),
        (STARTS.format("/w/a/ (with profile id: 17.5)"), ()),
        (STARTS.format("/w/a"), ()),
        ("Profiling starts.", ()),
        (STARTS.format("/w/b (with profile id: ours)"), ()),
        (STARTS.format("/w/b (with profile id: 17.5)"), ("17.5",)),
        (STARTS.format("/w/b"), ("/w/b",)),
        ("Profiling starts (with profile id: 17.5)", ("17.5",)),
    ],
)
def test_a_start_is_ours_by_id_or_folder(http, server, line, strangers):
    http.entry("TP0", line)
    reader = torch.ProgressReader(server.log, 0, "ours")
    reader.folder = "/w/a"
    progress = reader.read()
    assert progress.strangers == strangers
    assert progress.pending() == ([] if strangers else [(0, 0, 0)])


def test_a_secret_in_the_path_of_the_folder_does_not_hide_whose_it_is(http, server):
    learn(["a-key-that-is-a-folder"])
    http.entry("TP0", STARTS.format("/w/a-key-that-is-a-folder (with profile id: 17.5)"))
    reader = torch.ProgressReader(server.log, 0, "ours")
    reader.folder = "/w/a-key-that-is-a-folder"
    assert reader.read().strangers == ()


def test_a_folder_that_is_not_ours_alone_names_nobody(http, server):
    http.entry("TP0", STARTS.format("/w/a (with profile id: 17.5)"))
    assert read_progress(server.log, 0, "ours").strangers == ("17.5",)


def files(folder: Path, sizes: ServerSizes, *names: str) -> list[str]:
    for name in names:
        (folder / f"1795.5-{name}.trace.json.gz").write_bytes(
            gzip.compress(json.dumps(TRACE).encode())
        )
    return [rank.label for rank in TraceFiles(folder, sizes.ranks()).rank_files().values()]


def test_names_without_dp_are_those_of_the_only_rank_that_fits(tmp_path: Path):
    labels = files(tmp_path, ATTENTION, "TP-0", "TP-1", "TP-2", "TP-3")
    assert labels == ["DP0 TP0", "DP0 TP1", "DP1 TP2", "DP1 TP3"]


def test_names_that_fit_several_ranks_are_those_of_the_first(tmp_path: Path):
    watched = TraceFiles(tmp_path, ServerSizes(tp=2, dp=2).ranks())
    assert files(tmp_path, ServerSizes(tp=2, dp=2), "TP-0", "TP-1") == ["DP0 TP0", "DP0 TP1"]
    missing = watched.missing(watched.whole(settled=True))
    assert [rank.label for rank in missing] == ["DP1 TP0", "DP1 TP1"]


@pytest.mark.parametrize(
    ("name", "rank", "full"),
    [
        ("1-TP-2", Rank(tp=2, dp=1), "1-TP-2-DP-1"),
        ("p-TP-9-1-TP-2", Rank(tp=2, dp=1, pp=0, ep=3), "p-TP-9-1-TP-2-DP-1-PP-0-EP-3"),
        ("1-TP-2-DP-1", Rank(tp=2, dp=1, ep=2), "1-TP-2-DP-1-EP-2"),
        ("1-TP-2-DP-1-EP-2", Rank(tp=2, dp=1, ep=2), "1-TP-2-DP-1-EP-2"),
        ("1-TP-2", Rank(tp=2), "1-TP-2"),
    ],
)
def test_the_full_name_of_a_file_says_its_rank(name, rank, full):
    for end in (".trace.json.gz", "-DECODE.trace.json.gz"):
        assert full_name(name + end, rank) == full + end
        assert Rank.from_file_name(full + end) == rank


def test_a_gateways_time_out_is_a_note_where_the_files_came(http, server, new_window, monkeypatch):
    stop = http.stop

    def too_long():
        stop()
        return 504

    http.stop = too_long
    window = new_window(duration=0.05)
    window.open()
    window.wait()
    capture = window.close()
    assert (capture.state, capture.reason) == ("complete", "")
    assert "answered 504" in capture.notes[0]


@pytest.mark.parametrize("status", [502, 503])
def test_a_stop_that_never_came_through_is_sent_again(
    http, server, new_window, monkeypatch, status
):
    monkeypatch.setattr(torch, "ASK_AGAIN", 0.1)
    stop, answers = http.stop, iter([status])
    http.stop = lambda: next(answers, None) or stop()
    window = new_window(duration=0.05)
    window.open()
    window.wait()
    assert window.close().state == "complete"


def test_a_gateway_that_never_lets_it_through_leaves_the_window_open(
    http, server, new_window, monkeypatch
):
    monkeypatch.setattr(torch, "ASK_AGAIN", 0.1)
    answers = repeat(504)
    http.stop = lambda: next(answers)
    window = new_window(duration=0.05, timeout=0.5)
    window.open()
    window.wait()
    capture = window.close()
    assert capture.is_still_open
    assert "504" in capture.reason


def test_a_rank_that_has_not_ended_in_the_log_is_waited_for(http, server, new_window):
    http.delay_write = 1.0  # far longer than the quiet that ends other waits
    finish = http.finish

    def in_background():
        threading.Thread(target=finish).start()

    http.finish = in_background
    window = new_window(duration=0.05)
    window.open()
    window.wait()
    capture = window.close()
    assert (capture.state, capture.missing_ranks) == ("complete", ())


def test_ranks_of_unknown_sizes_are_those_whose_files_came(http, server, new_window):
    server.sizes = ServerSizes(device="cpu", version="0.5.23", is_known=False)
    window = new_window(num_steps=5)
    window.open()
    window.wait()
    capture = window.close()
    assert (capture.state, capture.expected_ranks) == ("complete", ("TP0", "TP1"))
    assert "its ranks are those whose files came (2)" in capture.notes[0]
    assert capture.gpu_ranks == {}


def test_a_decode_window_that_waits_for_a_larger_batch_says_so(http, server, new_window):
    server.spec = replace(server.spec, env=((torch.DECODE_MIN_BS, "64"),))
    http.steps_end = False
    window = new_window(num_steps=5, profile_by_stage=True, timeout=0.5)
    window.open()
    http.entry("TP0", "Decode batch, #running-req: 12, #token: 318, #queue-req: 0")
    window.wait()
    capture = window.close()
    assert "waits for a batch of 64 requests" in capture.reason
    assert "had 12 at most" in capture.reason
