"""Safe names, files that are never half, ranks, hidden keys, and the state of a load."""

from __future__ import annotations

import threading
import time

import pytest

from pytest_sglprof._files import atomic_write, atomic_writer, safe_name
from pytest_sglprof._plugin.xdist import plain_nodeid
from pytest_sglprof._ranks import Rank
from pytest_sglprof._redact import HIDDEN, is_secret_env, learn, redact, redact_command, redact_text
from pytest_sglprof._run.opening import LoadState

# ---- names -----------------------------------------------------------------------------------


def test_a_safe_name_stays_itself():
    assert safe_name("run-1_a.b=c,d+e@f") == "run-1_a.b=c,d+e@f"


@pytest.mark.parametrize(
    "text", ["a/b", "test_x.py::test[1]", "../..", "", ".", "ü", "a" * 500, " a", "a\0b", "a\nb"]
)
def test_any_text_becomes_a_name_that_a_file_may_have(text, tmp_path):
    name = safe_name(text)
    assert "/" not in name
    assert name not in ("", ".", "..")
    assert len(name.encode()) <= 120
    (tmp_path / name).touch()


def test_different_texts_never_share_a_name():
    texts = ["a/b", "a:b", "a b", "a_b", "x" * 130, "x" * 131, "./a_b"]
    assert len({safe_name(text) for text in texts}) == len(texts)


def test_a_write_that_fails_leaves_the_old_file_and_no_half_one(tmp_path):
    path = tmp_path / "results.json"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError), atomic_writer(path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("1759-TP-0.trace.json.gz", "TP0"),
        ("1759-TP-1-DP-0-PP-2-EP-3.trace.json.gz", "DP0 PP2 TP1 EP3"),
        ("1759-TP-1-DECODE.trace.json.gz", "TP1"),
        ("1759-TP-1-EXTEND.trace.json", "TP1"),
        ("TP-3-1759-TP-1.trace.json.gz", "TP1"),
        ("TP-3-TP-1-DP-2.trace.json.gz", "DP2 TP1"),
        ("DP-7-1759-TP-1.trace.json.gz", "TP1"),
        ("TP-3-1759.trace.json.gz", None),
        ("merged-1759.trace.json.gz", None),
        ("1759-TP-1.txt", None),
        ("1759-DP-1.trace.json.gz", None),
    ],
)
def test_the_rank_in_a_file_name_is_read_from_the_right(name, label):
    rank = Rank.from_file_name(name)
    assert (rank.label if rank else None) == label


@pytest.mark.parametrize(
    ("title", "label"),
    [
        ("sglang::scheduler", "TP0"),
        ("sglang::scheduler_TP1", "TP1"),
        ("sglang::scheduler_DP0_PP1_TP2_EP3", "DP0 PP1 TP2 EP3"),
        ("sglang::scheduler_DP0_ATTN_CP1_MOE_DP2_TP3", "DP0 ATTN_CP1 MOE_DP2 TP3"),
        ("sglang::detokenizer", None),
        ("python -m sglang", None),
    ],
)
def test_the_rank_in_a_process_title(title, label):
    rank = Rank.from_process_title(title)
    assert (rank.label if rank else None) == label


@pytest.mark.parametrize("label", ["TP0", "DP0 TP1", "DP1 PP0 ATTN_CP2 MOE_DP1 TP3 EP2", "GPU7"])
def test_labels_can_be_read_back(label):
    assert Rank.parse(label).label == label


def test_labels_that_are_none():
    assert Rank.parse("") is None
    assert Rank.parse("TP") is None
    assert Rank.parse("TP0 of 2") is None


def test_ranks_sort_as_numbers_and_match_without_sizes_of_one():
    ranks = [Rank(tp=10), Rank(tp=9), Rank(dp=1, tp=0)]
    assert [r.label for r in sorted(ranks, key=lambda r: r.sort_key)] == ["TP9", "TP10", "DP1 TP0"]
    assert Rank(tp=1).matches(Rank(dp=0, pp=0, tp=1))
    assert not Rank(tp=1).matches(Rank(dp=1, tp=1))


# ---- keys ------------------------------------------------------------------------------------


def test_secret_values_are_hidden_wherever_they_stand():
    given = {
        "api_key": "k1",
        "admin_api_key": "k2",
        "hf_token": "k3",
        "nested": [{"password": "k4"}, ("secret", {"access-token": "k5"})],
        "max_total_tokens": "100",
        "tokenizer_path": "a/b",
        "api_key_file": None,
        "empty_secret": "",
    }
    text = repr(redact(given))
    assert not [key for key in ("k1", "k2", "k3", "k4", "k5") if f"'{key}'" in text]
    assert "'100'" in text
    assert "'a/b'" in text
    assert given["api_key"] == "k1"


def test_command_lines_hide_both_ways_to_write_an_option():
    words = ["x", "--api-key", "s1", "--admin-api-key=s2", "--tokenizer", "t", "--tp", "2"]
    assert redact_command(words) == [
        "x", "--api-key", HIDDEN, f"--admin-api-key={HIDDEN}", "--tokenizer", "t", "--tp", "2"
    ]  # fmt: skip


@pytest.mark.usefixtures("secrets_end_here")
def test_known_secrets_are_taken_out_of_texts():
    learn(["abcd", "", "k"])
    assert redact_text("key=abcd!") == f"key={HIDDEN}!"


@pytest.mark.parametrize(
    ("name", "secret"),
    [("HF_TOKEN", True), ("AWS_SECRET_ACCESS_KEY", True), ("MAX_TOKENS", False), ("PATH", False)],
)
def test_which_variables_usually_hold_a_credential(name, secret):
    assert is_secret_env(name) is secret


# ---- loads -----------------------------------------------------------------------------------


def test_a_load_is_counted_while_it_is_driven():
    load = LoadState()
    assert (load.load_index, load.target) == (0, 0)
    load.start(8)
    assert (load.load_index, load.target) == (1, 8)
    load.end()
    assert (load.load_index, load.target) == (0, 0)
    load.start(0)
    assert (load.load_index, load.target) == (2, 1)


def test_waiting_for_a_load_ends_with_it_or_with_the_test():
    load, stop = LoadState(), threading.Event()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(load.wait_for_start(stop, 10.0)))
    waiting.start()
    load.start(4)
    waiting.join(5.0)
    assert answers == [True]
    load.end()
    stop.set()
    began = time.monotonic()
    assert load.wait_for_start(stop) is False
    assert time.monotonic() - began < 1.0


# ---- node ids --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodeid", "plain"),
    [
        ("t.py::a", "t.py::a"),
        ("t.py::a@sglprof-default+nsys", "t.py::a"),
        ("t.py::a[x]@grp", "t.py::a[x]"),
        ("t.py::a[x@y]@grp", "t.py::a[x@y]"),
        ("t.py::a[x@y]", "t.py::a[x@y]"),
        ("t.py::a@team/one", "t.py::a"),
        ("d@ir/t.py::a", "d@ir/t.py::a"),
        ("t.py::C::a[u@h/p]", "t.py::C::a[u@h/p]"),
    ],
)
def test_node_ids_without_xdists_group(nodeid, plain):
    assert plain_nodeid(nodeid) == plain
