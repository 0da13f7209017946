"""What a mistyped name may have been meant to be."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(given: Iterable[object], known: Iterable[str], otherwise: str = "") -> str:
    """`did you mean moe?`, of the known names nearest to those given; else `otherwise`."""
    import difflib  # only where something is wrong

    by_folded = {name.casefold(): name for name in known}
    nearest: dict[str, None] = {}
    for name in given:
        close = difflib.get_close_matches(str(name).strip().casefold(), by_folded, n=1)
        nearest.update(dict.fromkeys(by_folded[folded] for folded in close))
    return f"did you mean {' and '.join(nearest)}?" if nearest else otherwise
