"""What a window's document has of the load around it, which no profiler was needed for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_sglprof._run.window import Window
    from pytest_sglprof._trace.table import KernelTable

BEFORE = 120.0  # s of load before a window, or before the onset that opened it
AFTER = 15.0  # s of load after it


def load_document(window: Window, table: KernelTable | None) -> dict[str, Any]:
    """The onset that opened it, joined with its kernels, and the load around it."""
    from pytest_sglprof._analysis.load import join_load
    from pytest_sglprof._report.load import (
        load_strip,
        metric_series,
        onset_document,
        sampled_ratios,
    )
    from pytest_sglprof._report.model import LoadAround

    moment = {
        "moment": window.moment,
        "moment_of": window.moment_of or None,
        "sources": window.sources,
    }
    if window.watch is None:
        return moment
    capture, onset, watch = window.capture, window.onset, window.watch
    source = getattr(window.spec.trigger, "source", "loads")
    begin = min(capture.opened, onset.time if onset else capture.opened) - BEFORE
    end = capture.closed + AFTER
    samples = watch.samples
    return {
        **moment,
        "onset": onset_document(
            onset, join_load(onset, table) if onset is not None and table is not None else None
        ),
        "load_samples": load_strip(samples, source, begin, end),
        "around": LoadAround(
            log=load_strip(samples, "log", begin, end),
            metrics=metric_series(watch.metrics, begin, end),
            sampled=sampled_ratios(window.sampled),
        ),
    }
