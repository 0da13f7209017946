"""Secrets that are drawn anew for each run of a test, and a search for them."""

from __future__ import annotations

import gzip
import secrets
from pathlib import Path

PLANTED_HERE = {"sglprof.toml", "test_job.py"}  # what the user wrote, not what we write
# What no shell, URL, JSON or header leaves alone; an API key is a header and has no line ends.
ODD = ["'", '"', " ", "@", "%", "%41", "$x", "\\", "#", "&", "=", ";"]


class Secrets:
    """Values with odd characters between two random words, by the name that a test gives."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self._odd = secrets.SystemRandom().sample(ODD, k=len(ODD))

    def draw(self, name: str) -> str:
        first, last = secrets.token_hex(6), secrets.token_hex(6)
        self.words |= {first: name, last: name}
        return f"{first}{self._odd.pop()}x{secrets.choice(ODD)}{last}"

    def among(self, data: bytes) -> set[str]:
        return {name for word, name in self.words.items() if word.encode() in data}

    def leaks(self, folder: Path, shown: str) -> dict[str, set[str]]:
        """File below `folder`, or "terminal" -> secrets in it; compressed files are opened."""
        contents = {"terminal": shown.encode()}
        for path in folder.rglob("*"):
            if path.name in PLANTED_HERE or path.suffix == ".pyc" or not path.is_file():
                continue
            contents[path.name] = path.read_bytes()
            if path.suffix == ".gz":
                contents[f"in {path.name}"] = gzip.decompress(path.read_bytes())
        names = {file: self.among(data) for file, data in contents.items()}
        return {file: leaked for file, leaked in names.items() if leaked}
