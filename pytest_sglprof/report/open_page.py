"""`open.html`: opens a merged trace in the Perfetto UI, the ranks' kernel rows pinned.

Follows Perfetto's documented way (docs/visualization/deep-linking-to-perfetto-ui.md): a
window on ui.perfetto.dev with `startupCommands` in its address, PING until it answers PONG,
then the trace as an ArrayBuffer. The page itself loads nothing from the network.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path

from pytest_sglprof.files import atomic_write
from pytest_sglprof.report.jinja import template

NAME = "open.html"
EMBED_BYTES = 24 * 2**20  # a larger trace is chosen by hand, or fetched where a server is
PERFETTO = "https://ui.perfetto.dev"
_REGEX_SPECIAL = re.compile(r"([\\^$.|?*+()\[\]{}])")


def write_open_page(trace: Path, ranks: Sequence[str], *, gpu: bool = True) -> Path:
    """Writes the page beside `trace`; its path. gpu: pin kernel rows, else summary rows."""
    embedded = ""
    if trace.stat().st_size <= EMBED_BYTES:
        embedded = base64.b64encode(trace.read_bytes()).decode()
    html = template("open.html").render(
        name=trace.name,
        perfetto=PERFETTO,
        commands=json.dumps(startup_commands(ranks, gpu=gpu)),
        embedded=embedded,
        ranks=ranks,
    )
    page = trace.parent / NAME
    atomic_write(page, html)
    return page


def startup_commands(ranks: Sequence[str], *, gpu: bool = True) -> list[dict[str, object]]:
    """Perfetto's stable automation commands: collapse all, pin the rows of each rank."""
    names = "|".join(_REGEX_SPECIAL.sub(r"\\\1", rank) for rank in ranks)
    rows = r"stream \d+" if gpu else "(step|compute|communication)"
    return [
        {"id": "dev.perfetto.CollapseTracksByRegex", "args": [".*"]},
        {"id": "dev.perfetto.PinTracksByRegex", "args": [f"^({names}) {rows}"]},
    ]
