"""What a run that was killed, or has not ended, has recorded: its results without results.json."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pytest_sglprof import _process as process
from pytest_sglprof._files import JOURNAL, RESULTS
from pytest_sglprof._limits import UNDECODABLE
from pytest_sglprof._redact import redact_text
from pytest_sglprof._report.model import utc
from pytest_sglprof._run.folder import locked, run_content, server_versions
from pytest_sglprof._server.journal import StartedTest, kept_servers, started_tests

if TYPE_CHECKING:
    from pytest_sglprof._report.model import Attempt, Record, Results

_INTERRUPTED = 2  # pytest's exit status


def interrupted_results(folder: Path) -> Results:
    """What a run without results.json has recorded: that of the tests that ended.

    Those that had begun are there as such. It was killed, or has not ended yet;
    `run.interrupted` says which.
    """
    from pytest_sglprof._metrics import MIN_STEPS
    from pytest_sglprof._report.model import Run
    from pytest_sglprof._report.results import run_document

    marked = run_content(folder) or {}
    records = list(_recorded(folder / JOURNAL))
    with locked(Path(os.path.realpath(folder))) as ended:
        pass
    why = "was interrupted" if ended else "has not ended"
    facts = marked["facts"] if isinstance(marked.get("facts"), dict) else {}
    versions = {"pytest_sglprof": str(marked.get("version") or "")}
    run = Run(
        id=str(marked.get("id") or folder.absolute().name),
        started=str(marked["started"]) if marked.get("started") else None,
        ended=None,
        host=str(marked.get("host") or ""),
        command=tuple(map(str, facts.get("command", ()))),
        versions={**facts.get("versions", {}), **versions, **server_versions(records)},
        min_steps=int(facts.get("min_steps", MIN_STEPS)),
        exit_status=_INTERRUPTED,
        interrupted=f"the run {why}: only what it had recorded by then is here",
    )
    attempts = [record.attempt for record in records if record.attempt is not None]
    known = {(redact_text(attempt.nodeid), attempt.number) for attempt in attempts}
    begun = [e for e in started_tests(marked) if (e.nodeid, e.number) not in known]
    return run_document(
        run,
        [*attempts, *(_unended(test, has_run_ended=ended) for test in begun)],
        [window for record in records for window in record.windows],
        [server for record in records for server in record.servers],
        [load for record in records for load in record.loads],
    )


def _unended(test: StartedTest, *, has_run_ended: bool) -> Attempt:
    """An attempt that has begun, and of which nothing else is known."""
    from pytest_sglprof._report.results import attempt_document

    killed = f"the test had begun at {utc(test.began)} and never ended: its run was killed"
    return attempt_document(
        nodeid=test.nodeid,
        number=test.number,
        outcome="interrupted" if has_run_ended else "running",
        verdict=None,
        reason=killed if has_run_ended else f"the test has run since {utc(test.began)}",
        duration_s=0.0,
        worker=test.worker,
    )


def write_interrupted(document: Results, folder: Path) -> Path | None:
    """Writes results.json of a run that was killed; None if it goes on, or has one.

    Raises OSError, also while a keeper is about to close its window.
    """
    from pytest_sglprof._report.results import write_results

    file = folder / RESULTS
    with locked(folder) as alone:
        if not alone or file.exists():
            return None
        servers = kept_servers(run_content(folder) or {})
        if any(each.ended is None and process.is_same(each.keeper) for each in servers):
            raise BlockingIOError(errno.EAGAIN, "a keeper still tears its server down: try again")
        write_results(document, file)
    return file


def _recorded(journal: Path) -> Iterator[Record]:
    """The whole lines of a journal, up to one that cannot be read."""
    from pytest_sglprof._report.model import Record

    with contextlib.suppress(FileNotFoundError, *UNDECODABLE), journal.open("rb") as lines:
        for line in lines:
            yield msgspec.json.decode(line, type=Record)
