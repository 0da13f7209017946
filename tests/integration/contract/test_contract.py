"""What the stand-in and the real server have in common, checked on both.

The order matters: the last test kills its server, so that one start is enough.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pytest_sglprof._ranks import Rank
from pytest_sglprof.standin.load_driver import main as own_driver
from tests.integration.contract.conftest import STANDINS, ContractServer
from tests.support.contract_fields import INFO_FIELDS, META_FIELDS, STAMP, pattern_of, shape
from tests.support.contract_traces import TraceFile, check_shape
from tests.support.running import ROOT, wait_for

_names = itertools.count()
# PyTorch's profiler on a CPU, started anew while a batch runs, now and then ends its process
# (SIGSEGV in ThreadLocalSubqueue::begin_op), and with it the one real server of this suite.
standins_only = pytest.mark.parametrize("contract_server", STANDINS, indirect=True)


@contextlib.contextmanager
def traffic(server: ContractServer) -> Iterator[None]:
    """One request after the other, so that the server always has something to run."""
    stop = threading.Event()

    def work() -> None:
        with httpx.Client(base_url=server.running.url, timeout=60) as client:
            while not stop.is_set():
                sampling = {"max_new_tokens": 20, "ignore_eos": True}
                body = {"text": f"again {next(_names)}", "sampling_params": sampling}
                with contextlib.suppress(httpx.HTTPError):
                    client.post("/generate", json=body)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def start(server: ContractServer, name: str, **params: Any) -> Path:
    folder = server.folder / "traces" / name
    body = {"output_dir": str(folder), "profile_id": name, "with_stack": False}
    reply = server.running.post("/start_profile", {**body, **params})
    assert (reply.status_code, reply.text) == (200, "Start profiling.\n")
    return folder


def stop(server: ContractServer) -> int:
    reply = server.running.http.post(server.running.url + "/stop_profile", timeout=120)
    text = "Stop profiling. This will take some time.\n"
    assert reply.text == (text if reply.status_code == 200 else "Internal Server Error")
    return reply.status_code


def id_of(server: ContractServer, folder: Path) -> str:
    """The id of the window of a folder: the client's, or in older versions the server's."""
    (line, *_) = server.running.lines(rf"TP0\] Profiling starts.* saved to: {folder} ")
    name = line.rpartition("(with profile id: ")[2].removesuffix(")")
    assert (name == folder.name) == server.knows("profile_id")
    return name


def done_lines(server: ContractServer, folder: Path) -> list[str]:
    return server.running.lines(rf"Profiling done\. Traces are saved to: {folder}$")


def test_health_readiness_and_unknown_paths(contract_server: ContractServer) -> None:
    running = contract_server.running
    reply = running.get("/ready")
    if contract_server.has("/ready"):
        assert (reply.status_code, reply.text) == (200, "")
    else:
        assert reply.status_code == 404
    began = time.monotonic()
    assert running.get("/health").status_code == 200
    assert time.monotonic() - began >= 1
    assert running.get("/nothing").status_code == 404
    assert running.post("/end_profile").json() == {"detail": "Not Found"}
    assert running.lines("The server is fired up and ready to roll!")


def test_processes_carry_the_titles_of_their_ranks(contract_server: ContractServer) -> None:
    children = psutil.Process(contract_server.running.process.pid).children(recursive=True)
    ranks = [Rank.from_process_title(" ".join(child.cmdline())) for child in children]
    assert sorted(rank.label for rank in ranks if rank) == ["TP0", "TP1"]


def test_server_info(contract_server: ContractServer) -> None:
    path = "/server_info" if contract_server.has("/server_info") else "/get_server_info"
    info = contract_server.running.get(path).json()
    absent = set(contract_server.record["http"]["server_info"]["absent"])
    expected = {**INFO_FIELDS, "version": contract_server.version, **dict.fromkeys(absent)}
    expected = {name: expected[name] for name in INFO_FIELDS}
    assert {name: info.get(name) for name in INFO_FIELDS} == expected
    assert not absent & info.keys()
    assert info["device"] == ("cpu" if contract_server.on_cpu else "cuda")
    assert len(info["internal_states"]) == 1
    for name in ("launch_command", "status", "model_path", "port", "startup_time"):
        assert name in info or name in absent
    older = contract_server.running.get("/get_server_info").json()
    assert older["tp_size"] == 2


def test_model_routes(contract_server: ContractServer) -> None:
    running = contract_server.running
    newer, older = running.get("/model_info"), running.get("/get_model_info")
    info = older.json()
    if contract_server.has("/model_info"):
        assert newer.json()["model_path"] == info["model_path"]
    else:
        assert newer.status_code == 404
    assert info["is_generation"] is True
    assert info.keys() >= {"model_path", "served_model_name", "tokenizer_path", "model_type"}
    models = running.get("/v1/models").json()
    assert models["object"] == "list"
    assert models["data"][0].keys() == {
        "id", "object", "created", "owned_by", "root", "parent", "max_model_len",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/loads", "/get_load"])
def test_loads(contract_server: ContractServer, path: str) -> None:
    get = contract_server.running.get
    if not contract_server.has(path):
        assert get(path).status_code == 404
        return
    recorded = contract_server.record["http"][path.strip("/").replace("/", "_")]
    assert shape(get(path).json()) == shape(recorded)

    def running_requests() -> int:
        answer = get(path).json()
        (load,) = answer if isinstance(answer, list) else answer["loads"]
        assert load["dp_rank"] == 0
        return int(load["num_reqs"] if path == "/get_load" else load["num_running_reqs"])

    with traffic(contract_server):
        wait_for(lambda: running_requests() == 1)
    wait_for(lambda: running_requests() == 0)


def test_generate(contract_server: ContractServer) -> None:
    answer = contract_server.running.generate(7, text="a b c d")
    assert answer.keys() == {"text", "output_ids", "meta_info"}
    meta = answer["meta_info"]
    assert meta["completion_tokens"] == 7
    assert meta["finish_reason"] == {"type": "length", "length": 7}
    assert meta.keys() == META_FIELDS
    assert contract_server.running.post("/generate", {"sampling_params": {}}).status_code == 400


def test_a_stream_is_cumulative_and_ends_with_done(contract_server: ContractServer) -> None:
    running = contract_server.running
    sampling = {"max_new_tokens": 6, "ignore_eos": True}
    body = {"text": "stream this", "sampling_params": sampling, "stream": True}
    with running.http.stream("POST", running.url + "/generate", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1]]
    counts = [event["meta_info"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert len(events[-1]["text"]) >= len(events[0]["text"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a b", "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a b"}]}),
    ],
)
def test_openai_routes(
    contract_server: ContractServer, path: str, body: dict[str, Any], stream: bool
) -> None:
    running = contract_server.running
    model = running.get("/v1/models").json()["data"][0]["id"]
    asked = {"model": model, **body, "stream": stream, "ignore_eos": True}
    if "chat" in path:
        asked["max_completion_tokens"] = 4
    if not stream:
        answer = running.post(path, asked).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 4
        return
    with running.http.stream("POST", running.url + path, json=asked) as reply:
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"] for line in lines[:-1]]
    assert {choice[0]["finish_reason"] for choice in choices if choice} == {None, "length"}


def test_the_cache_is_flushed_when_idle_only(contract_server: ContractServer) -> None:
    running = contract_server.running
    with traffic(contract_server):
        wait_for(lambda: running.post("/flush_cache").status_code == 400)
    flushed = wait_for(lambda: _flushed(running.post("/flush_cache")))
    assert flushed.startswith("Cache flushed.\n")
    assert running.lines(r"TP0\] Cache flushed successfully!")


def _flushed(reply: httpx.Response) -> str:
    return reply.text if reply.status_code == 200 else ""


def test_log_lines_of_batches_come_from_the_first_rank_only(
    contract_server: ContractServer,
) -> None:
    running = contract_server.running
    running.generate(20, text=f"for the log {next(_names)}")
    for word in ("Prefill", "Decode"):
        lines = wait_for(lambda word=word: running.lines(f"{word} batch"))
        pattern = pattern_of(contract_server.record["batches"]["lines"], f"{word} batch", "TP0")
        assert all(re.fullmatch(pattern, line) for line in lines), (pattern, lines)
    request = STAMP + r'\] INFO:     127\.0\.0\.1:\d+ - "POST /generate HTTP/1\.1" 200 OK'
    assert any(re.fullmatch(request, line) for line in running.lines("POST /generate"))


def test_a_window_by_hand(contract_server: ContractServer) -> None:
    with traffic(contract_server):
        folder = start(contract_server, "hand", detailed_annotations=True)
        time.sleep(0.5)
        assert stop(contract_server) == 200
    name, named = id_of(contract_server, folder), contract_server.record["spans"]["plain"]
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}-TP-0.trace.json.gz",
        f"{name}-TP-1.trace.json.gz",
    ]
    traces = [TraceFile(folder / f"{name}-TP-{rank}.trace.json.gz") for rank in (0, 1)]
    ids = []
    for rank, trace in enumerate(traces):
        check_shape(trace, rank, on_cpu=contract_server.on_cpu, named=bool(named))
        ids.append([match[2] for match in trace.steps()])
    assert len(done_lines(contract_server, folder)) == 2
    if not named:
        assert ids == [[], []]
        return
    assert len(ids[0]) > 3
    # A rank may be cut off one step earlier than the other.
    assert len(set(ids[0]) ^ set(ids[1])) <= 2
    detailed = contract_server.record["spans"]["detailed"] or [""]
    assert all(("forward_id" in detailed[0]) == (each is not None) for each in ids[0])
    assert all((" g_sk=" in detailed[-1]) == (" g_sk=" in match[0]) for match in decodes(traces[0]))


def decodes(trace: TraceFile) -> list[re.Match[str]]:
    return [match for match in trace.steps() if match[1] == "DECODE"]


def test_a_window_of_steps_ends_by_itself(contract_server: ContractServer) -> None:
    with traffic(contract_server):
        folder = start(contract_server, "steps", num_steps=5, profile_prefix="TP-9")
        wait_for(lambda: len(done_lines(contract_server, folder)) == 2, 60)
    prefix = "TP-9-" if contract_server.knows("profile_prefix") else ""
    begin = f"{prefix}{id_of(contract_server, folder)}"
    names = [f"{begin}-TP-{rank}.trace.json.gz" for rank in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    windows = contract_server.record["windows"]
    assert windows["asked_steps"] == 5
    for name in names if contract_server.record["spans"]["plain"] else ():
        assert len(TraceFile(folder / name).steps()) == windows["recorded_steps"]
    assert stop(contract_server) == 500


@standins_only
def test_a_window_by_stage_has_a_file_a_stage(contract_server: ContractServer) -> None:
    with traffic(contract_server):
        folder = start(contract_server, "stage", num_steps=3, profile_by_stage=True)
        wait_for(lambda: len(done_lines(contract_server, folder)) == 4, 60)
    names = sorted(path.name for path in folder.iterdir())
    stages = ("DECODE", "EXTEND")
    begin = id_of(contract_server, folder)
    assert names == [f"{begin}-TP-{rank}-{s}.trace.json.gz" for rank in (0, 1) for s in stages]
    for name in names if contract_server.record["spans"]["plain"] else ():
        steps = TraceFile(folder / name).steps()
        assert {match[1] for match in steps} == {"DECODE" if "DECODE" in name else "EXTEND"}


def test_merged_files_name_the_ranks_in_process_ids(contract_server: ContractServer) -> None:
    with traffic(contract_server):
        folder = start(contract_server, "merge", merge_profiles=True)
        time.sleep(0.2)
        assert stop(contract_server) == 200
    path = folder / f"merged-{id_of(contract_server, folder)}.trace.json.gz"
    if not contract_server.knows("merge_profiles"):
        assert not path.exists()
        return
    merged = gzip.decompress(path.read_bytes())
    events = json.loads(merged)["traceEvents"]
    assert {str(event["pid"]).split()[0] for event in events} == {"[TP00]", "[TP01]"}


def test_stopping_twice_is_an_error_with_the_reason_in_the_log(
    contract_server: ContractServer,
) -> None:
    start(contract_server, "twice")
    assert [stop(contract_server), stop(contract_server)] == [200, 500]
    running = contract_server.running
    assert running.lines('"POST /stop_profile HTTP/1.1" 500 Internal Server Error')
    assert running.lines("RuntimeError: Profiling is not in progress. Call /start_profile first.")


def test_starting_twice_loses_the_first_window(contract_server: ContractServer) -> None:
    first = start(contract_server, "first")
    second = start(contract_server, "second")
    assert stop(contract_server) == 200
    ends = [path.name.partition("-TP-")[2] for path in sorted(first.iterdir())]
    assert ends == ["0.trace.json.gz", "1.trace.json.gz"]
    assert not second.exists()


@standins_only
def test_an_armed_start_step_fires_in_a_later_window(contract_server: ContractServer) -> None:
    running = contract_server.running
    start(contract_server, "armed", start_step=1, num_steps=2)  # at least the next step
    assert stop(contract_server) == 500
    folder = start(contract_server, "later", detailed_annotations=True)
    running.generate(10, text=f"armed {next(_names)}")
    assert stop(contract_server) == 200
    assert len(running.lines(rf"TP0\] Profiling starts.* saved to: {folder} ")) == 2
    assert (folder / f"{id_of(contract_server, folder)}-TP-0.trace.json.gz").exists()


@pytest.mark.parametrize("activities", [["FOO"], [], ["cpu"]])
def test_unknown_activities_record_nothing(
    contract_server: ContractServer, activities: list[str]
) -> None:
    folder = start(contract_server, "nothing", activities=activities)
    assert stop(contract_server) == 500
    assert not folder.exists()


@pytest.mark.parametrize(
    "body", ['{"num_steps": "many"}', '{"activities": "CPU"}', "{", "[1]", '{"with_stack": []}']
)
def test_malformed_windows_are_refused(contract_server: ContractServer, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    url = contract_server.running.url + "/start_profile"
    reply = contract_server.running.http.post(url, content=body, headers=headers)
    assert reply.status_code == 400
    assert reply.json().keys() >= {"message", "code"}
    assert stop(contract_server) == 500


def driver_words(server: ContractServer, file: Path) -> list[str]:
    return [
        "--backend", "sglang", "--base-url", server.running.url, "--model", server.model,
        "--dataset-name", "random-ids", "--random-input-len", "16", "--random-output-len", "8",
        "--random-range-ratio", "1.0", "--num-prompts", "6", "--max-concurrency", "3",
        "--output-file", str(file),
    ]  # fmt: skip


def check_result(file: Path) -> list[str]:
    result: dict[str, Any] = json.loads(file.read_text().splitlines()[-1])
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 48
    assert result["request_rate"] == float("inf")
    assert result["server_info"]["tp_size"] == 2
    assert 0 < result["median_ttft_ms"] < result["median_e2e_latency_ms"]
    return list(result)


def test_both_load_drivers_give_the_same_fields(
    contract_server: ContractServer, tmp_path: Path, shared_data: Path
) -> None:
    recorded = (shared_data / "logs" / "tp2" / "bench.jsonl").read_text().splitlines()[0]
    own = tmp_path / "own.jsonl"
    words = driver_words(contract_server, own)
    assert own_driver(words) == 0
    assert check_result(own) == list(json.loads(recorded))
    theirs = tmp_path / "theirs.jsonl"
    python = contract_server.python or sys.executable
    line = [python, *contract_server.driver, *driver_words(contract_server, theirs)]
    subprocess.run(line, check=True, cwd=ROOT, capture_output=True, timeout=300)
    assert check_result(theirs) == check_result(own)


def test_what_cannot_be_written_kills_the_server(contract_server: ContractServer) -> None:
    """Last: nothing runs on this server after it."""
    running = contract_server.running
    reason = (
        r"FileNotFoundError: \[Errno 2\] No such file or directory: '.*/tests/test_a\.py::test_b-"
    )
    if contract_server.knows("profile_prefix"):
        start(contract_server, "deadly", profile_prefix="tests/test_a.py::test_b")
    else:
        start(contract_server, "deadly", output_dir=str(running.log_file / "below_a_file"))
        reason = r"NotADirectoryError: \[Errno 20\] Not a directory: '.*/below_a_file'"
    with contextlib.suppress(httpx.HTTPError):
        running.http.post(running.url + "/stop_profile", timeout=2)
    assert running.process.wait(120) == -signal.SIGKILL
    for pattern in (
        r"TP\d\] Scheduler hit an exception: Traceback \(most recent call last\):",
        reason,
        r"\] SIGQUIT received\. signum=None, frame=None\. It usually means one child failed\.",
        r"kill_process_tree called: parent_pid=\d+, include_parent=True, pid=\d+",
    ):
        assert running.lines(pattern), pattern
