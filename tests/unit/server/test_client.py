from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from pytest_sglprof._errors import ServerRefused, ServerSilent, ServerUnreachable
from pytest_sglprof._redact import HIDDEN
from pytest_sglprof._server.client import DpLoad, SglangClient, is_local_url, read_loads


class Answers:
    """A transport that answers by path and remembers what it was asked."""

    def __init__(self, **by_path: object) -> None:
        self.by_path = {f"/{path.replace('__', '/')}": answer for path, answer in by_path.items()}
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.by_path.get(request.url.path, httpx.Response(404))
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, httpx.Response)
        return httpx.Response(answer.status_code, content=answer.content)

    @property
    def paths(self) -> list[str]:
        return [request.url.path for request in self.asked]


@pytest.fixture
def connect() -> Iterator[object]:
    made: list[SglangClient] = []

    def make(answers: Answers, **options: str) -> SglangClient:
        client = SglangClient("http://127.0.0.1:1/", **options)
        client._http.close()
        client._http = httpx.Client(
            base_url=client.url, transport=httpx.MockTransport(answers), timeout=5
        )
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def test_ready_is_asked_first_and_health_only_where_it_is_unknown(connect):
    answers = Answers(ready=httpx.Response(200), health=httpx.Response(503))
    assert connect(answers).is_ready()
    assert answers.paths == ["/ready"]
    old = Answers(health=httpx.Response(200))
    assert connect(old).is_ready()
    assert old.paths == ["/ready", "/health"]
    assert not connect(Answers(ready=httpx.Response(503))).is_ready()
    assert not connect(Answers(ready=httpx.ConnectError("refused"))).is_ready()


def test_server_info_falls_back_and_hides_keys(connect):
    info = {"tp_size": 2, "api_key": "sk-secret", "internal_states": [{"admin_api_key": "adm"}]}
    answers = Answers(get_server_info=httpx.Response(200, json=info))
    found = connect(answers, api_key="sk-secret").server_info()
    assert answers.paths == ["/server_info", "/get_server_info"]
    assert found["tp_size"] == 2
    assert found["api_key"] == HIDDEN
    assert found["internal_states"][0]["admin_api_key"] == HIDDEN


def test_something_else_at_the_address_is_told_so(connect):
    client = connect(Answers(server_info=httpx.Response(200, text="<html>")))
    with pytest.raises(ServerRefused, match="did not answer with a JSON object"):
        client.server_info()


def test_401_names_the_setting(connect):
    client = connect(Answers(server_info=httpx.Response(401), start_profile=httpx.Response(401)))
    with pytest.raises(ServerRefused) as refused:
        client.server_info()
    assert refused.value.status == 401
    assert "api_key_env" in refused.value.hint
    with pytest.raises(ServerRefused) as refused:
        client.start_profile({}, 5)
    assert "admin_api_key_env" in refused.value.hint


def test_profile_endpoints_get_the_admin_key_and_others_the_api_key(connect):
    answers = Answers(
        start_profile=httpx.Response(200),
        flush_cache=httpx.Response(200),
        v1__loads=httpx.Response(200, json={"loads": [{"dp_rank": 0, "num_running_reqs": 3}]}),
    )
    client = connect(answers, api_key="user", admin_key="admin")
    client.start_profile({"num_steps": 5}, 5)
    assert client.flush_cache()
    assert client.loads() == [DpLoad(dp_rank=0, running=3)]
    keys = [request.headers["Authorization"] for request in answers.asked]
    assert keys == ["Bearer admin", "Bearer admin", "Bearer user"]
    assert answers.asked[0].content == b'{"num_steps":5}'


def test_no_key_sends_no_header(connect):
    answers = Answers(v1__loads=httpx.Response(200, json={"loads": []}))
    assert connect(answers).loads() == []
    assert "Authorization" not in answers.asked[0].headers


def test_stop_tells_whether_anything_was_running(connect):
    assert connect(Answers(stop_profile=httpx.Response(200))).stop_profile(5)
    assert not connect(Answers(stop_profile=httpx.Response(500))).stop_profile(5)


def test_stop_falls_back_to_end_profile_once_a_session(connect):
    answers = Answers(end_profile=httpx.Response(200))
    client = connect(answers)
    assert client.stop_profile(5)
    assert client.stop_profile(5)
    assert answers.paths == ["/stop_profile", "/end_profile", "/end_profile"]


def test_a_server_without_either_is_refused(connect):
    with pytest.raises(ServerRefused, match="neither /stop_profile nor /end_profile"):
        connect(Answers()).stop_profile(5)


def test_a_busy_server_does_not_flush(connect):
    assert not connect(Answers(flush_cache=httpx.Response(400))).flush_cache()


def test_an_error_body_is_shown_without_the_key(connect):
    answers = Answers(start_profile=httpx.Response(400, text="bad key sk-12345 given"))
    with pytest.raises(ServerRefused) as refused:
        connect(answers, api_key="sk-12345").start_profile({}, 5)
    assert "sk-12345" not in str(refused.value)
    assert "bad key" in refused.value.what


def test_silence_and_absence_are_different_errors(connect):
    silent = connect(Answers(stop_profile=httpx.ReadTimeout("slow")))
    with pytest.raises(ServerSilent, match=r"did not answer within 3 s"):
        silent.stop_profile(3)
    absent = connect(Answers(stop_profile=httpx.ConnectError("refused")))
    with pytest.raises(ServerUnreachable) as error:
        absent.stop_profile(3)
    assert not isinstance(error.value, ServerSilent)


def test_a_closed_port_is_unreachable_and_not_ready():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        client = SglangClient(url)
        assert not client.is_ready()
        with pytest.raises(ServerUnreachable):
            client.loads()
        client.close()


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:30000", True),
        ("http://[::1]:30000", True),
        ("http://gpu7:30000", False),
    ],
)
def test_local_addresses_use_no_proxy(url, local):
    assert is_local_url(url) is local


def test_a_401_at_ready_asks_health_unless_the_key_is_wrong(connect):
    ok, denied = httpx.Response(200), httpx.Response(401)
    answers = Answers(ready=denied, health=ok, v1__models=ok)
    assert connect(answers, api_key="right").is_ready()
    assert answers.paths == ["/ready", "/v1/models", "/health"]
    starting = Answers(ready=denied, health=httpx.Response(503))
    assert not connect(starting, api_key="right").is_ready()
    wrong = Answers(ready=denied, health=ok, v1__models=denied)
    with pytest.raises(ServerRefused, match="requires a key"):
        connect(wrong, api_key="wrong").is_ready()


OLD_LIST = [
    {"dp_rank": 0, "num_reqs": 12, "num_waiting_reqs": 4, "num_tokens": 90, "ts_tic": 1.5},
    {"dp_rank": 1, "num_reqs": 3, "num_waiting_reqs": 0, "num_tokens": 7},
]


def test_the_load_comes_from_the_older_endpoint_from_then_on(connect):
    answers = Answers(get_load=httpx.Response(200, json=OLD_LIST))
    client = connect(answers)
    expected = [DpLoad(0, 8, 4, 90), DpLoad(1, 3, 0, 7)]
    assert client.loads() == client.loads() == expected
    assert answers.paths == ["/v1/loads", "/get_load", "/get_load"]


def test_without_an_endpoint_both_are_named_and_asked_again(connect):
    answers = Answers()
    client = connect(answers)
    for _ in range(2):
        with pytest.raises(ServerRefused, match="/v1/loads and /get_load answered 404") as refused:
            client.loads()
        assert refused.value.status == 404
    assert answers.paths == ["/v1/loads", "/get_load"] * 2


@pytest.mark.parametrize(
    ("answer", "loads"),
    [
        ({"load": 5}, [DpLoad(0, 5)]),
        ({"dp_rank": None, "num_reqs": 5, "num_waiting_reqs": 1}, [DpLoad(0, 4, 1)]),
        ({"loads": []}, []),
        (
            {"loads": [{"dp_rank": 1, "num_running_reqs": 0, "disaggregation": {
                "mode": "prefill", "prefill_prealloc_queue_reqs": 3,
                "prefill_inflight_queue_reqs": 2}}]},
            [DpLoad(1, 0, 5)],
        ),
        (
            {"loads": [{"dp_rank": 1, "num_running_reqs": 0, "num_waiting_reqs": 4,
                "disaggregation": {"prefill_bootstrap_queue_reqs": 3,
                "prefill_inflight_queue_reqs": 2}}]},
            [DpLoad(1, 0, 6)],
        ),
        (
            {"loads": [{"num_running_reqs": 1, "num_waiting_reqs": 9, "disaggregation": {
                "decode_prealloc_queue_reqs": 4, "decode_transfer_queue_reqs": 5}}]},
            [DpLoad(0, 1, 9)],
        ),
        (
            {"loads": [{"num_running_reqs": 2, "token_usage": float("nan"),
                "gen_throughput": -1}]},
            [DpLoad(0, 2)],
        ),
    ],
)  # fmt: skip
def test_the_loads_of_all_versions_are_read(answer, loads):
    assert read_loads(answer) == loads


@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        "busy",
        [[1]],
        {},
        {"loads": {"a": 1}},
        {"loads": [None]},
        {"loads": [{"dp_rank": 0}]},
        {"loads": [{"num_running_reqs": float("nan")}]},
        {"loads": [{"num_running_reqs": float("inf")}]},
        {"loads": [{"num_running_reqs": -3}]},
        {"loads": [{"num_running_reqs": [4]}]},
        {"loads": [{"num_running_reqs": True}]},
        {"loads": [{"num_running_reqs": 1, "disaggregation": [1]}]},
        {"loads": [{"num_running_reqs": 1, "token_usage": [1]}]},
        {"load": "many"},
    ],
)
def test_a_malformed_load_is_an_error_of_ours(connect, answer):
    content = httpx.Response(200, content=json.dumps(answer).encode())
    with pytest.raises(ServerRefused, match="did not answer with its load"):
        connect(Answers(v1__loads=content)).loads()


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ([1], "a JSON object"),
        ({"tp_size": -2}, "tp_size is -2"),
        ({"tp_size": [2]}, "tp_size is"),
        ({"server_args": [2]}, "server_args is a list"),
        ({"server_args": {"tp_size": 0}}, "tp_size is 0"),
    ],
)
def test_malformed_settings_are_an_error_of_ours(connect, info, reason):
    with pytest.raises(ServerRefused, match=f"get_server_info did not answer with .*{reason}"):
        connect(Answers(get_server_info=httpx.Response(200, json=info))).server_info()


def test_nested_settings_are_flat(connect):
    nested = httpx.Response(200, json={"server_args": {"tp_size": 4, "api_key": "k"}, "a": 1})
    info = connect(Answers(server_info=nested)).server_info()
    assert info == {"tp_size": 4, "api_key": HIDDEN, "a": 1}
