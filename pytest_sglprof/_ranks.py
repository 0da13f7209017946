"""`Rank`: one scheduler process on one device, its labels, and the names of its files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

# Of a torch trace, after its name: the stage, where each has its file, and the type.
FILE_END = re.compile(r"(?:-(?:EXTEND|DECODE))?(?:\.trace)?\.json(?:\.gz|\.zst)?$")
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

    @property
    def work_group(self) -> Rank:
        """What the ranks share whose input is identical to that of this one."""
        return Rank(dp=self.dp, pp=self.pp, attn_cp=self.attn_cp)

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
    def from_tags(cls, tags: str) -> Rank | None:
        """Reads the tags of a log line; passes over those that are not known (``DCP0``)."""
        return cls.parse(" ".join(word for word in tags.split() if _TAG.match(word)))

    @classmethod
    def from_file_name(cls, name: str) -> Rank | None:
        """Reads ``{prefix-}{id}-TP-1-DP-0[-PP-p][-EP-e][-DECODE].trace.json.gz``.

        Read from the right, since a prefix may itself contain ``TP-3``.
        """
        matches = _matches(NAME_PATTERNS[0], name)
        return matches[-1][1].rank if matches else None

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


def work_group(label: str) -> tuple[int, ...] | None:
    """A key that the ranks have in common whose input is identical to that of this one.

    An absent dimension counts as 0, since sources leave out dimensions of size 1. None for a label
    that is not a rank's name.
    """
    rank = Rank.parse(label)
    return rank.work_group.sort_key if rank else None


def short_labels(labels: Sequence[str]) -> dict[str, str]:
    """Each label by a short one: `DP3` for `DP3 TP3 EP3` where all dimensions of all say the same.

    All labels as they are where a dimension differs, or where two ranks would share a name.
    """
    short = {}
    for label in labels:
        words = label.split()
        if Rank.parse(label) is None or len({re.sub(r"\D+", "", word) for word in words}) != 1:
            return {label: label for label in labels}
        short[label] = words[0]
    return short if len(set(short.values())) == len(short) else {label: label for label in labels}


def rank_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in the order of their ranks, then labels of no rank in alphabetical order."""

    def key(label: str) -> tuple[bool, tuple[int, ...], str]:
        rank = Rank.parse(label)
        return (rank is None, rank.sort_key if rank else (), label)

    return tuple(sorted(labels, key=key))


# What the name of a file, or of its folder, says of the rank that wrote it.

_DIMENSION = re.compile(r"(TP|DP|PP|EP)[-_]?(?:RANK)?[-_]?(\d+)", re.IGNORECASE)
_DIMENSIONAL = r"(?:[TDPE]P|D?CP|PCP)[-_]?(?:rank)?[-_]?\d{1,4}"
_BEGINS, _ENDS = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
_WORD = r"(?:([A-Za-z]+)[-_. ])?"  # the word before
# Of these a "rank" or an "r" with a number is the size of a matrix, or a group of processes.
_OTHER_RANKS = re.compile(r"\w*lora|dora|low|full|svd|adapter|matrix|max|node|group", re.IGNORECASE)
_NODE = re.compile(rf"{_BEGINS}(?:node|host)[-_]?\d{{1,6}}{_ENDS}", re.IGNORECASE)


class NamedRank(NamedTuple):
    """What a name says. number: the rank in the run, None where the name leaves it open."""

    rank: Rank
    number: int | None = None

    def agrees(self, number: int) -> bool:
        """Whether the rank in the run may be this one: replicas are counted through, or each."""
        if self.number is None or number == self.number:
            return True
        replica, before = self.rank.dp or 0, number - self.number
        if replica == 0 or before % replica:
            return False
        return before // replica > self.number  # the size of a replica


def _dimensions(match: re.Match[str]) -> NamedRank | None:
    """`tp1-dp0`, read from the right: a dimension that comes again belongs to a prefix."""
    values: dict[str, int] = {}
    for name, number in reversed(_DIMENSION.findall(match[0])):
        if name.lower() in values:
            break
        values[name.lower()] = int(number)
    if not values.keys() & {"tp", "dp", "pp"}:
        return None
    # With DP or PP in the name the rank in the run is not the tp rank.
    return NamedRank(Rank(**values), None if values.keys() & {"dp", "pp"} else values["tp"])


def _of_sglang(match: re.Match[str]) -> NamedRank | None:
    """`TP-1-DP-0`: tp counts through a pipeline stage, so in the first one it is the rank."""
    named = _dimensions(match)
    if named is None or named.rank.tp is None:
        return None
    return named._replace(number=None if named.rank.pp else named.rank.tp)


def _of_all_dimensions(match: re.Match[str]) -> NamedRank | None:
    """`DP1 TP0`: the numbers that are left out follow from these."""
    dp, pp, tp, number = map(int, match.groups())
    return NamedRank(Rank(dp=dp, pp=pp or None, tp=tp), number)


def _numbered(match: re.Match[str]) -> NamedRank | None:
    """A rank by its number alone, which counts as that of the only tensor-parallel group."""
    if match[1] is not None and _OTHER_RANKS.fullmatch(match[1]):
        return None
    return NamedRank(Rank(tp=int(match[2])), int(match[2]))


class NamePattern(NamedTuple):
    """How a producer of traces writes the rank into a name; the match farthest right counts.

    is_index: whether the numbers are certainly ranks. Else they may be sizes (`llama-tp8`) or
    versions: they count only where one of them, in some file of the window, is 0. rank: of a
    match; None if it names something else.
    """

    producer: str
    pattern: re.Pattern[str]
    is_index: bool
    rank: Callable[[re.Match[str]], NamedRank | None]


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(f"{_BEGINS}{text}{_ENDS}", re.IGNORECASE)


# Tried in this order. A bare number (`trace_0.json`) is no row: it may be that of a step.
NAME_PATTERNS: tuple[NamePattern, ...] = (
    NamePattern(
        "SGLang: {prefix-}ID-TP-1-DP-0[-PP-0][-EP-1][-DECODE].trace.json.gz",
        re.compile(rf"(?:^|-)TP-\d+(?:-(?:DP|PP|EP)-\d+)*(?={FILE_END.pattern})"),
        True,
        _of_sglang,
    ),
    NamePattern(
        "vLLM: dp1_pp0_tp0_dcp0_ep2_rank2",
        _pattern(r"dp(\d{1,4})_pp(\d{1,4})_tp(\d{1,4})(?:_[a-z]+\d{1,4})*_rank(\d{1,6})"),
        False,
        _of_all_dimensions,
    ),
    NamePattern(
        "dimensions: tp0, dp0_tp1, TP01-DP00, tp_rank_1",
        _pattern(rf"{_DIMENSIONAL}(?:[-_.]{_DIMENSIONAL})*"),
        False,
        _dimensions,
    ),
    NamePattern(
        "Megatron, torchtitan, DeepSpeed, Primus: rank-0, rank0_trace, Rank0, rank0of8, rank[0]",
        _pattern(rf"{_WORD}rank(?:[-_]?|\[)(\d{{1,6}})(?:of\d+)?"),
        True,
        _numbered,
    ),
    NamePattern(  # `worker-0_4242.1771.pt.trace.json` is a host, its process and a time
        "param, chakra: worker0_step_12",
        _pattern(rf"{_WORD}worker[-_]?(\d{{1,6}})(?!_\d+\.\d+\.pt\.)"),
        False,
        _numbered,
    ),
    NamePattern("r0", _pattern(rf"{_WORD}r(\d{{1,6}})"), False, _numbered),
)


def named_ranks(paths: Iterable[Path]) -> dict[Path, NamedRank]:
    """What the names of a window's files say of their ranks; files whose names do not are absent.

    Where the name of a file says nothing, that of its folder counts, if it is nothing else
    than a rank (`rank0/trace.json`).
    """
    files = list(dict.fromkeys(paths))
    folders = {path: path.absolute().parent.name for path in files}
    ranks: dict[Path, NamedRank] = {}
    for of_folder in (False, True):
        for row in NAME_PATTERNS:
            left = [path for path in files if path not in ranks]
            texts = {path: folders[path] if of_folder else path.name for path in left}
            matches = {path: _matches(row, texts[path], whole=of_folder) for path in left}
            last = {path: pairs[-1] for path, pairs in matches.items() if pairs}
            if row.is_index or any(_has_zero(match) for match, _ in last.values()):
                ranks |= {path: named for path, (_, named) in last.items()}
    return ranks


def node_in_name(path: Path) -> str:
    """The node that a report is of, as its name or that of its folder says it; "" if neither."""
    node = _NODE.search(path.name) or _NODE.fullmatch(path.absolute().parent.name)
    return node[0] if node else ""


def _matches(
    row: NamePattern, text: str, *, whole: bool = False
) -> list[tuple[re.Match[str], NamedRank]]:
    matches = [row.pattern.fullmatch(text)] if whole else row.pattern.finditer(text)
    return [(match, named) for match in matches if match and (named := row.rank(match))]


def _has_zero(match: re.Match[str]) -> bool:
    return any(int(number) == 0 for number in re.findall(r"\d+", match[0]))
