"""What `sglprof report` needs for 2,000 windows: `python -m benchmarks.many_windows [--runs 20]`.

Records the two windows of the quickstart on the stand-in, one that passes and one that fails, and
writes results.json of as many windows with their documents: with other names, and times that
differ by up to 3 %. Prints for the command seconds, CPU seconds and peak memory, the size of the
page, and how long Chromium takes from the start of the navigation until the page is there, painted
and free, median of three. `--before ROOT` measures the code of another tree as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.child import Figures, measured
from benchmarks.page import fresh_browser, one_load
from pytest_sglprof._files import json_text

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "conftest_examples" / "quickstart"
LOADS = 3
VARIANTS = 8  # of each recorded window; every window is packed alone, so that more change nothing
TIMES = ("compute_ns", "wait_ns", "dur_ns", "quantiles", "by_step", "by_call")
RUN = """
from benchmarks.child import report
from pytest_sglprof._cli.main import main
import sys
report(lambda folder: main(["report", *sys.argv[2:], "-o", str(folder)]),
       __import__("pathlib").Path(sys.argv[1]), lambda status, _: (status == 0, ""))
"""


def recorded(folder: Path) -> dict[str, Any]:
    """results.json of the quickstart, which has its two tests."""
    for file in QUICKSTART.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pytest", "--sglprof", "-q"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    document: dict[str, Any] = json.loads((folder / ".sglprof/latest/results.json").read_text())
    return document


def write_runs(folder: Path, document: dict[str, Any], runs: int, windows: int, fail: int) -> None:
    """Folders of runs below `folder`. windows: of all of them. fail: how many of these fail."""
    rng = random.Random(0)
    by_verdict = {window["verdict"]: window for window in document["windows"]}
    texts = {
        verdict: [window_text(varied(window, rng)) for _ in range(VARIANTS)]
        for verdict, window in by_verdict.items()
    }
    (load,) = [one for one in document["loads"] if one["id"] == by_verdict["pass"]["load"]]
    failing = set(rng.sample(range(windows), fail))
    numbers = itertools.count()
    for run in range(runs):
        chosen = [next(numbers) for _ in range(windows // runs)]
        write_run(folder / f"run-{run:03}", document, load, chosen, failing, texts)


def write_run(
    folder: Path,
    document: dict[str, Any],
    load: dict[str, Any],
    chosen: list[int],
    failing: set[int],
    texts: dict[str, list[list[str]]],
) -> None:
    """results.json of one run, a window after the other. chosen: numbers of its windows."""
    words = ["fail" if number in failing else "pass" for number in chosen]
    names = [f"test_suite_{at % 40:02}.py::test_window_{at:04}" for at in range(len(chosen))]
    head = {
        **document,
        "run": {**document["run"], "id": folder.name, "started": moment(chosen[0])},
        "summary": {
            **document["summary"],
            "verdict": "fail" if "fail" in words else "pass",
            "tests": len(chosen),
            "windows": {
                "fail": words.count("fail"), "inconclusive": 0, "pass": words.count("pass"),
            },
        },
        "tests": [
            {**test, "nodeid": name, "attempts": [{**attempt, "nodeid": name}]}
            for name, word in zip(names, words, strict=True)
            for test in document["tests"]
            if test["verdict"] == word
            for attempt in test["attempts"]
        ],
        "windows": [],
        "loads": [{**load, "id": f"load-{name}", "nodeid": name} for name in names],
    }  # fmt: skip
    folder.mkdir()
    before, after = json_text(head, is_one_line).split('"windows": []')
    with (folder / "results.json").open("w") as stream:
        stream.write(before + '"windows": [\n')
        for at, (name, word, number) in enumerate(zip(names, words, chosen, strict=True)):
            text = texts[word][number % VARIANTS]
            stream.write(",\n" if at else "")
            stream.write(placed(text, name, moment(number)))
        stream.write("\n ]" + after)


def window_text(window: dict[str, Any]) -> list[str]:
    """As it stands in results.json, cut where its name, its test and its time stand."""
    open_ = {
        "id": "@NAME@.1", "name": "@NAME@", "nodeid": "@TEST@", "load": "load-@TEST@",
        "opened": "@TIME@", "closed": "@TIME@",
    }  # fmt: skip
    text = json_text({"windows": [window | open_]}, is_one_line)
    return re.split("@(NAME|TEST|TIME)@", text[len('{\n "windows": [\n') : -len("\n ]\n}\n")])


def placed(pieces: list[str], nodeid: str, opened: str) -> str:
    """The text of another window."""
    values = {"NAME": nodeid.partition("::")[2], "TEST": nodeid, "TIME": opened}
    return "".join(values[each] if at % 2 else each for at, each in enumerate(pieces))


def moment(number: int) -> str:
    return f"2026-{1 + number // 672:02}-{1 + number // 24 % 28:02}T{number % 24:02}:00:00.000Z"


def varied(value: Any, rng: random.Random, key: str = "") -> Any:
    """The document with other times."""
    if isinstance(value, dict):
        return {name: varied(item, rng, name) for name, item in value.items()}
    if isinstance(value, list):
        return [varied(item, rng, key) for item in value]
    if key in TIMES and type(value) is int and value > 0:
        return round(value * rng.uniform(0.97, 1.03))
    return value


def is_one_line(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) in (int, float) for item in value)


def command(root: Path, page: Path, paths: list[str]) -> Figures:
    return measured([sys.executable, "-c", RUN, str(page), *paths], root)


def opened(page: Path) -> Iterator[float]:
    """Seconds until the page is painted and free, of each load."""
    with fresh_browser() as browser:
        browser.driver.set_page_load_timeout(900)
        for _ in range(LOADS):
            yield one_load(browser, page)["interactive ms"] / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--fail", type=int, default=20)
    parser.add_argument("--before", type=Path, help="root of another tree")
    parser.add_argument(
        "--recorded", type=Path, help="results.json of the quickstart, if it is there"
    )
    parser.add_argument("--keep", type=Path, help="an empty folder for runs and pages")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        if args.recorded:
            document = json.loads(args.recorded.read_text())
        else:
            (folder / "quickstart").mkdir()
            document = recorded(folder / "quickstart")
        (folder / "runs").mkdir()
        write_runs(folder / "runs", document, args.runs, args.windows, args.fail)
        size = sum(file.stat().st_size for file in folder.glob("runs/*/results.json"))
        print(f"{args.windows} windows of {args.runs} runs, {size / 1e6:.0f} MB of results.json")
        for root in filter(None, (args.before, ROOT)):
            page = folder / f"{'before' if root == args.before else 'now'}.html"
            figures = command(root, page, [str(folder / "runs")])
            print(
                f"{page.stem}: {figures.wall_s:.1f} s ({figures.cpu_s:.1f} s of CPU), "
                f"{figures.parent_mb:.0f} MB of memory, page {page.stat().st_size / 1e6:.1f} MB",
                flush=True,
            )
            print(f"    opens in {statistics.median(opened(page)):.1f} s", flush=True)


if __name__ == "__main__":
    main()
