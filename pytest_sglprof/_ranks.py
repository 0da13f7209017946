"""`Rank`: one scheduler process on one device, and the labels that name it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

_FILE_END = re.compile(r"(?:-(?:EXTEND|DECODE))?(?:\.trace)?\.json(?:\.gz|\.zst)?$")
_FILE_PART = re.compile(r"(?:^|-)(TP|DP|PP|EP)-(\d+)$")
_TAG = re.compile(r"^(ATTN_CP|MOE_DP|DP|PP|TP|EP|GPU)(\d+)$")


@dataclass(frozen=True)
class Rank:
    """The index of a scheduler process in each parallel dimension.

    A dimension of size 1 is None if the source leaves it out. ``gpu`` is set only if the
    device is all that a report gives. Fields are in the order in which SGLang logs them.
    """

    dp: int | None = None
    pp: int | None = None
    attn_cp: int | None = None
    moe_dp: int | None = None
    tp: int | None = None
    ep: int | None = None
    gpu: int | None = None

    @property
    def label(self) -> str:
        """``DP0 PP0 TP1 EP1``: tags in the order of the server's log."""
        tags = ((f.name.upper(), getattr(self, f.name)) for f in fields(self))
        return " ".join(f"{tag}{value}" for tag, value in tags if value is not None)

    @property
    def sort_key(self) -> tuple[int, ...]:
        """Sorts ranks by number; an absent dimension counts as 0."""
        return tuple(getattr(self, f.name) or 0 for f in fields(self))

    def matches(self, other: Rank) -> bool:
        """True if both name the same process, even if one leaves out dimensions of size 1."""
        return self.sort_key == other.sort_key

    @classmethod
    def parse(cls, label: str) -> Rank | None:
        """Reads ``DP0 TP1`` (in any order); None without tags or with a word that is not a tag."""
        values: dict[str, int] = {}
        for word in label.split():
            match = _TAG.match(word)
            if match is None:
                return None
            values[match[1].lower()] = int(match[2])
        return cls(**values) if values else None

    @classmethod
    def from_file_name(cls, name: str) -> Rank | None:
        """Reads ``{prefix-}{id}-TP-1-DP-0[-PP-p][-EP-e][-DECODE].trace.json.gz``.

        Read from the right, since a prefix may itself contain ``TP-3``.
        """
        stem, endings = _FILE_END.subn("", name)
        if not endings:
            return None
        values: dict[str, int] = {}
        while match := _FILE_PART.search(stem):
            key = match[1].lower()
            if key in values:
                break
            values[key] = int(match[2])
            stem = stem[: match.start()]
            if key == "tp":  # SGLang writes TP first, after the prefix
                break
        return cls(**values) if "tp" in values else None

    @classmethod
    def from_process_title(cls, title: str) -> Rank | None:
        """Reads SGLang's ``sglang::scheduler_DP0_TP1_EP1``; None for other processes.

        A scheduler without tags (every size is 1) is ``TP0``.
        """
        match = re.search(r"sglang::scheduler((?:_[A-Z_]+?\d+)*)", title)
        if match is None:
            return None
        tags = re.findall(r"_(ATTN_CP|MOE_DP|DP|PP|TP|EP)(\d+)", match[1])
        values = {tag.lower(): int(number) for tag, number in tags}
        return cls(**values) if values else cls(tp=0)


def rank_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in the order of their ranks, then labels of no rank in alphabetical order."""

    def key(label: str) -> tuple[bool, tuple[int, ...], str]:
        rank = Rank.parse(label)
        return (rank is None, rank.sort_key if rank else (), label)

    return tuple(sorted(labels, key=key))
