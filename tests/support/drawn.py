"""What the scripts of a page draw, read out of the page."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any


def drawn_of(page: str, number: int = 1) -> dict[str, Any]:
    """The data of window `number` of a page."""
    match = re.search(rf'id="window-{number}-data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    drawn: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(match[1])))
    return drawn
