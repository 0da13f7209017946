"""Turns what SGLang's recorder of experts dumps into one small file.

It runs in the server's interpreter, since the dumps are torch files, and imports nothing of this
package:

    PYTHON convert_experts.py OUT --ranks '{"TP0 EP0": 0, "TP1 EP1": 1}' [--summed] DUMP...

--ranks: label of each rank -> its rank among those that share out the experts. --summed: each
rank counted only its own tokens (an all-to-all backend sends them to the experts' ranks), so that
the counts of all ranks are added up. Without, all ranks see the tokens of all, so that their
counts are equal, which is checked.

OUT is an .npz: `passes` (passes,) forward ids, ascending, [-1] for totals; `counts` (expert
ranks, passes, layers, experts of a rank); `logical`: which expert each is, (expert ranks, layers,
experts of a rank); `labels` and `rank_rows` (ranks,): which row of `counts` each rank has. Prints
one JSON object: `passes` and `notes`. What cannot be converted ends with status 1 and the reason
on standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]

Content = tuple[dict[str, Any], list[str]]


class CannotConvert(Exception):
    """The reason."""


def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("dumps", nargs="+")
    parser.add_argument("--ranks", type=json.loads, required=True)
    parser.add_argument("--summed", action="store_true")
    args = parser.parse_args(argv)
    try:
        dumps = [torch.load(path, weights_only=True, map_location="cpu") for path in args.dumps]
        totals = [dump for dump in dumps if "logical_count" in dump]
        convert = of_totals if totals else of_passes
        content, notes = convert(totals or dumps, args.ranks, args.summed)
    except CannotConvert as reason:
        sys.stderr.write(f"{reason}\n")
        return 1
    with Path(args.out).open("wb") as file:
        np.savez_compressed(file, **content)
    sys.stdout.write(json.dumps({"passes": len(content["passes"]), "notes": notes}) + "\n")
    return 0


def of_passes(dumps: Sequence[Any], ranks: Mapping[str, int], summed: bool) -> Content:
    """The counts of each pass (--expert-distribution-recorder-mode per_pass, per_token)."""
    notes = []
    # Rank among those of the experts -> its dumps, each {forward id: counts}.
    by_rank: dict[int, list[dict[int, Any]]] = {}
    for dump in dumps:
        counts, doubtful = counts_of(dump["records"])
        if doubtful:
            notes.append(f"{doubtful} passes have an id that is not theirs alone: left out")
        if dump["records"]:
            by_rank.setdefault(int(dump["records"][0]["rank"]), []).append(counts)
    size = max(ranks.values()) + 1
    missing = sorted(set(ranks.values()) - set(by_rank))
    if not by_rank or (missing and summed):
        raise CannotConvert(f"{len(by_rank)} of {size} ranks of experts wrote counts of passes")
    all_dumps = [counts for rank in sorted(by_rank) for counts in by_rank[rank]]
    passes = sorted(set.intersection(*(set(counts) for counts in all_dumps)))
    lost = len(set.union(*(set(counts) for counts in all_dumps))) - len(passes)
    if lost:
        notes.append(f"{lost} passes are not in the dump of every rank: left out")
    if summed:
        added = {key: sum(by_rank[rank][0][key] for rank in by_rank) for key in passes}
        all_dumps = [added]
        if any(len(counts) > 1 for counts in by_rank.values()):
            raise CannotConvert("several ranks dumped counts of the same experts")
    elif any((a[key] != all_dumps[0][key]).any() for a in all_dumps[1:] for key in passes):
        raise CannotConvert("ranks counted different tokens, though nothing sends them to others")
    whole = all_dumps[0]
    passes = [key for key in passes if whole[key].any()]  # else of a draft, which is not recorded
    if not passes:
        raise CannotConvert("no pass was recorded")
    placed = dumps[0]["last_physical_to_logical_map"].numpy()
    stacked = np.stack([whole[key] for key in passes])
    return shared_out(passes, stacked, placed, ranks, missing, notes)


def counts_of(records: Sequence[Mapping[str, Any]]) -> tuple[dict[int, Any], int]:
    """{forward id: counts (layers, experts)}, and how many ids have several.

    A draft model has ids of its own, and counts of zero where it is not recorded.
    """
    counted: dict[int, Any] = {}
    doubtful: set[int] = set()
    for record in records:
        key, counts = int(record["forward_pass_id"]), record["global_physical_count"].numpy()
        if key in counted and counts.any():
            if counted[key].any():
                doubtful.add(key)
            counted[key] = counts
        counted.setdefault(key, counts)
    return {key: counts for key, counts in counted.items() if key not in doubtful}, len(doubtful)


def of_totals(dumps: Sequence[Any], ranks: Mapping[str, int], summed: bool) -> Content:
    """The totals of a recorder in the mode stat, whose ranks' counts are added up already."""
    counts = dumps[0]["logical_count"].numpy().astype(np.int64)
    notes = []
    if counts.any(axis=(1, 2)).all():
        notes.append(f"the server keeps {len(counts)} passes: earlier ones are not in the totals")
    total = counts.sum(axis=0)
    if not summed:
        if (total % len(ranks)).any():
            raise CannotConvert("the totals are not those of ranks that see the same tokens")
        total //= len(ranks)
    placed = np.tile(np.arange(total.shape[1]), (total.shape[0], 1))
    return shared_out([-1], total[None], placed, ranks, [], notes)


def shared_out(
    passes: Sequence[int],
    counts: Any,
    placed: Any,
    ranks: Mapping[str, int],
    missing: Sequence[int],
    notes: list[str],
) -> Content:
    """Gives each rank its experts. counts: (passes, layers, experts); placed: which each is."""
    size = max(ranks.values()) + 1
    if counts.shape[2] % size:
        raise CannotConvert(f"{counts.shape[2]} experts cannot be shared out to {size} ranks")
    known = {label: row for label, row in ranks.items() if row not in missing}
    if missing:
        notes.append(f"{len(ranks) - len(known)} ranks wrote no counts")
    rows = sorted(set(known.values()))
    parts = np.stack(np.split(counts, size, axis=2))[rows]
    return {
        "passes": np.array(passes, np.int64),
        "counts": parts.astype(np.int32 if parts.max(initial=0) < 2**31 else np.int64),
        "logical": np.stack(np.split(placed, size, axis=1))[rows].astype(np.int32),
        "labels": np.array(list(known)),
        "rank_rows": np.array([rows.index(row) for row in known.values()], np.int64),
    }, notes


if __name__ == "__main__":
    sys.exit(main())
