"""`sglprof watch` on logs after public reports: older servers, roles, wrappers, formats."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_sglprof._cli.main import main

ONSET, NONE, UNKNOWN = 1, 0, 3
UNEVEN = "DP0 has 40 running requests, 1.82x the mean of 22 over 2 ranks"
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("L01_pd_prefill_old", ONSET, ["DP0 has 60 waiting requests, 1.94x the mean of 31"]),
        ("L02_pd_prefill_053", ONSET, ["DP0 has 60 waiting requests, 1.94x the mean of 31"]),
        ("L03_v044", ONSET, [UNEVEN]),
        ("L04_logging_config", UNKNOWN, ["in a format of your own", "SGLANG_LOGGING_CONFIG_PATH"]),
        ("L05_docker_json", ONSET, [UNEVEN]),
        ("L06_k8s_colour", ONSET, [UNEVEN]),
        ("L06b_k8s_ts", ONSET, [UNEVEN]),
        ("L07_unknown_tag", ONSET, [UNEVEN]),
        (
            "L09_compose_two_servers",
            NONE,
            ["2 servers, each judged alone: decode-a-1, decode-b-1", "decode-b-1 DP1     24"],
        ),
        ("L10_srun_label", ONSET, [UNEVEN]),
        ("L11_vllm", UNKNOWN, ["holds no Prefill or Decode line"]),
        ("L12_hybrid", ONSET, [UNEVEN]),
        ("L13_numbers", ONSET, [UNEVEN]),
        ("L18_request_text", NONE, ["DP0      24            20.0", "λ at most 1.00"]),
        ("L19_second_node", NONE, ["DP0 to DP3 are not in this log", "balanced for 24 s"]),
        ("L20_pp_tp", UNKNOWN, ["cannot be known here"]),
        ("L21_plain_dp_router", ONSET, [UNEVEN]),
        ("L23_pd_decode_old", ONSET, [UNEVEN]),
    ],
)
def test_logs_after_public_reports(
    shared_data: Path, name: str, status: int, words: list[str], capsys: Capture
) -> None:
    path = shared_data.parent / "cases" / "server" / f"{name}.log"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the real data")
    assert main(["watch", "--check", str(path)]) == status
    shown = "".join(capsys.readouterr())
    assert [word for word in words if word not in shown] == []
    assert ("onset" in shown.replace("no onset", "")) == (status == ONSET)


# Inputs of our own. A log is 24 s of lines, one a rank and second.

SECONDS = 24
FIGURES = "#token: 70, token usage: 0.10, cuda graph: True, gen throughput (token/s): 12.00"
Wrap = Callable[[str, str, str], str]  # of stamp, tags and message


def clock(second: int) -> str:
    return f"2026-11-24 03:13:{second:02d}"


def sglang(stamp: str, tags: str, text: str) -> str:
    return f"[{stamp}{tags}] {text}"


def decode(running: int, waiting: int = 0) -> str:
    return f"Decode batch, #running-req: {running}, {FIGURES}, #queue-req: {waiting}"


def log(
    path: Path,
    loads: dict[str, int],
    wrap: Wrap = sglang,
    *,
    text: Callable[[int], str] = decode,
    first: str = "",
) -> str:
    """loads: what `text` says for each rank, by its tags (" DP0 TP0")."""
    rows = [first] if first else []
    for second in range(SECONDS):
        rows += [wrap(clock(second), tags, text(load)) for tags, load in loads.items()]
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


def shown_by(capsys: Capture, *words: str) -> tuple[int, str]:
    status = main(["watch", "--check", *words])
    return status, "".join(capsys.readouterr())


TWO = {" DP0 TP0": 40, " DP1 TP1": 4}


def as_json(**fields: object) -> str:
    return json.dumps(fields)


WRAPPERS: dict[str, Wrap] = {
    "compose": lambda at, tags, text: f"sglang-1  | [{at}{tags}] {text}",
    "compose-v1 with colours": lambda at, tags, text: (
        f"\x1b[36mserver_1 |\x1b[0m [{at}{tags}] {text}"
    ),
    "kubectl --prefix": lambda at, tags, text: f"[pod/decode-0/sglang] [{at}{tags}] {text}",
    "kubectl --prefix --timestamps": lambda at, tags, text: (
        f"[pod/decode-0/sglang] {at.replace(' ', 'T')}.000000001Z [{at}{tags}] {text}"
    ),
    "stern": lambda at, tags, text: f"decode-0 sglang [{at}{tags}] {text}",
    "containerd": lambda at, tags, text: (
        f"{at.replace(' ', 'T')}.5+00:00 stderr F [{at}{tags}] {text}"
    ),
    "ray actor": lambda at, tags, text: f"(SGLangEngine pid=501, ip=10.0.0.1) [{at}{tags}] {text}",
    "ray actor of a rank": lambda at, tags, text: (
        f"\x1b[36m(Rollout(rank=0) pid=501)\x1b[0m [{at}{tags}] {text} [repeated 2x across cluster]"
    ),
    "journald": lambda at, tags, text: f"Nov 24 03:13:51 gpu-7 sglang[4711]: [{at}{tags}] {text}",
    "mpirun": lambda at, tags, text: f"[1,0]<stderr>:[{at}{tags}] {text}",
    "pdsh": lambda at, tags, text: f"node07: [{at}{tags}] {text}",
    "fluent-bit": lambda at, tags, text: as_json(
        stream="stderr", kubernetes={"pod_name": "decode-0"}, log=f"[{at}{tags}] {text}\n"
    ),
    "compose around docker json": lambda at, tags, text: (
        "decode-1 | " + as_json(log=f"\x1b[32m[{at}{tags}]\x1b[0m {text}\n", time=f"{at}Z")
    ),
    "tags of a plugin": lambda at, tags, text: f"[{at}{tags} SP0 worker=3] {text}",
}
FORMATS: dict[str, Wrap] = {
    "iso with a zone": lambda at, tags, text: f"[{at.replace(' ', 'T')}+02:00{tags}] {text}",
    "iso, milliseconds, utc": lambda at, tags, text: f"[{at.replace(' ', 'T')}.250Z{tags}] {text}",
    "level and module": lambda at, tags, text: f"[{at}{tags}] [INFO] [scheduler.py:900] {text}",
    "level first": lambda at, tags, text: f"INFO [{at}{tags}] sglang.srt.managers: {text}",
    "loguru": lambda at, tags, text: (
        f"{at}.250 | INFO     | sglang.srt.scheduler:log_stats:900 -{tags} - {text}"
    ),
    "tags in brackets of their own": lambda at, tags, text: f"{at},250 [{tags[1:]}] INFO {text}",
    "json formatter": lambda at, tags, text: as_json(
        asctime=f"{at},250", levelname="INFO", message=f"{tags[1:]} {text}"
    ),
}


@pytest.mark.parametrize("name", [*WRAPPERS, *FORMATS])
def test_wrapped_and_formatted_logs_are_read(tmp_path: Path, name: str, capsys: Capture) -> None:
    path = log(tmp_path / "server.log", TWO, {**WRAPPERS, **FORMATS}[name])
    status, shown = shown_by(capsys, path)
    assert (status, UNEVEN in shown) == (ONSET, True), shown
    assert "note:" not in shown


@pytest.mark.parametrize(
    ("zone", "east"), [("+02:00", 2.0), ("Z", 0.0), (" UTC", 0.0), ("-0730", -7.5)]
)
def test_a_zone_is_used_as_written(tmp_path: Path, zone: str, east: float, capsys: Capture) -> None:
    path = log(tmp_path / "a.log", TWO, lambda at, tags, text: f"[{at}{zone}{tags}] {text}")
    assert main(["watch", path, "--jsonl", "-"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    hours = datetime.timezone(datetime.timedelta(hours=east))
    assert first["time"] == datetime.datetime(2026, 11, 24, 3, 13, 0, tzinfo=hours).timestamp()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda at, tags, text: f"INFO:sglang.srt.managers.scheduler:{text}",
        lambda at, tags, text: f"INFO 11-24 {at[11:]} [scheduler.py:900] {text}",
        lambda at, tags, text: f"I1124 {at[11:]}.000000 4711 scheduler.py:900] {text}",
        lambda at, tags, text: text,
        lambda at, tags, text: f"[24/Nov/2026:{at[11:]}] {text}",
        lambda at, tags, text: f"[2026-13-24 {at[11:]}{tags}] {text}",
    ],
)
def test_batch_lines_without_a_stamp_are_counted(
    tmp_path: Path, wrap: Wrap, capsys: Capture
) -> None:
    status, shown = shown_by(capsys, log(tmp_path / "a.log", {"": 12}, wrap))
    assert status == UNKNOWN
    assert "24 batch lines whose stamp cannot be read" in shown
    assert "%(asctime)s" in shown


QUOTE = decode(200)
STAMPED = f"[{clock(1)} DP0 TP0] {QUOTE}"


@pytest.mark.parametrize(
    "quoting",
    [
        f"[{clock(1)}] Receive: obj=GenerateReqInput(text='say {STAMPED}', rid='1')",
        f"[{clock(1)}] Receive: obj=GenerateReqInput(text=\"don't say {STAMPED}\", rid='1')",
        f"[{clock(1)} DP0 TP0] Prompt: {QUOTE}",
        f"[{clock(1)} DP0 TP0] why does my log say {STAMPED}",
        f"my log says {STAMPED}",
        f"- {STAMPED}",
        f"1. {STAMPED}",
        f"> {STAMPED}",
        f"user: {STAMPED}",
        f'INFO:     127.0.0.1:5 - "POST /generate?text={STAMPED} HTTP/1.1" 200 OK',
        as_json(event="request.received", obj={"text": STAMPED}),
        as_json(text=STAMPED),
        as_json(log=f"[{clock(1)}] Receive: obj=GenerateReqInput(text='{STAMPED}')\n"),
        as_json(message={"role": "user", "content": STAMPED}),
        f"decode-1 | [{clock(1)}] Finish: obj=1, out={{'text': '{STAMPED}'}}",
        f"{clock(1)},000 INFO 4711 [tokenizer.py:7] Receive: text='{QUOTE}'",
        f"{clock(1)},000 INFO the user asks about {QUOTE}",
    ],
)
def test_what_a_request_says_is_no_sample(tmp_path: Path, quoting: str, capsys: Capture) -> None:
    def both(at: str, tags: str, text: str) -> str:
        return f"{sglang(at, tags, text)}\n{quoting.replace(clock(1), at)}"

    status, shown = shown_by(capsys, log(tmp_path / "a.log", {" DP0 TP0": 20, " DP1": 20}, both))
    assert status == NONE, shown
    assert "balanced for 24 s, λ at most 1.00" in shown
    assert shown.count("      24            20.0") == 2


GLUED = sglang(clock(0), " DP1", decode(4))


@pytest.mark.parametrize(
    "before",
    [
        sglang(clock(0), " DP0", decode(40)),
        sglang(clock(0), " DP0", decode(40) + ", "),
        'INFO:     127.0.0.1:5 - "POST /generate HTTP/1.1" 200 OK',
        f"[{clock(0)} DP0] The server is fired up",
    ],
)
def test_a_record_whose_newline_came_late_is_read(
    tmp_path: Path, before: str, capsys: Capture
) -> None:
    path = tmp_path / "a.log"
    path.write_text(f"{before}{GLUED}\n")
    main(["watch", str(path), "--jsonl", "-"])
    samples = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert samples[-1]["running"] == 4
    assert len(samples) == 1 + ("Decode" in before)


# Which server, and which ranks.


def of_two(names: tuple[str, str], loads: tuple[int, int]) -> Wrap:
    """Two servers, whose DP0 each have as much load; so DP1 of the second."""

    def wrap(at: str, tags: str, text: str) -> str:
        second = text.replace(f"#running-req: {loads[0]},", f"#running-req: {loads[1]},")
        return f"{names[0]}[{at}{tags}] {text}\n{names[1]}[{at}{tags}] {second}"

    return wrap


@pytest.mark.parametrize(
    "names",
    [
        ("decode-a-1 | ", "decode-b-1 | "),
        ("[pod/decode-0/sglang] ", "[pod/decode-1/sglang] "),
        ("decode-0 sglang ", "decode-1 sglang "),
        ("(SGLangEngine pid=501) ", "(SGLangEngine pid=502) "),
        ("", "decode-b-1 | "),
    ],
)
def test_servers_in_one_log_are_judged_alone(
    tmp_path: Path, names: tuple[str, str], capsys: Capture
) -> None:
    loads = {" DP0 TP0": 40, " DP1 TP1": 40}
    path = log(tmp_path / "a.log", loads, of_two(names, (40, 10)))
    status, shown = shown_by(capsys, path)
    assert status == NONE, shown
    assert "note: 2 servers, each judged alone: " in shown
    assert "λ at most 1.00" in shown
    path = log(tmp_path / "b.log", {" DP0 TP0": 34, " DP1 TP1": 10}, of_two(names, (34, 10)))
    status, shown = shown_by(capsys, path)
    (onset,) = (row for row in shown.splitlines() if row.startswith("onset"))
    assert status == ONSET
    name = names[0].strip(" |()[]") or "(no prefix)"
    assert f"{name}: DP0 has 34 running requests, 1.55x the mean of 22 over 2 ranks" in onset


@pytest.mark.parametrize(
    "labels", [(" 0: ", " 1: "), ("node1: ", "node2: "), ("(A pid=1) ", "(A pid=2) ")]
)
def test_prefixes_of_one_servers_ranks_are_one_server(
    tmp_path: Path, labels: tuple[str, str], capsys: Capture
) -> None:
    def wrap(at: str, tags: str, text: str) -> str:
        return f"{labels['DP1' in tags]}[{at}{tags}] {text}"

    status, shown = shown_by(capsys, log(tmp_path / "a.log", TWO, wrap))
    assert (status, UNEVEN in shown, "servers" in shown) == (ONSET, True, False), shown


def arguments(**sizes: int) -> str:
    return f"[{clock(0)}] server_args={ {'model_path': 'x', **sizes} }"


def test_the_arguments_in_a_log_say_which_ranks_it_holds(tmp_path: Path, capsys: Capture) -> None:
    even = {" DP5": 40, " DP6": 40, " DP7": 40}
    sizes = {"dp_size": 8, "nnodes": 2}
    second = arguments(**sizes, node_rank=1)
    status, shown = shown_by(capsys, log(tmp_path / "a.log", even, first=second))
    assert status == ONSET  # DP4 is this node's, and never had a request
    assert "DP4 is starved while the others run 40.0 requests each" in shown
    assert "DP0 to DP3 are not in this log" in shown
    status, shown = shown_by(capsys, log(tmp_path / "b.log", even))
    assert status == NONE
    assert "DP0 to DP4 are not in this log" in shown
    old = f"[{clock(0)}] server_args=ServerArgs(model_path='x', dp_size=2, nnodes=1, node_rank=0)"
    status, shown = shown_by(capsys, log(tmp_path / "c.log", {" DP1 TP1": 40}, first=old))
    assert status == ONSET
    assert "DP0 is starved" in shown


def test_the_logs_of_all_nodes_in_one_file_are_one_server(tmp_path: Path, capsys: Capture) -> None:
    for node, running in ((0, 40), (1, 4)):
        loads = {f" DP{2 * node}": running, f" DP{2 * node + 1}": running}
        first = arguments(dp_size=2, attn_dp_size=2, nnodes=2, node_rank=node)
        log(tmp_path / f"{node}.log", loads, first=first)
    status, shown = shown_by(capsys, str(tmp_path / "0.log"))
    assert status == NONE
    assert "DP2 to DP3 are not in this log" in shown
    both = tmp_path / "both.log"
    both.write_text((tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text())
    status, shown = shown_by(capsys, str(both))
    assert (status, "over 4 ranks" in shown, "not in this log" in shown) == (ONSET, True, False)


def test_one_rank_of_another_node_is_nothing_to_compare(tmp_path: Path, capsys: Capture) -> None:
    status, shown = shown_by(capsys, log(tmp_path / "a.log", {" DP3 TP3": 40}))
    assert status == UNKNOWN
    assert "holds the load of one DP rank" in shown
    assert "DP0 to DP2 are not in this log" in shown
    assert "cat LOG LOG" in shown


# Roles: the load of a server that only prefills is its queues.

PREFILL = "#new-seq: 1, #new-token: 512, #cached-token: 0, token usage: 0.01"
ROLES: dict[str, Callable[[int], str]] = {
    "up to 0.5.2": lambda n: (
        f"Prefill batch. {PREFILL}, #unbootstrapped-req: {n}, #queue-req: 0, "
        "#transferring-req: 0, input throughput (token/s): 1.00 "
    ),
    "up to 0.5.9": lambda n: (
        f"Prefill batch, {PREFILL}, #running-req: 0, #queue-req: 0, "
        f"#prealloc-req: {n}, #inflight-req: 0, input throughput (token/s): 1.00, cuda graph: False"
    ),
    "newest": lambda n: (
        f"Prefill batch [7], {PREFILL}, #running-req: 0, #queue-req: 0, "
        f"#pending-token: 9, #bootstrap-req: {n}, #inflight-req: 0, #optimistic-req: 0, "
        "cuda graph: False, input throughput (token/s): 1.00"
    ),
    "embedding": lambda n: (
        f"Prefill batch, {PREFILL}, #running-req: 0, #queue-req: {n}, "
        "cuda graph: False, input throughput (token/s): 1.00"
    ),
    "decode with pre-allocation": lambda n: (
        f"Decode batch, #running-req: 0, {FIGURES}, "
        f"pre-allocated usage: 0.10, #prealloc-req: {n // 2}, #transfer-req: {n - n // 2}, "
        "#retracted-req: 0, #queue-req: 0"
    ),
}


@pytest.mark.parametrize("role", ROLES)
def test_queues_are_load_also_with_nothing_running(
    tmp_path: Path, role: str, capsys: Capture
) -> None:
    path = log(tmp_path / "a.log", {" DP0": 30, " DP1": 2}, text=ROLES[role])
    status, shown = shown_by(capsys, path)
    assert (status, "DP0 has 30 waiting requests, 1.88x" in shown) == (ONSET, True), shown
    path = log(tmp_path / "b.log", {" DP0": 30, " DP1": 30}, text=ROLES[role])
    status, shown = shown_by(capsys, path)
    assert (status, "balanced for 24 s, λ at most 1.00" in shown) == (NONE, True), shown
    status, shown = shown_by(
        capsys, log(tmp_path / "c.log", {" DP0": 5, " DP1": 0}, text=ROLES[role])
    )
    assert (status, "--min-running" in shown) == (UNKNOWN, True), shown


def test_requests_whose_cache_is_being_sent_are_load(tmp_path: Path, capsys: Capture) -> None:
    def sending(count: int) -> str:
        return f"Prefill batch, {PREFILL}, #running-req: 0, #queue-req: 0, #inflight-req: {count}"

    status, shown = shown_by(capsys, log(tmp_path / "a.log", {" DP0": 39, " DP1": 3}, text=sending))
    assert status == ONSET
    assert "DP0 has 40 running requests, 1.82x the mean of 22" in shown


def test_servers_in_a_log_that_grows_are_judged_alone(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.log"
    now = time.time()
    rows = []
    for second in range(-8, 1):
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now + second))
        for name, running in (("a-1", 40), ("b-1", 10)):
            for rank in (0, 1):
                rows.append(f"{name} | {sglang(at, f' DP{rank}', decode(running))}\n")
    path.write_text("".join(rows))
    status, shown = shown_by(capsys, str(path), "--follow", "--for", "1", "--jsonl", "-")
    assert status != ONSET, shown
    assert '"server": "b-1"' in shown
