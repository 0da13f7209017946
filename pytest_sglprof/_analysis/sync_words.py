"""What ranks with different input cost each other, in one sentence, and what it names.

Shares, load and speed come from `sync`; here is what of them is worth saying, in which words, and
which of SGLang's options acts on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pytest_sglprof._analysis.certainty import Amount, Count, Share
from pytest_sglprof._ranks import short_labels

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._analysis.busy import Ints
    from pytest_sglprof._analysis.load_split import CategorySplit, Driver, Part
    from pytest_sglprof._analysis.sync import RankSplit, SyncCost, SyncFinding

UNITS: dict[Driver, str] = {
    "KV tokens": "Σ KV",
    "query-key pairs": "Σ query·key",
    "graph batch": "graph batch",
    "tokens": "tokens",
    "expert tokens": "expert tokens",
    "requests": "requests",
}
REMEDIES: dict[Driver, str] = {
    "KV tokens": "--load-balance-method total_tokens",
    "query-key pairs": "--load-balance-method total_tokens",
    "tokens": "--load-balance-method total_tokens",
    "graph batch": "--load-balance-method total_requests",
    "requests": "--load-balance-method total_requests",
    "expert tokens": "--enable-eplb",
}
MUCH_PUSHED_OUT = 0.05  # of the passes
MUCH_PADDING = 0.01  # of GPU time
NAMED_SHARE = 0.2  # of a difference: what makes less is not named
NAMED_UNKNOWN = 0.1  # of what is not known: categories that make less are not named
AS_FAST = 0.02  # a speed that is surely within 1 ± this is that of the peers
HOT = 3.0  # times the mean of the experts of its layer
MOST_HOT = 8  # experts that are listed
DISAGREE = 1.5  # times: two measures of one waiting that differ by more
MUCH_IDLE = 0.05  # of the wall: measures that are both less are not worth a word


class HotExpert(msgspec.Struct, frozen=True, kw_only=True):
    """An expert that gets far more than others of its layer. share: of all tokens that they get.

    times: how many times their mean. rank: where it is; None in older documents.
    """

    layer: Count
    expert: Count
    share: Share
    times: Amount
    rank: str | None = None


class HeadWait(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank waits before a pass, by two measures, ns a pass.

    idle_ns: its GPU idles at the head of a pass while a peer works; wall_ns: the wall of a pass;
    both means of so many traced passes. waited_ns: its scheduler waits for its peers to say what
    they run (`sglang:dp_attention_sync_wait_seconds`), mean of waited_passes, of which those of the
    trace are a part. long_waits: how many of these were above 0.1 s; as waits behind the export of
    a trace are so long, nothing is compared then.
    """

    rank: str
    idle_ns: float
    wall_ns: float
    passes: Count
    waited_ns: float
    waited_passes: Count
    long_waits: Count

    @property
    def disagrees(self) -> bool:
        """Whether the measures differ, where either of them matters."""
        less, more = sorted((self.idle_ns, self.waited_ns))
        return not self.long_waits and more > max(MUCH_IDLE * self.wall_ns, DISAGREE * less)


def head_words(heads: Sequence[HeadWait]) -> str:
    """Which rank's measures differ most, and what that says; "" where none does."""
    differing = [each for each in heads if each.disagrees]
    if not differing:
        return ""
    worst = max(differing, key=lambda each: abs(each.idle_ns - each.waited_ns))
    name = short_labels([each.rank for each in heads])[worst.rank]
    idle = f"{worst.idle_ns / 1e3:,.0f} µs a pass (mean of {worst.passes:,} traced ones)"
    waited = f"{worst.waited_ns / 1e3:,.0f} µs (SGLang's measure, mean of {worst.waited_passes:,})"
    if worst.idle_ns > worst.waited_ns:
        return (
            f"the GPU of {name} idles beside busy peers for {idle}, but its scheduler waits "
            f"for peers only {waited}: the rest is its own launching, or not in these passes"
        )
    return (
        f"the scheduler of {name} waits for peers {waited}, but its GPU idles beside "
        f"busy peers only {idle}: the rest is beneath its work, while all idle, or not in these "
        "passes"
    )


def hot_experts(experts: pd.DataFrame, numbers: Ints) -> tuple[HotExpert, ...]:
    """The experts with at least `HOT` times the mean of their layer, the largest multiple first.

    experts: `KernelTable.experts`, of which the passes `numbers` count (totals where the recorder
    kept only these). An expert with copies on other ranks is no single rank's, and left out.
    """
    counted = experts[experts["step"].isin(numbers) | (experts["step"] < 0)]
    if counted.empty:
        return ()
    by_rank = counted.groupby(["layer", "expert", "rank"], observed=True)["tokens"].sum()
    sums = by_rank.reset_index()
    sums["total"] = sums.groupby(["layer", "expert"])["tokens"].transform("sum")
    sums["of_layer"] = sums.groupby("layer")["tokens"].transform("sum")
    sums["experts"] = sums.groupby("layer")["expert"].transform("nunique")
    whole = sums[(sums["tokens"] == sums["total"]) & (sums["of_layer"] > 0)]
    shares = (whole["tokens"] / whole["of_layer"]).to_numpy()
    times = shares * whole["experts"].to_numpy()
    hottest = (int(at) for at in np.argsort(-times, kind="stable") if times[at] >= HOT)
    return tuple(
        HotExpert(
            layer=int(whole["layer"].iloc[at]),
            expert=int(whole["expert"].iloc[at]),
            share=float(shares[at]),
            times=float(times[at]),
            rank=str(whole["rank"].iloc[at]),
        )
        for at in hottest
    )


def sentence_of(finding: SyncFinding) -> str:
    """`18 % of GPU time waits, most of it for DP3; load (Σ KV 1.60x) explains 94 ± 4 % of …`."""
    top = next((each for each in finding.ranks if each.rank == finding.latest), None)
    names = short_labels([each.rank for each in finding.ranks])
    parts = [_cost_words(finding.cost, top, names)]
    if top is not None:
        parts += [*_load_words(top, finding), _speed_words(top)]
    every = sum(finding.kinds.values())
    if finding.pushed_out > MUCH_PUSHED_OUT * max(every, 1):
        parts.append(
            f"in {finding.pushed_out} of {every} passes ranks decode without a graph, since "
            "another prefills (see SGLang's --enable-prefill-delayer)"
        )
    parts += [_calls_words(finding, names), head_words(finding.heads)]
    return "; ".join(part for part in parts if part)


def _cost_words(cost: SyncCost | None, top: RankSplit | None, names: dict[str, str]) -> str:
    known = [] if cost is None else [part for part in (cost.waiting, cost.idle) if part is not None]
    words = []
    if known:
        words.append(f"{100 * sum(known):.1f} % of GPU time waits{_whom(top, names)}")
    elif top is not None:
        words.append(f"{names[top.rank]} computes longest")
    if cost is not None and cost.padding is not None and cost.padding >= MUCH_PADDING:
        words.append(f"{100 * cost.padding:.1f} % computes rows of padding")
    return ", ".join(words)


def _whom(top: RankSplit | None, names: dict[str, str]) -> str:
    if top is None:
        return ""
    if top.waits_for is None:
        return f"; {names[top.rank]} computes longest"
    if top.waits_for > 0.5:
        return f", most of it for {names[top.rank]}"
    return f", most often for {names[top.rank]} ({100 * top.waits_for:.0f} % of it)"


def _load_words(top: RankSplit, finding: SyncFinding) -> list[str]:
    """What load explains of a rank's difference, with the driver that explains most."""
    unknown = _unknown_words(top)
    share = top.load_share
    words = ""
    if share is not None and top.is_load_known:
        main = _main(top)
        if share.ns >= NAMED_SHARE and main is not None and main.driver is not None:
            what = UNITS[main.driver]
            remedy = REMEDIES[main.driver]
            words = (
                f"load ({what} {main.ratio:.2f}x) explains {_percents(share)} of its longer "
                f"compute{_hot_words(finding, main.driver)} (see SGLang's {remedy})"
            )
        elif share.bounds[0] > 0:
            words = f"load explains {_percents(share)} of its longer compute"
        elif not unknown:
            words = "its load is no greater"
    elif top.is_load_known and not unknown:
        low, high = top.load.bounds
        is_sure = low > 0 or high < 0
        reach = f"{_microseconds(top.load.ns)} ± {(high - low) / 2e3:,.0f} µs a pass"
        words = f"load makes {reach} of its compute" if is_sure else "its load is no greater"
    return [words, unknown]


def _main(top: RankSplit) -> CategorySplit | None:
    """The category and kind of pass whose load explains most."""
    known = [each for each in top.categories if each.load is not None and each.ratio is not None]
    return max(known, key=lambda each: each.load.ns * each.passes if each.load else 0, default=None)


def _hot_words(finding: SyncFinding, driver: Driver) -> str:
    hot = finding.hot
    if hot is None or driver != "expert tokens":
        return ""
    return (
        f": layer {hot.layer} expert {hot.expert} gets {100 * hot.share:.0f} % of the tokens of "
        f"its layer, {hot.times:.1f} times the mean"
    )


def _unknown_words(top: RankSplit) -> str:
    """`412 µs a pass in moe are not explained: how many tokens …`; "" where that is little."""
    if top.unknown_ns <= NAMED_SHARE * abs(top.difference_ns):
        return ""
    every = sum({each.kind: each.passes for each in top.categories}.values())
    by_reason: dict[str, dict[str, float]] = {}
    for each in top.categories:
        if each.load is None:
            sums = by_reason.setdefault(each.reason, {})
            more = each.difference_ns * each.passes / every
            sums[each.category] = sums.get(each.category, 0.0) + more
    words = []
    for reason, sums in by_reason.items():
        large = {name: ns for name, ns in sums.items() if ns > NAMED_UNKNOWN * top.unknown_ns}
        if large:
            where = _listed(sorted(large, key=lambda name: -large[name]))
            us = f"{sum(large.values()) / 1e3:,.0f} µs a pass"
            words.append(f"{us} in {where} are not explained: {reason}")
    return "; ".join(words)


def _speed_words(top: RankSplit) -> str:
    if top.speed_ratio is None or top.speed_interval is None:
        return ""
    low, high = top.speed_interval
    shown = f"{top.speed_ratio:.2f}x"
    if not top.slower_in and low >= 1 - AS_FAST and high <= 1 + AS_FAST:
        return f"as fast as its peers at the same work ({shown})"
    if low <= 1 <= high:
        return f"at the same work it takes {shown} as long (may be {low:.2f} to {high:.2f})"
    return f"at the same work it takes {shown} as long{_slower_words(top)}"


def _slower_words(top: RankSplit) -> str:
    if not top.slower_in:
        return ""
    if len(top.slower_in) == 1:
        return f", in {top.slower_in[0]} alone (a kernel rather than the GPU)"
    return f", in {_listed(top.slower_in)} (the GPU itself)"


def _calls_words(finding: SyncFinding, names: dict[str, str]) -> str:
    """`DP1 runs 32 sqrt calls a pass, its peers 16`."""
    if not finding.differing or len(finding.differing[0].calls) != len(finding.ranks):
        return ""
    first = finding.differing[0]
    calls = list(first.calls)
    middle = float(np.median(calls))
    # The one that is off; of two ranks the one with more.
    at = max(range(len(calls)), key=lambda rank: (abs(calls[rank] - middle), calls[rank]))
    rest = calls[:at] + calls[at + 1 :]
    peers = " to ".join(dict.fromkeys(f"{number:.4g}" for number in (min(rest), max(rest))))
    name = names[finding.ranks[at].rank]
    return f"{name} runs {calls[at]:.4g} {first.kernel} calls a pass, its peers {peers}"


def _percents(share: Part) -> str:
    low, high = share.bounds
    return f"{100 * share.ns:.0f} ± {50 * (high - low):.0f} %"


def _microseconds(ns: float) -> str:
    return f"{ns / 1e3:+,.0f}".replace("-", "−")


def _listed(words: Sequence[str]) -> str:
    """`gemm, norm and quantization`."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)
