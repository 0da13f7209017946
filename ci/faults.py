"""Every fault in every phase of a run, on the stand-in: what it ends with, says, and leaves.

    eval "$(python3 ci/real_env.py)"
    python -m ci.faults [--only PATTERN] [--folder DIR] [--jobs 2] [--write docs/reliability.md]

A cell is a fault in a phase, such as `server-KILL-inside`; `--only` takes shell patterns. A cell
that has run is a small file in the folder, so that a command that was ended goes on where it was;
remove the file to run it again. Takes about 45 minutes on two idle cores. nsys is the real one
if there is one. What is promised is the table `PROMISES`; the exit status is 1 where a cell that
has run broke its promise. `--write` makes the document of the cells that have run, and keeps what
it shows in `tests/data/faults.jsonl`.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from ci.fault_cells import COMPLETE, HANGS, PHASES, CannotRun, Cell, Outcome, run_cell
from pytest_sglprof._files import atomic_write
from pytest_sglprof._run.folder import locked

RECORDED = Path(__file__).resolve().parents[1] / "tests" / "data" / "faults.jsonl"
FUZZED = RECORDED.with_name("fuzz.jsonl")
SENTENCE_LENGTH = 150  # characters that are shown of a sentence
CRASH = "INTERNALERROR"
# Lines of a server's log, which may have such things, begin with a bar.
NOISE = re.compile(
    rf"^(?!(?:E\s+)?\s*\|).*?({CRASH}|Traceback \(most recent call last\)|Exception ignored)",
    re.MULTILINE,
)
# A bug of the package, whose errors are shown without the code that they came from.
# Where Ctrl-C came, pytest says in a line of its own.
CODE = re.compile(r"pytest_sglprof/\S+\.py:\d+: (?!KeyboardInterrupt$)\w+", re.MULTILINE)
SAME = (  # what differs from run to run, and what begins a line
    (r"^\s*(E|\|)\s+\|?|pytest_sglprof\._errors\.\w+: |and besides: ", ""),
    (r"^\s*(inconclusive: )?(test_window: )?", ""),
    (r"\[[\d: .-]{19,}[^]]*\] ", ""),
    (r"run-\d{8}-\d{6}-\w{4}", "RUN"),
    (r"sglprof-\d+-[0-9a-f]{12}", "SESSION"),
    (r"(?<=\()/\S*/(?=python )", ""),
    (r"'/\S*/(?=[^/']*')", "'"),
    (r"(pid[ =]|process |scheduler_)\d+", r"\1N"),
    (r"127\.0\.0\.1:\d+|port \d+", "PORT"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.\dZ]*", "TIME"),
    (r"\b\d+(\.\d+)? s\b", "N s"),
)
GOOD, BAD = (0,), (1,)
EITHER = (0, 1)  # by whether the fault came before or after what it spoils


class Promise(NamedTuple):
    """What a fault may do to a run.

    who, what: of `Cell`. means: for people. statuses: of pytest. sentence: a pattern of the line
    that names the cause, which must be in the output unless the status is 0; "" for a fault that
    spoils nothing. seconds: to the end of everything. not_in: phases in which there is nothing
    to hit -> one word why. always: the sentence is there whatever the status. is_raw: the error is
    shown as Python raised it, with the code that it came from.
    """

    who: str
    what: str
    means: str
    statuses: tuple[int, ...]
    sentence: str
    seconds: float
    not_in: Mapping[str, str] = {}
    always: bool = False
    is_raw: bool = False

    @property
    def fault(self) -> str:
        """Its name in the document."""
        return f"{self.who} {self.what}"


AFTER_ALL = {"report": "ended"}  # servers and workers end before the page is written
WITH_LOAD = {"launch": "later", "analysis": "ended", "report": "ended"}
AT_START = {phase: "start" for phase in PHASES if phase != "launch"}
SILENT = (
    r"the load driver did not end within|the server was not ready after|did not answer within|"
    r"no answer|timed out"
)
NO_WINDOW = r"no nsys session|`?nsys (start|stop|sessions)|the server (died|ended)"
DIED = "the tests of this server fail with its end and why"
STALLS = "whoever waits for it gives up after the limit that you set, and says so"
KEEPER = "the server is ended within 30 s; its tests fail, and the summary says it in any case"
NSYS = "the server lives and windows go on, or the window says why it has none"
LOST = "the test that it ran is lost, another worker goes on"
GOES_ON = "nobody notices"
KILLED = "the keeper ends the server; `sglprof report` makes the page of what was recorded"
CTRL_C = "pytest's own interrupt, with its summary; what was recorded until then is there"
UNWRITTEN = "each file that cannot be written is one line"

# Seconds are far above what the parts of an end may take at the limits of the cells
# (ready_timeout 10, stop_timeout 4, window 8, load 25), since the machine may be busy; the document
# has those that it took.
PROMISES = (
    Promise("server", "KILL", DIED, BAD, r"exit status -9, SIGKILL", 90, AFTER_ALL),
    Promise("server", "TERM", DIED, BAD, r"exit status 0\b", 90, AFTER_ALL),
    Promise("server", "STOP", STALLS, BAD, SILENT, 150, AFTER_ALL),
    Promise("rank", "KILL", DIED, BAD, r"exit code:? -9", 90, AFTER_ALL),
    Promise("rank", "TERM", DIED, BAD, r"exit code:? -15", 90, AFTER_ALL),
    Promise("rank", "STOP", STALLS, EITHER, SILENT, 150, AFTER_ALL),
    Promise("keeper", "KILL", KEEPER, EITHER, r"keeper .* signal 9", 90, AFTER_ALL, True),
    Promise("keeper", "TERM", KEEPER, EITHER, r"keeper .* sent SIGTERM", 90, AFTER_ALL, True),
    Promise("keeper", "STOP", KEEPER, EITHER, r"keeper .* \(SIGSTOP\)", 90, AFTER_ALL, True),
    Promise("nsys", "KILL", NSYS, EITHER, NO_WINDOW, 120, AFTER_ALL),
    Promise("nsys", "TERM", NSYS, EITHER, NO_WINDOW, 120, AFTER_ALL),
    Promise("nsys", "STOP", NSYS, EITHER, NO_WINDOW, 150, AFTER_ALL),
    Promise("agent", "KILL", NSYS, EITHER, NO_WINDOW, 120, AFTER_ALL),
    Promise("agent", "TERM", NSYS, EITHER, NO_WINDOW, 120, AFTER_ALL),
    Promise("agent", "STOP", NSYS, EITHER, NO_WINDOW, 150, AFTER_ALL),
    Promise("driver", "KILL", "its test fails", BAD, r"load driver .*status 137", 90, WITH_LOAD),
    Promise("driver", "TERM", "its test fails", BAD, r"load driver .*status 143", 90, WITH_LOAD),
    Promise("driver", "STOP", STALLS, BAD, r"load driver did not end within", 120, WITH_LOAD),
    Promise("worker", "KILL", LOST, BAD, r"worker 'gw0' crashed", 120, AFTER_ALL),
    Promise("worker", "TERM", LOST, BAD, r"worker 'gw0' crashed", 120, AFTER_ALL),
    Promise(
        "worker",
        "STOP",
        "xdist waits for it without a limit: cancelled after 3 s, then `sglprof clean`",
        (-9,),
        r"ended process",
        120,
        AFTER_ALL,
    ),
    Promise("pytest", "KILL", KILLED, (-9,), rf"was killed|was interrupted|{COMPLETE}", 120),
    Promise("pytest", "TERM", KILLED, (-15,), rf"was killed|was interrupted|{COMPLETE}", 120),
    Promise("pytest", "STOP", "it goes on after SIGCONT (here 3 s later)", GOOD, "", 150),
    Promise("pytest", "INT", CTRL_C, (2,), r"KeyboardInterrupt", 90),
    # The last one may come when Python itself is about to end.
    Promise("pytest", "INT2", CTRL_C, (2, -2), r"KeyboardInterrupt", 90),
    Promise("pytest", "INT3", CTRL_C, (2, -2), r"KeyboardInterrupt", 90),
    Promise("disk", "full", UNWRITTEN, EITHER, r"No space left|disk .* full", 150),
    Promise(
        "folder",
        "gone",
        UNWRITTEN,
        EITHER,
        r"No such file or directory|cannot be created|is gone|does not exist",
        90,
    ),
    Promise("folder", "read-only", UNWRITTEN, EITHER, r"Read-only file system", 150),
    Promise(
        "descriptors",
        "exhausted",
        "the test that has them all fails with Python's error, the others go on",
        EITHER,
        r"Too many open files",
        150,
        is_raw=True,
    ),
    Promise("clock", "+1 h", GOES_ON, GOOD, "", 120),
    Promise("clock", "-1 h", GOES_ON, GOOD, "", 120),
    Promise("locks", "stale", GOES_ON, GOOD, "", 120, AT_START),
    Promise("second", "pytest", "it waits for the port, and both pass as if alone", GOOD, "", 150),
)


class Shown(msgspec.Struct, frozen=True, omit_defaults=True):
    """A cell of the document. sentence: "" if none was needed or none is there."""

    name: str
    status: int | None = None
    seconds: float = 0.0
    sentence: str = ""
    left: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()  # how its promise was broken
    nsys: str = ""
    not_run: str = ""


def cells() -> list[Cell]:
    """All of them that make sense."""
    return [
        Cell(row.who, row.what, phase)
        for row in PROMISES
        for phase in PHASES
        if phase not in row.not_in
    ]


def judged(cell: Cell, outcome: Outcome) -> Shown:
    """The cell with what of its promise was not kept."""
    promise = next(row for row in PROMISES if (row.who, row.what) == (cell.who, cell.what))
    sentence = sentence_of(promise.sentence, outcome.text)
    faults = []
    if outcome.status is None:
        faults.append(f"pytest hung for {HANGS:.0f} s")
    elif outcome.status not in promise.statuses:
        faults.append(f"status {outcome.status}")
    if outcome.status is not None and outcome.seconds > promise.seconds:
        faults.append(f"{outcome.seconds:.0f} s")
    is_due = promise.sentence and (outcome.status != 0 or promise.always)
    if is_due and not sentence:
        faults.append("nothing names the cause")
    noise = {match[1] for match in NOISE.finditer(outcome.text)}
    faults += sorted(noise & {CRASH} if promise.is_raw else noise)
    if not promise.is_raw and (code := CODE.search(outcome.text)):
        faults.append(code[0])
    if outcome.missed:
        faults = []
    faults += [f"left: {what}" for what in outcome.left]
    return Shown(
        cell.name,
        outcome.status,
        outcome.seconds,
        sentence,
        outcome.left,
        tuple(faults),
        outcome.nsys,
        outcome.missed,
    )


def sentence_of(pattern: str, text: str) -> str:
    """The first line with the pattern, without what differs from run to run; "" without one."""
    line = next((line for line in text.splitlines() if pattern and re.search(pattern, line)), "")
    for pattern, instead in SAME:
        line = re.sub(pattern, instead, line)
    line = line.strip(" !|")
    return line if len(line) <= SENTENCE_LENGTH else f"{line[: SENTENCE_LENGTH - 1]}…"


def run_all(wanted: Sequence[Cell], folder: Path, jobs: int) -> None:
    """Runs those that have not run, so many at a time, and says what became of each."""
    waiting = [cell for cell in wanted if (ran := _ran(cell, folder)) is None or ran.missed]
    print(f"{len(waiting)} of {len(wanted)} cells to run in {folder}", flush=True)
    began = time.monotonic()

    def run(cell: Cell) -> None:
        try:
            outcome = run_cell(cell, folder)
        except CannotRun as error:
            outcome = Outcome(missed=str(error))
        atomic_write(_file(cell, folder), msgspec.json.encode(outcome))
        shown = judged(cell, outcome)
        word = shown.not_run or ", ".join(shown.faults) or "green"
        minutes = (time.monotonic() - began) / 60
        line = f"{cell.name}: {word} (status {shown.status}, {shown.seconds:.0f} s)"
        print(f"{minutes:5.1f} min  {line}  {shown.sentence}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(run, cell) for cell in waiting]:
            done.result()


def _file(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}.json"


def _ran(cell: Cell, folder: Path) -> Outcome | None:
    file = _file(cell, folder)
    return msgspec.json.decode(file.read_bytes(), type=Outcome) if file.exists() else None


def recorded(folder: Path) -> dict[str, Shown]:
    """What the cells of a folder have become, by their names."""
    every = ((cell, _ran(cell, folder)) for cell in cells())
    return {cell.name: judged(cell, ran) for cell, ran in every if ran is not None}


# ---- the document ------------------------------------------------------------------------------

INTRO = """\
# What a run survives

Made by `python -m ci.faults` ([contributing](../CONTRIBUTING.md)); `ci/faults.py` has what is
promised.

Whatever dies, stops or runs full, and whenever it does:

- **pytest ends**, within the limits that you have set, with the status of its tests: 1 where a
  test has lost its server, its load or its window, 2 after Ctrl-C, also after a second and a
  third one. A window to which something happened is inconclusive or failed; it never passes on
  what is left of it. A stopped pytest and a stopped worker of xdist cannot end by themselves:
  give your CI job a timeout.
- **One line says why**: which process ended how, which limit was reached, which file could not
  be written.
- **Nothing stays behind**: no process, no nsys session, no lock, no shared memory, no temporary
  file, no listening port. The keeper, a process beside pytest, ends the server when pytest
  dies; pytest does when the keeper dies; where both have died, `sglprof clean` or the next run
  does ([servers](servers.md#what-a-killed-run-leaves)).
- **What was recorded is kept**: of a run that was killed, `sglprof report RUN` makes the
  results and the page.

Each cell below is a run of pytest on the [stand-in](standin.md): a window under load, a second
test on the same server, a test without a server. The fault comes in one phase: while the server
starts (launch), in the warm-up of the load, when `/start_profile` (`nsys start`) is about to be
called, inside the window, while the traces are written (closing), before they are read
(analysis), and before the page is written (report). `KILL`, `TERM`, `STOP`, `INT` are signals,
`INT2` is Ctrl-C twice; the clock jumps in pytest only. A cell has pytest's exit status, the
seconds from the fault until pytest and everything that it had started were gone, and the number
of the sentence below that named the cause. All that is left is compared with before the run: a
cell that says nothing of it left nothing. A word in italics says why there is no such cell.

Two or three Ctrl-C within a moment may hit any line. What they interrupt, a lock that is being
released, a file that is being written, is put right when Python ends; the last one may come as
late as that, and then pytest ends by the signal itself.
"""


LOAD = """
## Many windows

2,000 windows in one run are measured in [the page](report.md#many-windows), 1,024 ranks in one
window in [how far it goes](scale.md).
"""


class Fuzzed(msgspec.Struct, frozen=True):
    """What `python -m ci.fuzz --reader READER --seconds S --seed N` printed."""

    reader: str
    seconds: int
    seed: int
    outcomes: dict[str, int]


def _fuzzed() -> list[str]:
    every = msgspec.json.Decoder(Fuzzed).decode_lines(FUZZED.read_bytes())
    rows = [
        [
            each.reader,
            f"{each.seconds} s, seed {each.seed}",
            f"{sum(each.outcomes.values()):,}",
            ", ".join(f"{what} {count:,}" for what, count in each.outcomes.items()),
        ]
        for each in every
    ]
    return [
        "## Files that nobody meant to write",
        "",
        "`python -m ci.fuzz` changes the structure and the bytes of small files. Each is read, or",
        "refused with an error of this package, within 10 s of CPU and 1 GiB; exit 2 and 3 are",
        "those of such an error and of an inconclusive verdict. CI takes 60 s for all readers.",
        "",
        _row(["reader", "ran for", "files", "what became of them"]),
        _row(["---"] * 4),
        *map(_row, rows),
    ]


def document(shown: Mapping[str, Shown]) -> str:
    """docs/reliability.md, of the cells by their names."""
    sentences: dict[str, int] = {}
    rows = []
    for promise in PROMISES:
        row = []
        for phase in PHASES:
            cell = Cell(promise.who, promise.what, phase)
            if phase in promise.not_in:
                row.append(f"*{promise.not_in[phase]}*")
            else:
                row.append(_cell_text(shown.get(cell.name), sentences))
        rows.append([f"**{promise.fault}**: {promise.means}", *row])
    every = [cell.name for cell in cells()]
    ran = [shown[name] for name in every if name in shown and not shown[name].not_run]
    green = sum(not each.faults for each in ran)
    nsys = {each.nsys for each in ran} - {""}
    lines = [
        INTRO,
        f"{len(every)} cells, {len(ran)} of them run, {green} green"
        + (f"; nsys was the {' or the '.join(sorted(nsys, reverse=True))} one." if nsys else "."),
        "",
        _row(["fault", *PHASES]),
        _row(["---"] * (len(PHASES) + 1)),
        *map(_row, rows),
        "",
        "## What was said",
        "",
        "N is a number, PORT an address, RUN a run, SESSION a session of nsys, TIME a time.",
        "",
        *(f"{number}. `{text.replace('`', chr(39))}`" for text, number in sentences.items()),
        "",
        *_fuzzed(),
        LOAD,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cell_text(shown: Shown | None, sentences: dict[str, int]) -> str:
    if shown is None or shown.not_run:
        return "not run"
    status = "hung" if shown.status is None else str(shown.status)
    text = f"{status}, {shown.seconds:.0f} s"
    if shown.sentence:
        number = sentences.setdefault(shown.sentence, len(sentences) + 1)
        text += f", [{number}]"
    if shown.faults:
        text += f" **red: {'; '.join(shown.faults)}**"
    return text


def _row(columns: Iterable[str]) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in columns)} |"


def read_recorded(file: Path = RECORDED) -> dict[str, Shown]:
    """The cells that the document in the repository shows."""
    lines = msgspec.json.Decoder(Shown).decode_lines(file.read_bytes())
    return {each.name: each for each in lines}


def write_document(path: Path, shown: Mapping[str, Shown]) -> None:
    """Writes it, and the cells that it shows."""
    atomic_write(path, document(shown))
    atomic_write(RECORDED, msgspec.json.Encoder().encode_lines(list(shown.values())))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cells that have not run; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="pattern of names, such as 'server-*-inside'")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "sglprof-faults"
    )
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--write", type=Path, metavar="FILE", help="make the document")
    options = parser.parse_args(arguments)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what it starts hears Ctrl-C
    wanted = [cell for cell in cells() if fnmatch.fnmatchcase(cell.name, options.only)]
    options.folder.mkdir(parents=True, exist_ok=True)
    with locked(options.folder) as is_alone:
        if not is_alone:
            parser.error(f"another process runs cells in {options.folder}")
        run_all(wanted, options.folder, options.jobs)
    shown = recorded(options.folder)
    red = [each for cell in wanted if (each := shown.get(cell.name)) and each.faults]
    for each in red:
        print(f"red: {each.name}: {', '.join(each.faults)}")
    missed = sum(bool(each.not_run) for each in shown.values())
    print(f"{len(wanted)} cells: {len(red)} red, {missed} not run")
    if options.write:
        write_document(options.write, shown)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
