"""The stand-in as a process: its HTTP, its logs and its end."""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pytest_sglprof._ranks import Rank
from tests.support.running import Running, standin, wait_for


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server of two ranks for all the tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("pair")
    with standin(folder, "--tp", "2", "--step-ms", "2", "--decode-log-interval", "5") as running:
        yield running


def window(running: Running, folder: Path, steps: int = 20, **params: object) -> list[Path]:
    body = {"output_dir": str(folder), "profile_id": "w", **params}
    assert running.post("/start_profile", body).status_code == 200
    running.generate(steps, text=f"window {time.time()}")
    assert running.post("/stop_profile").status_code == 200
    return sorted(folder.iterdir())


def moe_total(path: Path) -> float:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(e["dur"] for e in events if e.get("cat") == "kernel" and "moe" in e["name"])


def test_processes_carry_the_titles_of_the_real_ones(pair: Running) -> None:
    lines = [" ".join(process.cmdline()).rstrip() for process in pair.ranks()]
    assert sorted(lines) == ["sglang::scheduler_TP0", "sglang::scheduler_TP1"]
    names = {Path(f"/proc/{process.pid}/comm").read_text() for process in pair.ranks()}
    assert names == {"sglang::schedul\n"}  # what nsys shows
    assert [Rank.from_process_title(line) for line in lines]


def test_prefill_and_decode_lines_come_from_the_first_rank_only(pair: Running) -> None:
    pair.generate(30, text="log lines please")
    decode = pair.lines("Decode batch")
    assert decode
    assert pair.lines("Prefill batch, #new-seq: 1, #new-token: 3, #cached-token: 0")
    assert all(" TP0] " in line for line in decode)


def test_generation_by_every_route(pair: Running) -> None:
    answer = pair.generate(4)
    assert answer["meta_info"]["completion_tokens"] == 4
    assert answer["meta_info"]["prompt_tokens"] == 3
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    ids = {"input_ids": [[1, 2], [3]], "sampling_params": {"max_new_tokens": 2}}
    assert [a["text"] for a in pair.post("/generate", ids).json()] == [" stand stand"] * 2
    reply = pair.post("/v1/completions", {"prompt": "a b", "max_tokens": 3}).json()
    assert reply["choices"][0]["text"] == " stand" * 3
    assert reply["usage"] == {
        "prompt_tokens": 2,
        "total_tokens": 5,
        "completion_tokens": 3,
        "prompt_tokens_details": None,
        "reasoning_tokens": 0,
    }
    talk = {"messages": [{"role": "user", "content": "a b"}], "max_completion_tokens": 2}
    chat = pair.post("/v1/chat/completions", talk).json()
    assert chat["choices"][0]["message"]["content"] == " stand stand"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 3}}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 3}),
        ("/v1/chat/completions", {"messages": [{"content": "a"}], "max_tokens": 3}),
    ],
)
def test_streams_send_one_event_a_token(pair: Running, path: str, body: dict[str, object]) -> None:
    with pair.http.stream("POST", pair.url + path, json={**body, "stream": True}) as reply:
        events = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert len(events) == 4
    last = json.loads(events[-2])
    if path == "/generate":
        assert last["text"] == " stand" * 3
    else:
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["usage"]["completion_tokens"] == 3


def test_bad_requests_are_refused_with_400(pair: Running) -> None:
    for body in (
        {"num_steps": "many"},
        {"activities": "CPU"},
        {"with_stack": 1},
        {"merge_profiles": None},
        {"num_steps": True},
    ):
        assert pair.post("/start_profile", body).status_code == 400
    for text in ("{", "[1]"):
        assert pair.post("/start_profile", content=text).status_code == 400
    assert pair.post("/generate", {"sampling_params": {}}).status_code == 400
    assert pair.post("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -1}})
    assert pair.post("/slow_down", {"forward_sleep_time": "x"}).status_code == 400
    assert pair.post("/v1/chat/completions", {}).status_code == 400
    assert pair.get("/generate").status_code == 405
    assert pair.post("/end_profile").status_code == 404
    assert pair.get("/metrics").status_code == 404
    assert pair.get("/v1/models/other").status_code == 404
    assert pair.post("/stop_profile").status_code == 500


def test_information(pair: Running) -> None:
    info = pair.get("/server_info").json()
    assert (info["tp_size"], info["dp_size"], info["device"]) == (2, 1, "cuda")
    assert info["standin"]
    assert pair.get("/get_server_info").json().keys() == info.keys()
    assert pair.get("/model_info").json()["model_path"] == "standin"
    card = pair.get("/v1/models").json()["data"][0]
    assert pair.get(f"/v1/models/{card['id']}").json() == card
    loads = pair.get("/v1/loads").json()["loads"]
    assert [load["dp_rank"] for load in loads] == [0]
    assert pair.get("/v1/loads", params={"dp_rank": 7}).json()["loads"] == []


def test_health_runs_a_batch_and_takes_a_second(pair: Running) -> None:
    pair.generate(1)
    before, began = len(pair.lines("Prefill batch")), time.monotonic()
    assert pair.get("/health").status_code == 200
    assert time.monotonic() - began >= 1
    assert len(pair.lines("Prefill batch")) == before + 1
    assert pair.get("/ready").status_code == 200


def test_loads_follow_the_running_requests_and_a_busy_cache_is_not_flushed(pair: Running) -> None:
    body = {"text": "busy", "sampling_params": {"max_new_tokens": 5000}, "stream": True}

    def running_requests() -> int:
        return int(pair.get("/v1/loads").json()["loads"][0]["num_running_reqs"])

    with pair.http.stream("POST", pair.url + "/generate", json=body) as reply:
        lines = reply.iter_lines()  # dropping the iterator would close the connection
        next(lines)
        wait_for(lambda: running_requests() == 1)
        assert pair.post("/flush_cache").status_code == 400
    wait_for(lambda: running_requests() == 0)
    wait_for(lambda: pair.post("/flush_cache").status_code == 200)
    assert pair.lines("Cache flushed successfully!")
    assert pair.lines("Cache not flushed because there are pending requests")


def test_slow_down_stretches_every_step(pair: Running) -> None:
    def seconds() -> float:
        began = time.monotonic()
        pair.generate(5)
        return time.monotonic() - began

    assert pair.post("/slow_down", {"forward_sleep_time": 0.05}).status_code == 200
    assert seconds() > 0.25
    assert pair.post("/slow_down", {"forward_sleep_time": None}).status_code == 200
    assert seconds() < 0.25


def test_windows_again_and_again(pair: Running, tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        names = [path.name for path in window(pair, folder)]
        assert names == ["w-TP-0.trace.json.gz", "w-TP-1.trace.json.gz"]
    starts, ends = pair.lines(r"TP\d\] Profiling starts"), pair.lines(r"TP\d\] Profiling done")
    assert len(starts) == len(ends) == 4
    assert pair.lines("Traces will be saved to: .* \\(with profile id: w\\)")


def test_a_slowed_rank_shows_in_its_trace(tmp_path: Path) -> None:
    slow = ["--slow", "rank=1,category=moe,factor=1.4"]
    with standin(tmp_path, "--tp", "2", "--step-ms", "3", *slow) as running:
        first, second = window(running, tmp_path / "traces", steps=50)
    assert moe_total(second) / moe_total(first) == pytest.approx(1.4, rel=0.01)


def test_data_parallel_replicas_take_turns_or_the_rank_asked_for(tmp_path: Path) -> None:
    with standin(tmp_path, "--tp", "2", "--dp", "2", "--step-ms", "1") as running:
        turns = [running.generate(1)["meta_info"]["dp_rank"] for _ in range(4)]
        assert sorted(turns) == [0, 0, 1, 1]
        for name in ("routed_dp_rank", "data_parallel_rank"):
            assert running.generate(1, **{name: 1})["meta_info"]["dp_rank"] == 1
        body = {"text": "a", "routed_dp_rank": 2}
        assert running.post("/generate", body).status_code == 400
        loads = running.get("/v1/loads").json()["loads"]
        assert [load["dp_rank"] for load in loads] == [0, 1]
        folder = tmp_path / "traces"
        running.post("/start_profile", {"output_dir": str(folder), "profile_id": "w"})
        running.generate(5, routed_dp_rank=1)
        assert running.post("/stop_profile").status_code == 200
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert len(sizes) == 4
    assert sizes["w-TP-0-DP-0.trace.json.gz"] < 2000 < sizes["w-TP-0-DP-1.trace.json.gz"]


def test_dp_attention_reports_sizes_as_today_and_steps_together(tmp_path: Path) -> None:
    options = ["--tp", "2", "--dp", "2", "--enable-dp-attention", "--step-ms", "1"]
    with standin(tmp_path, *options) as running:
        info = running.get("/server_info").json()
        assert (info["dp_size"], info["attn_dp_size"]) == (1, 2)
        folder = tmp_path / "traces"
        running.post("/start_profile", {"output_dir": str(folder), "profile_id": "w"})
        running.generate(5, routed_dp_rank=0)
        running.post("/stop_profile")
        assert running.lines(r" DP0 TP0\] Prefill batch")
    assert sorted(path.name for path in folder.iterdir()) == [
        "w-TP-0-DP-0.trace.json.gz",
        "w-TP-1-DP-1.trace.json.gz",
    ]
    assert all(path.stat().st_size > 2000 for path in folder.iterdir())


def test_keys(tmp_path: Path) -> None:
    keys = ["--api-key", "plain", "--admin-api-key", "admin", "--enable-metrics"]
    with standin(tmp_path, *keys, "--step-ms", "1") as running:

        def status(path: str, key: str, method: str = "GET") -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            url = running.url + path
            return running.http.request(method, url, headers=headers).status_code

        assert [status("/server_info", key) for key in ("", "admin", "plain")] == [401, 401, 200]
        assert [status("/stop_profile", key, "POST") for key in ("", "plain", "admin")] == [
            401,
            401,
            500,
        ]
        assert [status(path, "") for path in ("/ready", "/health", "/metrics")] == [200] * 3
        refused = running.get("/v1/loads")
        assert refused.json() == {"error": "Unauthorized"}
        header = {"Authorization": "Bearer plain"}
        assert running.get("/server_info", headers=header).json()["admin_api_key"] == "admin"
        assert 'sglang:num_running_reqs{dp_rank="0"' in running.get("/metrics").text


@pytest.mark.parametrize("version", ["0.5.3", "0.5.14"])
def test_keys_of_older_versions(version: str, tmp_path: Path) -> None:
    keys = ["--api-key", "plain", "--admin-api-key", "admin", "--speak", version]
    with standin(tmp_path, *keys, "--step-ms", "1") as running:

        def status(path: str, key: str = "") -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return running.get(path, headers=headers).status_code

        assert [status(path) for path in ("/ready", "/nothing", "/health")] == [401, 401, 200]
        assert status("/ready", "plain") == 404
        admin_only = version != "0.5.3"  # which knows no other key
        assert status("/stop_profile", "plain") == (401 if admin_only else 500)


def test_later_stages_of_a_pipeline_write_after_the_stop_is_answered(tmp_path: Path) -> None:
    with standin(tmp_path, "--pp", "2", "--step-ms", "2", "--export-delay", "1") as running:
        folder = tmp_path / "traces"
        running.post("/start_profile", {"output_dir": str(folder), "profile_id": "w"})
        running.generate(5)
        running.post("/stop_profile")
        names = [f"w-TP-0-PP-{stage}.trace.json.gz" for stage in (0, 1)]
        assert [path.name for path in folder.iterdir()] == names[:1]
        wait_for(lambda: len(running.lines("Profiling done")) == 2)
        assert sorted(path.name for path in folder.iterdir()) == names


def test_log_switches_of_the_environment(tmp_path: Path) -> None:
    env = {"SGLANG_LOG_MS": "1", "SGLANG_LOG_FORWARD_ITERS": "true"}
    with standin(tmp_path, "--step-ms", "1", "--decode-log-interval", "2", env=env) as running:
        running.generate(5)
        assert running.lines(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\] Decode batch \[\d+\], ")


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_and_loses_an_open_window(
    number: signal.Signals, tmp_path: Path
) -> None:
    with standin(tmp_path, "--tp", "2") as running:
        ranks = running.ranks()
        running.post("/start_profile", {"output_dir": str(tmp_path / "traces")})
        running.generate(3)
        running.process.send_signal(number)
        assert running.process.wait(5) == 0
        assert gone(ranks)
        assert not (tmp_path / "traces").exists()
        assert not running.lines("SIGQUIT|Exception|Traceback")


@pytest.mark.parametrize("hang", [False, True])
def test_ranks_do_not_outlive_a_killed_front(hang: bool, tmp_path: Path) -> None:
    with standin(tmp_path, "--tp", "2", *(["--hang-in-stop-profile"] if hang else [])) as running:
        ranks = running.ranks()
        if hang:
            running.post("/start_profile", {"output_dir": str(tmp_path)})
            threading.Thread(target=_ignore_errors, args=(running, "/stop_profile")).start()
            wait_for(lambda: running.lines("Stop profiling"))
        running.process.kill()
        wait_for(lambda: gone(ranks), 5)


def _ignore_errors(running: Running, path: str) -> None:
    try:
        running.post(path)
    except Exception:
        return


def test_a_killed_rank_ends_the_server_as_in_the_real_one(tmp_path: Path) -> None:
    with standin(tmp_path, "--tp", "2", "--crash-delay", "0.2") as running:
        first, second = sorted(running.ranks(), key=lambda process: process.pid)
        os.kill(second.pid, signal.SIGKILL)
        assert running.process.wait(10) == -signal.SIGKILL
        assert running.lines(rf"scheduler_1 \(pid={second.pid}\) crashed with exit code -9")
        assert running.lines("SIGQUIT received")
        wait_for(lambda: gone([first]))


@pytest.mark.parametrize(
    ("arguments", "body", "says"),
    [
        ([], {"profile_prefix": "a/b"}, "FileNotFoundError: .* No such file or directory: "),
        (["--device", "cpu"], {"activities": ["GPU"]}, "AssertionError: No activities specified"),
        (["--die-in-window"], {}, "RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_deadly_windows(
    arguments: list[str], body: dict[str, object], says: str, tmp_path: Path
) -> None:
    with standin(tmp_path, "--tp", "2", "--crash-delay", "0.2", *arguments) as running:

        def deadly() -> None:
            running.post("/start_profile", {"output_dir": str(tmp_path / "traces"), **body})
            running.generate(10)
            running.post("/stop_profile")

        with pytest.raises(Exception, match=r"disconnected|reset|refused"):
            deadly()
        assert running.process.wait(10) == -signal.SIGKILL
        assert running.lines(r"TP1\] Scheduler hit an exception: Traceback")
        assert running.lines(says)
        assert running.lines("SIGQUIT received. signum=None, frame=None.")
        assert running.lines("kill_process_tree called: parent_pid")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("import", "ModuleNotFoundError: No module named"),
        ("oom", "torch.OutOfMemoryError: CUDA out of memory"),
        ("port", "address already in use"),
    ],
)
def test_a_start_that_fails_says_why(fault: str, says: str, tmp_path: Path) -> None:
    with standin(tmp_path, "--tp", "2", "--start-fault", fault, ready=False) as running:
        assert running.process.wait(10) == 1
        assert running.lines(says)


def test_a_taken_port(pair: Running, tmp_path: Path) -> None:
    port = pair.url.rpartition(":")[2]
    with standin(tmp_path, "--port", port, ready=False) as running:
        assert running.process.wait(10) == 1
        assert running.lines("address already in use")


def test_never_ready_and_death_after_a_while(tmp_path: Path) -> None:
    with standin(tmp_path, "--never-ready", ready=False) as running:
        wait_for(lambda: running.lines("running on"))
        running.url = running.lines("running on")[0].split("running on ")[1].split()[0]
        assert running.get("/ready").status_code == 503
        assert running.get("/health").status_code == 503
    with standin(tmp_path, "--die-after", "0.1", "--crash-delay", "0") as running:
        assert running.process.wait(10) == -signal.SIGKILL
        assert running.lines("device-side assert triggered")


def test_each_start_is_another_life_unless_one_is_named(tmp_path: Path) -> None:
    def life(name: str, *options: str) -> tuple[list[float], str, str]:
        """ns of a kernel of experts on each rank, what the log says, and the server's command."""
        folder = tmp_path / name
        folder.mkdir()
        args = ("--tp", "2", "--step-ms", "2", "--life-noise", "0.1", *options)
        with standin(folder, *args) as running:
            events = [
                json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
                for path in window(running, folder / "traces")
            ]
            command = running.get("/server_info").json()["launch_command"]
            (said,) = running.lines("stand-in of SGLang: life")
        found = [[e["dur"] for e in each if e.get("name") == "fused_moe_kernel"] for each in events]
        return [sum(each) / len(each) for each in found], said.rsplit(" ", 1)[1], command

    (one, named, _), (two, *_) = life("a", "--life-seed", "1"), life("b", "--life-seed", "2")
    assert (named, one[0]) == ("1", pytest.approx(one[1], rel=0.01))  # the ranks are of one life
    assert abs(one[0] / two[0] - 1) > 0.02
    drawn, number, command = life("c")
    assert "--life-seed" not in command  # else no two lives would have the same options
    assert number not in ("1", "2")
    assert life("d", "--life-seed", number)[0] == pytest.approx(drawn, rel=0.01)
