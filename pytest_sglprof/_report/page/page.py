"""The page of one or more runs: one HTML file without any request, made of results documents."""

from __future__ import annotations

import base64
import gc
import hashlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pytest_sglprof._files import atomic_writer
from pytest_sglprof._metrics import MEASURED, WORST_FIRST, worst_word
from pytest_sglprof._report.model import Results, WindowHead
from pytest_sglprof._report.page.baseline import loads_of
from pytest_sglprof._report.page.data import embedded
from pytest_sglprof._report.page.groups import most_unequal
from pytest_sglprof._report.page.history import PlacedHead, PlacedWindow, with_earlier
from pytest_sglprof._report.page.jinja import template
from pytest_sglprof._report.page.sections import (
    SECTIONS,
    WHOLE_WINDOWS,
    WINDOW_SECTIONS,
    PageRuns,
    PageWindow,
    all_shown,
    is_long,
    window_data,
)
from pytest_sglprof._report.stored import heads_of, whole
from pytest_sglprof._report.terminal import STANDIN_NOTE, window_title
from pytest_sglprof._verdict.wording import count

SCRIPTS = (
    *("uPlot.iife.min.js", "core.js", "strip.js"),
    *(script for window_row in WINDOW_SECTIONS for script in window_row.scripts),
    *(script for row in SECTIONS for script in row.scripts),
    "boot.js",
)
NEW_OBJECTS = 200_000  # after which those that refer to each other are looked for
HALVED = 400  # windows of which another process makes a part: it takes a second to start
PART_OF_HELPER = 0.45
MOST_OPEN = 10  # of many windows: charts of all that fail would keep the page busy
STYLES = ("uPlot.min.css", "page.css")


def page(
    documents: Sequence[Results],
    *,
    bases: Sequence[str] = (),
    baseline: Results | None = None,
) -> str:
    """The page as text. documents: results of runs, as `load_results` returns them.

    bases: for each document the folder of its artifacts, relative to the page ("" for the
    same folder). Windows that fail are opened, without any the worst one; the others are
    folded. Of many windows the first ones are opened, and a list of all comes first. baseline:
    results of a run that the windows of all others are compared with.
    """
    return "".join(_pieces(documents, bases, baseline))


def rendered(name: str, *, scripts: Sequence[str], data: dict[str, str], **values: Any) -> str:
    """A page from a template that extends `layout.html.j2`. data: packed, by their element's id."""
    return "".join(_rendered(name, scripts=scripts, data=data, **values))


def write_page(
    documents: Sequence[Results],
    folders: Sequence[Path],
    path: Path,
    *,
    baseline: Results | None = None,
) -> None:
    """Writes the page whole or not at all. folders: where each document's artifacts lie."""
    bases = [os.path.relpath(folder, path.parent) for folder in folders]
    bases = ["" if base == "." else Path(base).as_posix() for base in bases]
    pieces = _pieces(documents, bases, baseline)
    with atomic_writer(path) as stream:
        stream.writelines(piece.encode() for piece in pieces)


def _pieces(
    documents: Sequence[Results], bases: Sequence[str], baseline: Results | None
) -> Iterator[str]:
    bases = list(bases) or [""] * len(documents)
    placed = _placed(documents, bases)
    windows = _windows(placed, documents, bases)
    words = [window.doc.word for window in placed if window.doc.is_judged]
    sections = all_shown(SECTIONS, PageRuns(documents, windows, baseline))
    if is_long(windows):
        sections = tuple(sorted(sections, key=lambda section: section.name != "verdicts"))
    data = {one.name: embedded(one.drawn) for one in sections if one.drawn is not None}
    return _rendered(
        "page.html.j2",
        scripts=SCRIPTS,
        runs=documents,
        verdict=_word(documents, words),
        counts=_counts(words),
        standin=any(document.summary.standin for document in documents),
        standin_note=STANDIN_NOTE,
        sections=sections,
        data=data | {window.anchor: window.data for window in windows},
    )


def _rendered(
    name: str, *, scripts: Sequence[str], data: dict[str, str], **values: Any
) -> Iterator[str]:
    sources = [_asset(script) for script in scripts]
    return template(name).generate(
        styles="\n".join(_asset(style) for style in STYLES),
        scripts=sources,
        policy=_policy(sources),
        data=data,
        **values,
    )


def _placed(documents: Sequence[Results], bases: Sequence[str]) -> list[PlacedHead]:
    loads = [loads_of(document) for document in documents]
    windows = (
        (head, document, load.get(head.load or ""), base)
        for document, load, base in zip(documents, loads, bases, strict=True)
        for head in heads_of(document)
    )
    placed = [
        PlacedHead(head, document, f"window-{number}", load, base)
        for number, (head, document, load, base) in enumerate(windows, 1)
    ]
    return with_earlier(documents, placed)


def _windows(
    placed: Sequence[PlacedHead], documents: Sequence[Results], bases: Sequence[str]
) -> list[PageWindow]:
    """The windows with their content: of the worst ones as it is, of all others packed."""
    failing = [window for window in placed if window.counts and window.doc.verdict == "fail"]
    newest = sorted(failing, key=lambda w: w.run.run.started or "", reverse=True)
    worst = sorted(placed, key=lambda w: WORST_FIRST.index(w.doc.verdict))
    by_weight = dict.fromkeys(window.anchor for window in (*newest, *worst))
    in_full = set(islice(by_weight, WHOLE_WINDOWS))
    most = MOST_OPEN if is_long(placed) else len(placed)
    opened = {window.anchor for window in newest[:most] or worst[:1]}
    packed = [at for at, window in enumerate(placed) if window.anchor not in in_full]
    by_helper = packed[: int(len(packed) * PART_OF_HELPER)] if len(placed) >= HALVED else []
    with _few_collections(), _Helper(documents, bases, by_helper) as helper:
        others = set(by_helper)
        made = {
            at: _window(window, opened=window.anchor in opened, in_full=window.anchor in in_full)
            for at, window in enumerate(placed)
            if at not in others
        }
        made |= helper.windows(placed)
        return [made.get(at) or _window(window) for at, window in enumerate(placed)]


@contextmanager
def _few_collections() -> Iterator[None]:
    """A window is some 10,000 objects, nearly all without cycles: to look for these each time that
    there are 700 more takes as long as all the rest."""
    usual = gc.get_threshold()
    gc.set_threshold(NEW_OBJECTS, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _window(head: PlacedHead, *, opened: bool = False, in_full: bool = False) -> PageWindow:
    """A window is decoded here, and not kept."""
    values = _values(head)
    doc, others = most_unequal(whole(head.doc, head.run))
    window = PlacedWindow(**values | {"doc": doc}, others=others)
    reason = _reason(window.doc)
    sections = all_shown(WINDOW_SECTIONS, window)
    content = template("window.html.j2").render(w=window, reason=reason, sections=sections)
    drawn = window_data(window, sections)
    return PageWindow(
        **values,
        title=window_title(window.doc),
        reason=reason,
        opened=opened,
        content=Markup(content) if in_full else None,
        data=embedded(drawn) if in_full else embedded(drawn | {"content": content}, at_once=True),
    )


def _values(head: PlacedHead) -> dict[str, Any]:
    return {field.name: getattr(head, field.name) for field in fields(PlacedHead)}


# Of many windows, a part is made by another process. Not by `multiprocessing`, which would import
# the caller's main module again (it may be pytest), or fork beside the caller's threads.

_HELPER = (
    "import sys; sys.path[:] = {path!r}; from pytest_sglprof._report.page.page import help_out; "
    "help_out()"
)


class _Helper:
    """Makes windows beside this process. What it could not make is left to this one.

    numbers: of the windows among those that `_placed` gives; () for no other process.
    """

    def __init__(
        self, documents: Sequence[Results], bases: Sequence[str], numbers: Sequence[int]
    ) -> None:
        self._made: list[tuple[int, str, str, str]] = []
        self._process: subprocess.Popen[bytes] | None = None
        if not numbers or (os.cpu_count() or 1) == 1:
            return
        path = [*filter(None, sys.path), str(Path(__file__).parents[3])]
        command = [sys.executable, "-I", "-c", _HELPER.format(path=path)]
        with suppress(OSError):
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            job = (tuple(documents), tuple(bases), tuple(numbers))
            self._thread = threading.Thread(target=self._exchange, args=(job,), daemon=True)
            self._thread.start()

    def _exchange(self, job: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError, EOFError, pickle.UnpicklingError):
            with self._process.stdin as stream:
                pickle.dump(job, stream, protocol=5)
            while True:
                self._made.append(pickle.load(self._process.stdout))

    def windows(self, placed: Sequence[PlacedHead]) -> dict[int, PageWindow]:
        """All that it has made, as soon as it has ended; by number."""
        if self._process is not None:
            self._thread.join()
        return {
            at: PageWindow(
                **_values(placed[at]),
                title=title,
                reason=reason,
                opened=False,
                content=None,
                data=data,
            )
            for at, title, reason, data in self._made
        }

    def __enter__(self) -> _Helper:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._thread.join()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()


def help_out() -> None:
    """The other process: its job from stdin, its windows to stdout, both from and to its parent."""
    documents, bases, numbers = pickle.load(sys.stdin.buffer)
    placed = _placed(documents, bases)
    with _few_collections():
        for number in numbers:
            window = _window(placed[number])
            made = (number, window.title, window.reason, window.data)
            pickle.dump(made, sys.stdout.buffer, protocol=5)


def _reason(window: WindowHead) -> str:
    """Why it has its verdict; of windows opened together, the typical one has that of them all."""
    repeats = window.repeats
    alone = repeats is not None and repeats.typical != window.id
    return repeats.own_reason if repeats is not None and alone else window.reason


def _word(documents: Sequence[Results], words: Sequence[str]) -> str | None:
    """The worst verdict of the runs; "measured" where no window had a limit to pass."""
    worst = worst_word({document.summary.verdict for document in documents})
    return MEASURED if worst in ("pass", None) and set(words) == {MEASURED} else worst


def _counts(words: Sequence[str]) -> str:
    """`3 windows: 1 fail, 2 pass`."""
    parts = [f"{words.count(word)} {word}" for word in (*WORST_FIRST, MEASURED) if word in words]
    windows = count(len(words), "window")
    return f"{windows}: {', '.join(parts)}" if parts else windows


def _policy(scripts: Sequence[str]) -> str:
    """Only our own scripts run, and nothing is fetched, whatever a name in the page holds."""
    hashes = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"


@cache
def _asset(name: str) -> str:
    source = resources.files("pytest_sglprof._report.page").joinpath("assets", name)
    return source.read_text(encoding="utf-8")
