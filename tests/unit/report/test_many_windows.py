"""Results and pages of many windows: decoded one at a time, packed but for the worst."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_sglprof._errors import SglprofError
from pytest_sglprof._report import stored
from pytest_sglprof._report.model import Results
from pytest_sglprof._report.page import page as page_module
from pytest_sglprof._report.page.page import page
from pytest_sglprof._report.page.sections import WHOLE_WINDOWS
from pytest_sglprof._report.results import load_results, write_results
from pytest_sglprof._report.stored import StoredWindows, heads_of, whole, with_window
from tests.support.windows import BALANCED, SLOW, as_run, run, window

COUNT = 300
FAILING = (3, 150, 299)
MOST_KB = 16  # of a window with ten kernels; with its content in the page it takes 40


def many(count: int = COUNT, failing: tuple[int, ...] = FAILING) -> dict[str, Any]:
    document = run([])
    balanced, slow = window(BALANCED), window(SLOW)
    document["windows"] = [
        {**(slow if at in failing else balanced), "id": f"w{at}", "name": f"window {at}"}
        for at in range(count)
    ]
    document["tests"] = []
    return document


@pytest.fixture(scope="module")
def results() -> Results:
    return as_run(many())


@pytest.fixture
def large(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is read as one of many megabytes, in pieces that end anywhere."""
    monkeypatch.setattr(stored, "LARGE", 0)
    monkeypatch.setattr(stored, "CHUNK", 1001)
    write_results(results, tmp_path / "results.json")
    return tmp_path / "results.json"


def test_windows_of_a_large_file_are_those_of_a_small_one(results: Results, large: Path) -> None:
    read = load_results(large)
    assert isinstance(read.windows, StoredWindows)
    assert list(read.windows) == list(results.windows)
    assert [head.id for head in heads_of(read)] == [f"w{at}" for at in range(COUNT)]
    assert whole(heads_of(read)[150], read) == results.windows[150]
    assert (read.tests, read.servers, read.loads) == (results.tests, results.servers, results.loads)
    changed = with_window(read, heads_of(read)[1], results.windows[3])
    assert list(changed.windows)[:3] == [results.windows[at] for at in (0, 3, 2)]


def test_a_page_is_the_same_whichever_way_its_results_were_read(
    results: Results, large: Path
) -> None:
    assert page([load_results(large)]) == page([results])


@pytest.mark.parametrize("indent", [None, 1, 2])
def test_a_large_file_that_was_written_in_another_way_is_read(
    results: Results, large: Path, indent: int | None
) -> None:
    large.write_text(json.dumps(json.loads(large.read_text()), indent=indent))
    assert list(load_results(large).windows)[:4] == list(results.windows)[:4]


def test_what_is_wrong_in_a_window_is_named(large: Path) -> None:
    lines = large.read_text()
    place = lines.rindex('"total_ns": ')
    large.write_text(f'{lines[:place]}"total_ns": "long", "x": {lines[place + 12 :]}')
    windows = load_results(large).windows
    with pytest.raises(SglprofError, match=r"results\.json: \$\.windows\[299\]: .*got `str`"):
        _ = windows[COUNT - 1]
    large.write_text(lines[: len(lines) // 2])
    with pytest.raises(SglprofError, match="not JSON"):
        load_results(large)


def test_a_page_of_many_windows_begins_with_those_that_fail(results: Results) -> None:
    text = page([results])
    sections = re.findall(r'<section id="(\w+)"|<details class="window" id="(\S+?)"( open)?', text)
    failing = [("", f"window-{at + 1}", " open") for at in FAILING]
    assert sections[:4] == [("verdicts", "", ""), *failing]
    rows = re.findall(r'<tr>\n<td><span class="word (\w+)', text)
    assert rows == ["fail"] * len(FAILING) + ["pass"] * (COUNT - len(FAILING))
    assert len(text) < 1000 * MOST_KB * COUNT


def test_what_a_page_does_not_show_at_once_is_packed_whole(results: Results) -> None:
    text = page([results])
    packed = set(re.findall(r'id="(window-\d+)" data-packed', text))
    assert len(packed) == COUNT - WHOLE_WINDOWS
    assert not packed & {f"window-{at + 1}" for at in FAILING}
    few = page([as_run(many(1, ()))])
    (shown,) = re.findall(r"</summary>\n(.*?)\n*</details>\n\n", few, re.S)
    data = _data(text, "window-200")
    assert data["content"].replace("window-200-", "window-1-").split() == shown.split()
    alone = _data(few, "window-1")
    assert {**data, "id": "w0"} == {**alone, "content": data["content"]}


def _data(text: str, anchor: str) -> dict[str, Any]:
    """What the scripts get of a window."""
    (letters,) = re.findall(rf'id="{anchor}-data">([^<]*)<', text)
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(letters)))
    return data


def test_the_page_is_the_same_with_a_second_process_and_without(
    results: Results, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = psutil.Process().children()
    alone = page([load_results(large)])
    monkeypatch.setattr(page_module, "HALVED", 100)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    made: list[int] = []
    windows_of = page_module._Helper.windows

    def windows(self: Any, placed: Any) -> Any:
        its = windows_of(self, placed)
        made.append(len(its))
        return its

    monkeypatch.setattr(page_module._Helper, "windows", windows)
    assert page([load_results(large)]) == alone
    assert page([results]) == alone
    assert made == [int((COUNT - WHOLE_WINDOWS) * page_module.PART_OF_HELPER)] * 2
    assert psutil.Process().children() == before


def test_what_a_killed_second_process_has_not_made_is_made_here(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = psutil.Process().children()
    alone = page([load_results(large)])
    monkeypatch.setattr(page_module, "HALVED", 100)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for code in ("import sys; sys.exit(3)", "import os; os.kill(os.getpid(), 9)", "print('no')"):
        monkeypatch.setattr(page_module, "_HELPER", code)
        assert page([load_results(large)]) == alone
    assert psutil.Process().children() == before
