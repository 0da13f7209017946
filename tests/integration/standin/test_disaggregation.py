"""A prefill and a decode stand-in; the test plays the router between them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.running import standin

ROOM = {"bootstrap_host": "127.0.0.1", "bootstrap_room": 7}
LIMIT = {"sampling_params": {"max_new_tokens": 5}, "text": "one two three"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory, unused_tcp_port_of_module):
    port = str(unused_tcp_port_of_module)
    prefill, decode = tmp_path_factory.mktemp("prefill"), tmp_path_factory.mktemp("decode")
    of_port = ("--disaggregation-bootstrap-port", port)
    with (
        standin(prefill, "--disaggregation-mode", "prefill", *of_port) as first,
        standin(decode, "--disaggregation-mode", "decode", "--decode-log-interval", "1") as second,
    ):
        yield first, second, int(port)


@pytest.fixture(scope="module")
def unused_tcp_port_of_module():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_request_is_decoded_once_its_prompt_has_run_on_the_other_server(pair):
    prefill, decode, port = pair
    body = {**LIMIT, **ROOM, "bootstrap_port": port}
    of_warm_up = decode.lines("Decode batch")
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(decode.post, "/generate", body)
        time.sleep(0.5)
        assert not waiting.done() and decode.lines("Decode batch") == of_warm_up
        first = prefill.post("/generate", body).json()
        assert waiting.result().json()["meta_info"]["completion_tokens"] == 5
    assert first["meta_info"]["completion_tokens"] == 1
    assert prefill.lines("Prefill batch") and not prefill.lines("Decode batch")
    assert len(decode.lines("Decode batch")) == len(of_warm_up) + 5
    assert not decode.lines("Prefill batch")


def test_they_say_their_role_and_refuse_what_no_router_has_sent(pair):
    for server, role in zip(pair, ("prefill", "decode"), strict=False):
        assert server.get("/server_info").json()["disaggregation_mode"] == role
        assert server.get("/v1/loads").json()["loads"][0]["disaggregation"]["mode"] == role
        answer = server.post("/generate", LIMIT)
        assert answer.status_code == 400 and "without bootstrap room id" in answer.text


def test_a_batch_has_a_room_for_each_request(pair):
    prefill, decode, port = pair
    both = {"bootstrap_host": ["127.0.0.1"] * 2, "bootstrap_port": [port] * 2}
    body = {**LIMIT, "text": ["one two", "three four"], **both, "bootstrap_room": [8, 9]}
    with ThreadPoolExecutor(1) as beside:
        prompts = beside.submit(prefill.post, "/generate", body)
        answers = decode.post("/generate", body).json()
        assert [each["meta_info"]["completion_tokens"] for each in answers] == [5, 5]
        assert prompts.result().status_code == 200


def test_a_prefill_server_that_is_gone_fails_the_request(pair):
    _, decode, _ = pair
    answer = decode.post("/generate", {**LIMIT, **ROOM, "bootstrap_port": 1})
    assert answer.status_code == 500
    assert decode.lines("Decode handshake failed")
