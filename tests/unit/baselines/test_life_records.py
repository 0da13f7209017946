"""Records of lives from windows as results hold them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
import pytest

from pytest_sglprof._analysis.lives import LifeChange
from pytest_sglprof._baselines.figures import Figure, life_values
from pytest_sglprof._baselines.records import BaselineKey, LifeRecord
from pytest_sglprof._baselines.store import why_refused
from pytest_sglprof._config.model import ServerSpec, Threshold
from pytest_sglprof._redact import learn
from pytest_sglprof._report.lives import life_record, repeated
from pytest_sglprof._report.model import RecordedLoad, RecordedServer, RecordedWindow
from pytest_sglprof._report.results import load_document, server_document
from pytest_sglprof._server.nvml import GpuClocks
from pytest_sglprof._server.sizes import ServerSizes
from pytest_sglprof._trace.steps import CAPTURE, JIT, REBALANCE
from pytest_sglprof._verdict.judge import Judgement
from tests.support.drawn_secrets import Secrets
from tests.support.kernel_tables import build
from tests.support.lives import load as figures
from tests.support.windows import LOAD, SLOW, as_window, window

replace = msgspec.structs.replace
INFO = {"model_path": "/models/tiny", "kv_cache_dtype": "fp8_e5m2", "quantization": None}
SPEC = ServerSpec(args=("--page-size", "16", "--port", "7"))


@cache
def made_once() -> RecordedWindow:
    return as_window(window(SLOW))


def recorded(**changes: Any) -> RecordedWindow:
    return replace(made_once(), run={"GPU": "NVIDIA H200"}, **changes)


def server(**changes: Any) -> RecordedServer:
    made = server_document(
        key="default",
        kind="sglang",
        url="http://127.0.0.1:30000",
        command=["serve"],
        version="0.5.23.post1+gabcdef12",
        sizes=ServerSizes(tp=2, version="0.5.23", base_gpu_id=4),
        started=1_700_000_000.0,
        log="servers/default.1/server.log",
    )
    return replace(made, **changes)


def loads(*words: str, **changes: Any) -> dict[str, Sequence[str]]:
    made = load_document(
        LOAD, load_id="l1", nodeid="t", attempt=1, server_key="default", standin=False
    )
    document: RecordedLoad = replace(made, command=("python", "-m", "bench", *words), **changes)
    return {document.id: document.command}


def records(*windows: RecordedWindow, **changes: Any) -> list[LifeRecord]:
    fields: dict[str, Any] = {"run": "run-1", "spec": SPEC, "info": INFO, "server": server()}
    fields |= {"loads": loads("--num-prompts", "8")} | changes
    chosen = windows or (recorded(),)
    of_server, of_loads = fields.pop("server"), fields.pop("loads")
    made = [life_record(each, of_server, of_loads, **fields) for each in repeated(chosen)]
    return [record for record in made if record is not None]


def key_of(**changes: Any) -> BaselineKey:
    return records(**changes)[0].key


def test_a_record_of_a_window() -> None:
    (record,) = records(load=figures(), versions={"torch": "2.9", "nsys": ""})
    assert (record.id, record.life, record.run) == ("run-1/w1", "run-1/default.1", "run-1")
    assert record.verdict == "fail"
    assert record.failed == ("slowdown",)
    assert record.load == figures()
    key = record.key
    assert (key.gpu, key.gpus, key.model, key.quantization) == ("NVIDIA H200", 2, "tiny", "")
    assert (key.kv_dtype, key.test, key.window) == ("fp8_e5m2", recorded().nodeid, "steady")
    assert key.sizes["tp"] == 2
    assert not {"version", "base_gpu_id", "decode_log_interval"} & set(key.sizes)
    about = record.provenance
    assert (about.options, about.load) == ({"page_size": "16"}, {"num_prompts": "8"})
    assert about.versions["sglang"] == "0.5.23.post1+gabcdef12"
    assert (about.commit, about.versions["torch"], "nsys" in about.versions) == (
        "abcdef12",
        "2.9",
        False,
    )
    assert record.groups[0].strata[0].steps == 50


def test_the_key_is_of_what_is_asked_for_alone() -> None:
    """Not of versions, hosts, GPUs' numbers, ports or times; those are under test, or differ."""
    same: list[dict[str, Any]] = [
        {"server": server(version="0.6.0", url="http://10.0.0.7:1", log="servers/x.9/server.log")},
        {"server": server(sizes=server().sizes | {"base_gpu_id": 0, "version": "0.6"})},
        {"spec": ServerSpec(args=("--port", "9", "--page-size=16", "--api-key", "sk-1234567"))},
        {
            "spec": ServerSpec(
                args=SPEC.args, env=(("HF_TOKEN", "x"),), standin_args=("--slow", "2")
            )
        },
        {"info": INFO | {"random_seed": 5, "a_new_option": 1}},
        {"loads": loads("--num-prompts=8", "--base-url", "http://h:1", "--output-file", "/x")},
        {"run": "run-2"},
    ]
    for changes in same:
        assert key_of(**changes).digest == key_of().digest, changes
    other: list[dict[str, Any]] = [
        {"server": server(sizes=server().sizes | {"tp": 4})},
        {"server": server(standin=True)},
        {"spec": ServerSpec(args=("--page-size", "32"))},
        {"spec": ServerSpec(args=SPEC.args, env=(("SGLANG_FAST", "1"),))},
        {"info": INFO | {"quantization": "fp8"}},
        {"info": INFO | {"model_path": "/models/large"}},
        {"loads": loads("--num-prompts", "9")},
        {"loads": {}},
    ]
    digests = {key_of(**changes).digest for changes in other}
    assert len(digests) == len(other)
    assert key_of().digest not in digests
    nsys = records(recorded(backend="nsys"))[0].key
    gpu = records(replace(recorded(), run={"GPU": "NVIDIA B200"}))[0].key
    assert len({nsys.digest, gpu.digest, key_of().digest}) == 3


def test_a_cpu_server_has_no_gpus() -> None:
    key = key_of(server=server(sizes=server().sizes | {"device": "cpu"}))
    assert (key.gpu, key.gpus) == ("cpu", 0)


def test_a_window_that_is_not_complete_leaves_no_record() -> None:
    assert records(recorded(state="incomplete")) == []
    assert records(as_window(window(None))) == []


def test_windows_that_repeat_each_other_are_one_record() -> None:
    again = recorded(id="w2", repeat_of="w1")
    (record,) = records(recorded(), again)
    assert record.groups[0].strata[0].steps == 100
    assert [each.id for each in records(recorded(), recorded(id="w2"))] == ["run-1/w1", "run-1/w2"]


def test_an_attached_server_is_one_life_in_several_runs() -> None:
    attached = server(attached=True, log="", started=None)
    told = INFO | {"startup_time": {"load_weight": 0.0129}, "random_seed": 3}
    (first,), (second,) = (records(server=attached, info=told, run=run) for run in ("a", "b"))
    assert first.life == second.life
    (restarted,) = records(server=attached, info=told | {"random_seed": 4})
    assert restarted.life != first.life


# What must not be accepted.


def judged(metric: str, verdict: Any, change: LifeChange | None = None) -> Judgement:
    limit = Threshold(metric=metric, limit=1.05)
    return Judgement(limit, None, None, verdict, "why", change=change)


CHANGE = LifeChange(accepted=8, fresh=1, log_ratio=0.05, error=0.01, freedom=7.0, sd=0.01)


@pytest.mark.parametrize(
    ("verdict", "judgements", "failed", "refused"),
    [
        ("pass", [judged("slowdown", "pass")], (), ""),
        ("fail", [judged("regression", "fail", CHANGE)], ("regression",), "a reason only"),
        (
            "fail",
            [judged("regression", "fail", CHANGE), judged("slowdown", "fail")],
            ("regression", "slowdown"),
            "it failed by slowdown",
        ),
        ("inconclusive", [judged("slowdown", "inconclusive")], (), "inconclusive: because"),
        ("inconclusive", [judged("regression", "inconclusive", CHANGE)], (), "inconclusive"),
        ("inconclusive", [judged("regression", "inconclusive")], (), "with a reason only"),
        ("inconclusive", [judged("ttft_p99", "inconclusive")], (), "inconclusive"),
        ("inconclusive", [], (), "inconclusive"),
    ],
)
def test_verdicts(verdict: Any, judgements: Any, failed: tuple[str, ...], refused: str) -> None:
    seen = recorded(verdict=verdict, judgements=tuple(judgements), reason="because")
    (record,) = records(seen)
    assert record.failed == failed
    assert refused in why_refused(record)
    if not refused:
        assert why_refused(record) == ""


def steps_with(reasons: dict[str, int]) -> RecordedWindow:
    made = recorded(verdict="pass", judgements=())
    return replace(made, steps=replace(made.steps, reasons=reasons))


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (steps_with({JIT: 2}), "a kernel was compiled inside of the window"),
        (steps_with({CAPTURE: 0}), "a graph was captured"),
        (steps_with({REBALANCE: 1}), "a rebalance of experts"),
        (recorded(verdict="pass", partial=True), "truncated"),
        (
            recorded(
                verdict="pass", gpus=(GpuClocks("TP1", "GPU-1", 900.0, None, True, "thermal"),)
            ),
            "the GPU of TP1 was throttled (thermal)",
        ),
    ],
)
def test_what_is_kept_apart_or_disturbed_is_refused(seen: RecordedWindow, words: str) -> None:
    (record,) = records(seen)
    assert words in why_refused(record)
    assert words in why_refused(record, "with a reason")


def test_a_throttled_life_neither_passes_nor_fails() -> None:
    """Its GPU was slower, whatever its version is; so it is never one to compare."""
    gpus = (GpuClocks("TP1", "GPU-1", 900.0, None, True, "thermal"),)
    (record,) = records(recorded(verdict="pass", gpus=gpus))
    why = life_values([records(recorded(verdict="pass"))[0], record], Figure("compute"))
    expected = f"life {record.id} is kept apart: the GPU of TP1 was throttled (thermal)"
    assert why == expected


def test_why_steps_are_left_out_comes_from_the_table() -> None:
    table = build()
    hit = table.steps["step"].isin([3, 4])
    table.steps["excluded"] = hit.map({True: JIT, False: ""}).astype("category")
    seen = as_window(window(table))
    assert seen.steps.reasons == {JIT: 2}
    assert records(seen)[0].apart == "a kernel was compiled inside of the window"


@pytest.mark.usefixtures("secrets_end_here")
def test_no_secret_gets_into_a_record() -> None:
    """Twelve of them, in every place that a record is made of."""
    drawn = Secrets()
    word = {name: drawn.draw(name) for name in map(str, range(12))}
    learn(word[each] for each in ("2", "5", "8"))  # as declared ones are
    args = ("--api-key", word["0"], f"--admin-api-key={word['1']}", "--json-config", word["2"])
    env = (("HF_TOKEN", word["3"]), ("DB_PASSWORD", word["4"]), ("SGLANG_X", word["5"]))
    info = INFO | {"api_key": word["6"], "launch_command": f"--api-key '{word['7'][:12]}'"}
    info |= {"kv_cache_dtype": word["8"]}
    command = ["--api-key", word["9"], "--auth-token", word["10"], "--seed", "1"]
    url = f"http://user:{word['11'][:12]}@10.0.0.1:3"
    for is_attached in (True, False):
        made = records(
            spec=ServerSpec(args=args, env=env),
            info=info,
            loads=loads(*command),
            server=server(attached=is_attached, url=url),
        )
        text = json.dumps(msgspec.to_builtins(made[0])).encode()
        assert drawn.among(text) == set()
