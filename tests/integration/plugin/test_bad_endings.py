"""What goes wrong while windows end: each of them is closed, and no error hides another."""

from __future__ import annotations

import pytest

from pytest_sglprof._errors import SglprofError, do_every
from pytest_sglprof._report.results import validate

TESTS = """
def raiser(text, kind=RuntimeError):
    def planted(*arguments, **keywords):
        raise kind(text)
    return planted

@pytest.fixture
def recorded(drive, profile_window):
    def recorded(name):
        with profile_window(name) as window:
            drive()
        return window
    return recorded

@pytest.fixture
def left_open(drive, profile_window):
    def left_open():
        window = profile_window("open")
        window.open()
        drive()
    return left_open

def test_close_raises(recorded, left_open, monkeypatch):
    monkeypatch.setattr(recorded("first"), "close", raiser("first close"))
    left_open()

def test_after_it(recorded):
    assert recorded("next").verdict.word == "pass"

def test_several_raise(recorded, left_open, monkeypatch):
    monkeypatch.setattr(recorded("first"), "close", raiser("first close"))
    monkeypatch.setattr(recorded("second"), "close", raiser("second close", OSError))
    left_open()

def test_body_fails_too(recorded, left_open, monkeypatch):
    monkeypatch.setattr(recorded("first"), "close", raiser("first close"))
    left_open()
    assert 1 + 1 == 3, "the body's own words"

def test_body_skips(recorded, left_open, monkeypatch):
    monkeypatch.setattr(recorded("first"), "discard", raiser("first discard"))
    left_open()
    pytest.skip("the body skips")

def test_after_all(recorded):
    assert recorded("next").verdict.word == "pass"

@pytest.fixture
def broken_judge(monkeypatch):
    monkeypatch.setattr("pytest_sglprof._verdict.judge.judge", raiser("judge", ValueError))

@pytest.fixture
def broken_reader(monkeypatch):
    monkeypatch.setattr("pytest_sglprof._trace.read.read_window", raiser("reader", ValueError))

def test_judge_is_broken(broken_judge, recorded):
    recorded("one")

def test_judge_is_broken_and_the_body_fails(broken_judge, recorded):
    recorded("one")
    recorded("two")
    assert 1 + 1 == 3, "the body's own words"

def test_reader_is_broken(broken_reader, recorded):
    recorded("one")
    recorded("two")

def test_reader_is_broken_and_the_body_is_inconclusive(broken_reader, recorded):
    from pytest_sglprof import Inconclusive

    recorded("one")
    raise Inconclusive("the body found too little")
"""


@pytest.fixture(scope="module")
def ran(make_project):
    return make_project(TESTS).run("-p", "no:cacheprovider")


def test_fault_14_the_run_ends_with_its_results(ran):
    assert ran.status == 1
    assert "INTERNALERROR" not in ran.text
    validate(ran.results)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_close_raises", ["RuntimeError: first close"]),
        ("test_several_raise", ["RuntimeError: first close", "OSError: second close"]),
        ("test_body_fails_too", ["the body's own words", "RuntimeError: first close"]),
        ("test_body_skips", ["RuntimeError: first discard"]),
        ("test_judge_is_broken", ["ValueError: judge"]),
        ("test_judge_is_broken_and_the_body_fails", ["the body's own words", "ValueError: judge"]),
        ("test_reader_is_broken", ["ValueError: reader"]),
        ("test_reader_is_broken_and_the_body_is_inconclusive", ["ValueError: reader"]),
    ],
)
def test_fault_14_every_error_is_shown(ran, name, said):
    assert ran.word(name) == "FAILED"
    for text in said:
        assert text in ran.section(name)


@pytest.mark.parametrize("name", ["test_body_fails_too", "test_judge_is_broken_and_the_body_fails"])
def test_fault_14_the_bodys_own_error_is_not_replaced(ran, name):
    assert "AssertionError: the body's own words" in ran.cases[name].find("failure").get("message")
    assert "and besides: Traceback" in ran.section(name)


@pytest.mark.parametrize("name", ["test_after_it", "test_after_all"])
def test_fault_14_no_window_stays_open(ran, name):
    assert ran.word(name) == "PASSED"


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("test_close_raises", ["open"]),
        ("test_several_raise", ["open"]),
        ("test_body_fails_too", ["open"]),
        ("test_judge_is_broken", ["one"]),
        ("test_judge_is_broken_and_the_body_fails", ["one", "two"]),
        ("test_reader_is_broken", ["one", "two"]),
    ],
)
def test_fault_14_what_was_closed_is_recorded(ran, name, windows):
    assert [window["name"] for window in ran.windows(name)] == windows
    if "broken" in name:
        assert {w["verdict"] for w in ran.windows(name)} == {"inconclusive"}
        assert all("ValueError" in w["reason"] for w in ran.windows(name))


# ---- several steps ---------------------------------------------------------------------------


def raiser(error):
    def step():
        raise error

    return step


def test_fault_14_all_steps_are_taken_and_the_first_error_carries_the_others():
    taken = []
    steps = [raiser(SglprofError("a")), lambda: taken.append(1), raiser(ValueError("b"))]
    with pytest.raises(SglprofError, match="a") as raised:
        do_every([*steps, lambda: taken.append(2)])
    assert taken == [1, 2]
    (noted,) = raised.value.__notes__
    assert "ValueError: b" in noted
    do_every([])


def test_fault_14_an_interrupt_goes_before_other_errors_and_ends_the_rest_all_the_same():
    taken = []
    with pytest.raises(KeyboardInterrupt) as raised:
        do_every([raiser(OSError("a")), raiser(KeyboardInterrupt()), lambda: taken.append(1)])
    assert taken == [1]
    assert "OSError: a" in raised.value.__notes__[0]


def test_an_impatient_ctrl_c_adds_no_traceback():
    with pytest.raises(KeyboardInterrupt) as raised:
        do_every([raiser(KeyboardInterrupt()), raiser(KeyboardInterrupt())])
    assert not hasattr(raised.value, "__notes__")
