"""Torch windows: what is refused, what lies beside the traces, and servers of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_sglprof._capture import torch, torch_request
from pytest_sglprof._errors import Inconclusive, WindowRefused
from pytest_sglprof._server.sizes import ServerSizes


def test_a_window_by_stage_has_two_files_a_rank_and_is_disarmed(http, new_window):
    with new_window(num_steps=3, profile_by_stage=True, profile_stages=("decode",)) as opened:
        opened.wait()
    capture = opened.close()
    assert capture.state == "complete"
    assert len(capture.artifacts) == 4
    assert http.bodies()[0]["profile_stages"] == ["decode"]
    assert http.bodies()[1]["start_step"] > 10**12, "an armed stage would fire in the next window"


def test_a_profile_that_somebody_else_started_meanwhile_is_told(http, new_window):
    opened = new_window()
    opened.open()
    http.entry("TP0", "Profiling starts. Traces will be saved to: /x (with profile id: 77.5)")
    http.entry("TP0", "Profiling done. Traces are saved to: /x")
    capture = opened.close()
    assert capture.state == "incomplete"
    assert "77.5" in capture.reason


def test_merged_traces_and_others_lie_beside_but_are_no_artifacts(server, http, new_window):
    def extra(body):
        (server.trace_root.joinpath(body["output_dir"]) / "x-TP-0-memory.pickle").write_text("m")

    http.on_start = extra
    with new_window(merge_profiles=True, profile_prefix="p") as opened:
        pass
    capture = opened.close()
    assert [a.kind for a in capture.artifacts] == ["torch", "torch"]
    assert (opened.folder / "x-TP-0-memory.pickle").is_file()
    assert any("memory.pickle" in note for note in capture.notes)
    assert any("no merged trace (with a profile_prefix" in note for note in capture.notes)


def test_the_users_own_folder_keeps_its_files(server, new_window, tmp_path):
    own = tmp_path / "own" / "deeper"
    with new_window(output_dir=str(own), profile_id="mine") as opened:
        pass
    assert opened.close().state == "complete"
    assert len(list(own.iterdir())) == 2
    assert len(opened.close().artifacts) == 2
    again = new_window(output_dir=str(own), profile_id="mine")
    with pytest.raises(WindowRefused, match="already holds traces"):
        again.open()
    assert len(list(own.iterdir())) == 2


def test_an_unwritable_folder_never_reaches_the_server(http, new_window, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WindowRefused, match="cannot be written"):
        new_window(output_dir=str(tmp_path / "file" / "x")).open()
    assert http.bodies() == []


def test_too_little_space_is_inconclusive_and_leaves_no_folder(
    server, http, new_window, monkeypatch
):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(torch_request.shutil, "disk_usage", lambda folder: usage)
    (server.folder / "tmp").mkdir()
    with pytest.raises(WindowRefused) as error:
        new_window(num_steps=50).open()
    assert isinstance(error.value, Inconclusive)
    assert error.value.exit_status == 3
    assert "estimated at 0.4 GB" in str(error.value)
    assert http.bodies() == []
    assert not list(server.trace_root.iterdir())


def test_a_window_that_the_watchdog_would_kill_is_refused(server, new_window):
    server.info = {"watchdog_timeout": 10}
    with pytest.raises(WindowRefused, match="watchdog"):
        new_window(num_steps=50, with_stack=True).open()
    new_window(num_steps=10)._recording.refuse()


def test_attached_servers_are_told_no_path_unless_it_is_shared(server, http, new_window, tmp_path):
    server.attached, server.log = True, None
    here, server.url = server.url, "http://gpu-7:30000"
    with pytest.raises(WindowRefused) as error:
        new_window().open()
    assert "--sglprof-server-dir" in error.value.hint
    server.url = here
    shared = tmp_path / "shared"
    server.server_dir = ("/srv/traces", str(shared))
    folders = {}

    def write_locally(body):
        folders["told"] = body["output_dir"]
        body["output_dir"] = str(shared / body["output_dir"].rsplit("/", 1)[1])

    http.on_start = write_locally
    with new_window(num_steps=3) as opened:
        opened.wait()
    assert folders["told"].startswith("/srv/traces/")
    assert opened.close().state == "complete"
    assert http.requests[0][0] == "/stop_profile", "whatever runs there is saved before ours"
    with pytest.raises(WindowRefused, match="cannot be read from here"):
        new_window(output_dir="/elsewhere").open()
    below = new_window(output_dir="/srv/traces/mine", num_steps=3)
    http.on_start = lambda body: body.update(output_dir=str(shared / "mine"))
    with below:
        below.wait()
    assert below.close().state == "complete"


def test_an_attached_server_of_this_machine_needs_no_shared_folder(server, http, new_window):
    server.attached, server.log = True, None
    with new_window(num_steps=3) as opened:
        opened.wait()
    assert opened.close().state == "complete"
    assert http.bodies()[-1]["output_dir"].startswith(str(server.trace_root))
    assert not list(server.trace_root.iterdir())


def test_behind_a_forwarded_port_a_folder_that_every_machine_has_is_used(
    server, http, new_window, monkeypatch
):
    monkeypatch.setattr(torch_request, "listener_of", lambda port: None)
    server.attached, server.log = True, None
    with new_window(num_steps=3) as opened:
        opened.wait()
    folder = Path(http.bodies()[-1]["output_dir"])
    assert folder.parent == Path("/tmp")
    assert opened.close().state == "complete"
    assert not folder.exists()


def test_an_idle_attached_server_is_known_by_its_loads(server, http, new_window, tmp_path):
    server.attached, server.log = True, None
    server.server_dir = (str(tmp_path / "both"), str(tmp_path / "both"))
    http.steps_end, http.running = False, 0
    with new_window(num_steps=3, timeout=0.3) as opened:
        opened.wait()
    assert "no forward pass was run" in opened.close().reason


def test_every_rank_of_a_dp_server_is_expected(http, server, new_window):
    http.sizes = server.sizes = ServerSizes(tp=2, dp=2, device="cpu", version="0.5.23")
    http.silent_ranks = {"DP1 TP0"}
    with new_window() as opened:
        pass
    assert opened.close().expected_ranks == ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1")
    assert opened.close().missing_ranks == ("DP1 TP0",)


def test_a_server_that_lost_its_connection_without_dying_is_reported(server, http, new_window):
    opened = new_window()
    opened.open()
    server.client.url = "http://127.0.0.1:1"
    server.client._http.base_url = "http://127.0.0.1:1"
    capture = opened.close()
    assert capture.state == "failed"
    assert "/stop_profile" in capture.reason


def test_progress_is_told(server, new_window):
    told: list[str] = []
    opened = new_window(num_steps=2)
    opened._progress = told.append
    with opened:
        opened.wait()
    assert told == ["writing the traces"]
    assert server.client not in torch._UNSETTLED
