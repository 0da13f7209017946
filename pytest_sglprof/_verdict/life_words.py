"""The sentences of verdicts between server lives."""

from __future__ import annotations

from pytest_sglprof._analysis.certainty import Interval
from pytest_sglprof._analysis.lives import LifeChange
from pytest_sglprof._baselines.figures import Figure
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._metrics import LOAD_WORDS, METRICS, VerdictWord
from pytest_sglprof._verdict.wording import beside_limit, count, duration, percent, sentence_of

_LIFE = ("life", "lives")
_HUGE = 10  # a ratio beyond which it does not matter what is seen


def figure_label(figure: Figure) -> str:
    """`moe in decode`, `/fused_moe/`, `pass_wall`: as a key of `regression={…}` names it."""
    what = f"/{figure.kernel}/" if figure.kernel else figure.name
    return f"{what} in {figure.stage}" if figure.stage else what


def change_sentence(
    figure: Figure, threshold: Threshold, change: LifeChange, before: float, now: float
) -> str:
    """`compute is 1.15x as long as in the accepted lives (limit 1.05): 812 µs → 934 µs a step…`."""
    metric = METRICS[threshold.metric]
    return sentence_of(metric, change_facts(figure, threshold, change, before, now))


def change_facts(
    figure: Figure, threshold: Threshold, change: LifeChange, before: float, now: float
) -> dict[str, str]:
    """The fields that the sentence of a metric of `lives` can use.

    subject: `moe of decode steps`. much: `long`, `high` or `low`. before, now: what is typical of
    accepted and of new lives. over: `, 1 new life beside 10 accepted ones`.
    """
    shown, limit = beside_limit(METRICS[threshold.metric], change.ratio, threshold.limit)
    of_steps = not figure.is_of_load and figure.name != "idle_share"
    return {
        "subject": _subject(figure),
        "value": shown,
        "limit": limit,
        "much": _much(figure),
        "before": amount(figure, before),
        "now": amount(figure, now) + (" a step" if of_steps else ""),
        "over": f", {count(change.fresh, 'new life', 'new lives')} beside "
        f"{change.accepted} accepted",
    }


def _subject(figure: Figure) -> str:
    if figure.is_of_load:
        return LOAD_WORDS.get(figure.name, figure.name)
    of = f" of {figure.stage} steps" if figure.stage else ""
    if figure.kernel:
        return f"time in kernels like /{figure.kernel}/{of}"
    if figure.name == "pass_wall":
        return f"a {figure.stage} step" if figure.stage else "a step"
    if figure.name == "idle_share":
        return f"the busy share{of or ' of steps'}"
    if figure.name == "communication":
        return f"transfer in communication{of}"
    return f"{figure.name}{of}"


def _much(figure: Figure) -> str:
    if figure.is_of_load:
        return "low" if METRICS[figure.name].better == "higher" else "high"
    return "low" if figure.name == "idle_share" and not figure.kernel else "long"


def amount(figure: Figure, value: float) -> str:
    """`812 µs`, `20.3 % idle`, `1,512 tokens/s`."""
    if figure.is_of_load:
        return METRICS[figure.name].format(value, finer=1)
    if figure.name == "idle_share" and not figure.kernel:
        return f"{percent(value, 1)} idle"
    return duration(value)


def after_change(word: VerdictWord, threshold: Threshold, ratio: float, ends: Interval) -> str:
    """How certain it is: `; surely above 1.09`, `; at most 1.031`, or why that is not enough."""
    metric = METRICS[threshold.metric]
    low, high = (f"{end:.3f}" for end in ends)
    if word == "fail":
        return f"; surely above {low}"
    if word == "pass":
        return f"; at most {high}"
    if metric.is_beyond(ratio, threshold.limit):
        return f"; that may be chance: it may be {low} to {high}"
    bound = metric.pass_bound(threshold.limit)
    return f"; a pass must be surely below {bound:.3f}: it may be {low} to {high}"


def small_change(difference_ns: float, min_us: float) -> str:
    """`+0.41 µs a step, below the 2 µs that the threshold asks for`."""
    return f"{difference_ns / 1000:+.2f} µs a step, below the {min_us:g} µs that count"


def detection(change: LifeChange, detects: float | None) -> str:
    """`with 10 accepted lives (sd 0.9 %) this sees +7.9 % or more`."""
    if detects is None:
        return ""
    lives = count(change.accepted, *_LIFE).replace(" ", " accepted ", 1)
    sees = f"+{percent(detects - 1, 1)} or more" if detects < _HUGE else f"nothing below {_HUGE}x"
    return f"with {lives} (sd {percent(change.sd, 1)}) this sees {sees}"


def covers_little(share: float, others: str) -> str:
    """What is compared is less than half of what ran."""
    return (
        f"compared are kinds of steps that take {percent(share)} of the time, "
        f"not in all lives: {others}"
    )


def below_floor(limit: float, floor: float) -> str:
    """The limit is below what lives of one version show."""
    return (
        f"the limit {limit:g} is below what this machine shows between lives of one version "
        f"(+{percent(floor - 1, 1)})"
    )


def load_sentence(
    threshold: Threshold, value: float, lives: int, ends: Interval | None, word: VerdictWord
) -> str:
    """`the p99 of the time to the first token is 412.0 ms (limit 400.0 ms) in 1 life`."""
    metric = METRICS[threshold.metric]
    text = metric.sentence.format(**load_facts(threshold, value, lives))
    if ends is None or word != "inconclusive":
        return text
    low, high = (metric.format(end, finer=1) for end in ends)
    return f"{text}; that may be chance: it may be {low} to {high}"


def load_facts(threshold: Threshold, value: float, lives: int) -> dict[str, str]:
    """The fields that the sentence of a metric of `load` can use."""
    shown, limit = beside_limit(METRICS[threshold.metric], value, threshold.limit)
    over = f" in {count(lives, *_LIFE)}"
    subject = LOAD_WORDS[threshold.metric]
    return {"subject": subject, "value": shown, "limit": limit, "over": over}
