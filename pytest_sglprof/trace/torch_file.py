"""Scans one torch trace file; what cannot be scanned is said, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_sglprof.trace.collect import Collector, NeedsText, ScanRequest
from pytest_sglprof.trace.inflate import PIECE, pieces
from pytest_sglprof.trace.kineto import Batch, FileFacts
from pytest_sglprof.trace.torch_scan import Unsafe, scan


def scan_file(
    path: Path,
    request: ScanRequest,
    emit: Callable[[Batch], None],
    *,
    restart: Callable[[], None] = lambda: None,
    piece: int = PIECE,
) -> FileFacts:
    """Scans the requested activities of one file; returns what else it says.

    emit: receives batches as they fill; they count only once this function has returned
    facts that are not `unsafe`. restart: called when what was emitted is void. piece: bytes
    inflated at once.
    Raises NotATrace, TraceTruncated, TraceError; each names the file.
    """
    for by_text in (False, True):
        collector = Collector(request, emit)
        stream = pieces(path, size=piece)
        try:
            scan(stream, collector, by_text=by_text)
            return collector.finish()
        except NeedsText:
            restart()
        except Unsafe as unsafe:
            restart()
            return FileFacts(unsafe=str(unsafe))
    raise AssertionError  # reading by text never asks for it again
