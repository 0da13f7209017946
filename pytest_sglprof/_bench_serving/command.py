"""Turns keywords of `bench_serving(...)` into the load driver's command, and reads its result."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_sglprof._config.model import LauncherName
from pytest_sglprof._errors import LoadError, SettingsError
from pytest_sglprof._limits import UNDECODABLE, refuse_deep, why_undecodable
from pytest_sglprof._redact import redact
from pytest_sglprof._server.command import LAUNCHERS


@dataclass(frozen=True)
class LoadResult:
    """What the load driver measured. Times in ms, rates per second, `duration` in s.

    requested, completed: numbers of requests. ttft, tpot, itl, e2e: statistic name
    ("mean", "median", "p90", "p95", "p99") -> ms. A figure that the driver's record lacks, or
    that is infinite there, is None. raw: that record, redacted. started: Unix time in s at
    which the driver of the measured load was started; None if the record came from a file.
    ttfts: ms, of each request that completed, in the order in which they were sent; empty
    unless the load was driven at a fixed rate.
    """

    __module__ = "pytest_sglprof"

    requested: int
    completed: int
    duration: float
    request_throughput: float | None
    output_throughput: float | None
    total_throughput: float | None
    concurrency: float | None
    ttft: Mapping[str, float | None]
    tpot: Mapping[str, float | None]
    itl: Mapping[str, float | None]
    e2e: Mapping[str, float | None]
    command: tuple[str, ...] = ()
    warmed_up: bool = True
    cache_flushed: bool = True
    raw: Mapping[str, Any] = field(default_factory=dict)
    started: float | None = None
    ttfts: tuple[float, ...] = ()


DEFAULT_NUM_PROMPTS = 1000  # the driver's own default
# The driver's default data set is a download; this one is made from random token ids.
DEFAULT_DATASET = "random-ids"
WARM_UP_LIMIT = 64

_OWNED = {
    "host": "the address is that of the server fixture",
    "port": "the address is that of the server fixture",
    "base_url": "the address is that of the server fixture",
    "output_file": "the result is what bench_serving() returns",
    "steady_state_output_file": "its figures are in the result: raw['steady_state']",
}
# With this keyword SGLang's driver also measures the longest span of nearly full concurrency.
STEADY = "steady_state_concurrency_ratio"
_STEADY_DRIVERS = {"sglang.benchmark.serving": "sglang.benchmark.steady_state_serving"}


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Raises SettingsError for keywords that cannot be options, or that the plugin sets.

    Whether the driver has an option is only known from its output, see `usage_error`.
    """
    for name, value in keywords.items():
        if name in _OWNED:
            raise SettingsError(
                f"bench_serving({name}=…) is set by pytest-sglprof", expected=_OWNED[name]
            )
        if name == "profile" or name.startswith("profile_"):
            raise SettingsError(
                f"bench_serving({name}=…) would let the driver start a profile",
                expected="windows that pytest-sglprof opens",
                hint="use the profile_window marker or fixture: the driver sends no key when it "
                "starts a profile, and hides failures",
            )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise SettingsError(
                f"bench_serving({name}=…) is not an option of the load driver",
                expected="lower-case names with _ for -, such as num_prompts",
            )
        if name in ("num_prompts", "max_concurrency") and not _is_count(value):
            raise SettingsError(
                f"bench_serving({name}={value!r})", expected="a whole number of at least 1"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def num_prompts(keywords: Mapping[str, Any]) -> int:
    """The number of prompts that these keywords ask for."""
    return int(keywords.get("num_prompts", DEFAULT_NUM_PROMPTS))


def target_concurrency(keywords: Mapping[str, Any]) -> int:
    """The number of requests that run at once when the load is steady."""
    return min(int(keywords.get("max_concurrency", num_prompts(keywords))), num_prompts(keywords))


def warm_up_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a load of the same shape with just enough prompts to fill the batch."""
    return {**keywords, "num_prompts": warm_up_prompts(keywords)}


def warm_up_prompts(keywords: Mapping[str, Any]) -> int:
    """How many prompts a warm-up sends."""
    return min(target_concurrency(keywords), WARM_UP_LIMIT)


def load_shape(keywords: Mapping[str, Any]) -> str:
    """What loads have in common that differ only in how many requests they send."""
    shape = without(keywords, ("num_prompts", "max_concurrency", "seed"))
    return json.dumps(shape, sort_keys=True, default=repr)


DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")


def measured_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of the measured load: one at a fixed rate also tells each request's TTFT.

    Whether the queue grows is seen from these. The driver writes them after it has measured.
    """
    rate = keywords.get("request_rate")
    is_fixed = isinstance(rate, int | float) and math.isfinite(rate)
    return {**({"output_details": True} if is_fixed else {}), **keywords}


def bench_command(
    python: str,
    kind: LauncherName,
    url: str,
    model: str,
    keywords: Mapping[str, Any],
    output_file: Path,
) -> list[str]:
    """The driver's command for one run against the server at `url`.

    python: the server's interpreter. kind: the server's, which has a row in `LAUNCHERS`.
    model: with "" the driver asks the server. A keyword that is True becomes a flag, False and
    None leave the option out, lists become several words, dicts JSON.
    Raises SettingsError for unusable keywords, ServerMissing if `python` has no driver.
    """
    check_keywords(keywords)
    command = LAUNCHERS[kind].load_driver(python)
    if STEADY in keywords:
        *start, module = command
        if module not in _STEADY_DRIVERS:
            raise SettingsError(
                f"bench_serving({STEADY}=…): {module} has no such option",
                expected="SGLang 0.5.19 or newer, which has sglang.benchmark.steady_state_serving",
                hint="leave it out: the figures of the whole load are measured by any version",
            )
        command = [*start, _STEADY_DRIVERS[module], "--steady-state-output-file", str(output_file)]
    command += ["--base-url", url, "--output-file", str(output_file)]
    defaults = {"backend": "sglang", "dataset_name": DEFAULT_DATASET}
    if model:
        defaults["model"] = model
    for name, value in {**defaults, **keywords}.items():
        command += option_words(name, value)
    return command


def option_words(name: str, value: Any) -> list[str]:
    """The words of one option, from a keyword and its value; see `bench_command`."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    text = str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def usage_error(
    output: str, keywords: Mapping[str, Any], call: str = "bench_serving(…)"
) -> SettingsError | None:
    """The driver's complaint about its command line (argparse), in terms of the keywords.

    Similar names come from the usage that the driver printed, so they fit its version. None if
    `output` has no such complaint. call: that has the keywords, with … in their place.
    """
    complaint = re.search(r"^usage: (?:.*\n)*?.+: error: (.+)$", output, re.M)
    if not complaint:
        return None
    if f"invalid choice: '{DEFAULT_DATASET}'" in complaint[1] and "dataset_name" not in keywords:
        return SettingsError(
            f"the load driver of this version has no data set {DEFAULT_DATASET}, and its others "
            "are downloads",
            expected="a data set that is named: its `random` takes its prompts from ShareGPT, "
            "which it downloads unless dataset_path has it",
            hint=call.replace("…", "dataset_name='random', dataset_path='sharegpt.json', …"),
            log=[complaint[1]],
        )
    flags = re.findall(r"--([a-z][a-z0-9-]+)", output)
    unknown = re.findall(r"--([a-z0-9-]+)", complaint[1]) if "unrecognized" in complaint[1] else []
    names = [name.replace("-", "_") for name in unknown]
    known = sorted({flag.replace("-", "_") for flag in flags} - set(names))
    near = [match for name in names for match in difflib.get_close_matches(name, known, n=3)]
    hint = f"did you mean {_or(near)}?" if near else f"its keywords were {_or(sorted(keywords))}"
    asked = ", ".join(f"{name}=…" for name in names) or "…"
    return SettingsError(
        f"the load driver does not accept {call.replace('…', asked)}",
        hint=hint,
        log=[complaint[1]],
    )


def _or(names: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(names)) or "no keywords"


# Reading the load driver's record, one line of JSON.

STATISTICS = ("mean", "median", "p90", "p95", "p99")
_REASON_LINES = 12
_BAR = re.compile(r"(\d+)/(\d+) \[")


def parse_result(
    line: str,
    *,
    requested: int,
    command: tuple[str, ...] = (),
    warmed_up: bool = True,
    cache_flushed: bool = True,
    started: float | None = None,
    drop: Sequence[str] = (),
) -> LoadResult:
    """The result in one line of the driver's output file.

    The line may hold `Infinity` and `NaN`, which Python writes into JSON. `raw` is the record
    in strict JSON: secrets are hidden, such numbers are strings, and `server_info` (hundreds
    of settings that are recorded with the server) is left out. requested: how many requests
    were asked for; if more were completed (several turns per prompt), that number counts.
    drop: further keys that `raw` does not keep.
    Raises LoadError if `line` is not such a record.
    """
    record = json_record(line)
    completed, duration = parse_figure(record, "completed"), parse_figure(record, "duration")
    if completed is None or duration is None or not 0 <= completed < 2**53 or duration < 0:
        raise _not_a_record(line, '"completed" or "duration" is missing or impossible')
    completed = int(completed)
    return LoadResult(
        requested=max(requested, completed),
        completed=completed,
        duration=duration,
        request_throughput=parse_figure(record, "request_throughput"),
        output_throughput=parse_figure(record, "output_throughput"),
        total_throughput=parse_figure(record, "total_throughput"),
        concurrency=parse_figure(record, "concurrency"),
        ttft=_statistics(record, "ttft"),
        tpot=_statistics(record, "tpot"),
        itl=_statistics(record, "itl"),
        e2e=_statistics(record, "e2e_latency"),
        command=command,
        warmed_up=warmed_up,
        cache_flushed=cache_flushed,
        started=started,
        ttfts=_ttfts(record),
        raw=strict_json(redact(without(record, ("server_info", *drop)))),
    )


def json_record(line: str) -> dict[str, Any]:
    """The record in one line of a driver's output file; LoadError if it is none."""
    try:
        record = json.loads(line)
        refuse_deep(record)
    except UNDECODABLE as error:
        raise _not_a_record(line, why_undecodable(error)) from None
    if not isinstance(record, dict):
        raise _not_a_record(line, "it is not an object of JSON")
    return record


def _not_a_record(line: str, why: str) -> LoadError:
    return LoadError(
        f"the load driver's result cannot be read: {why}",
        expected='a line of JSON with at least "completed" and "duration"',
        log=[line[:200]],
    )


def record_line(text: str) -> str:
    """The last run in the driver's output file, with the figures of its steady state within.

    Those are a line of their own, below that of the run.
    """
    lines = text.strip().split("\n")
    with contextlib.suppress(IndexError, TypeError, *UNDECODABLE):
        steady = json.loads(lines[-1])
        if "concurrency_ratio" in steady:
            return json.dumps({**json.loads(lines[-2]), "steady_state": steady})
    return lines[-1]


def without(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """`record` without `keys`."""
    return {key: value for key, value in record.items() if key not in keys}


def _ttfts(record: Mapping[str, Any]) -> tuple[float, ...]:
    """ms, of each completed request in order; the driver writes 0 s for one that failed."""
    listed = record.get("ttfts")
    seconds = (_finite(item) for item in (listed if isinstance(listed, list) else ()))
    return tuple(1000.0 * each for each in seconds if each is not None and each > 0)


def _statistics(record: Mapping[str, Any], name: str) -> dict[str, float | None]:
    return {statistic: parse_figure(record, f"{statistic}_{name}_ms") for statistic in STATISTICS}


def parse_figure(record: Mapping[str, Any], key: str) -> float | None:
    """A number of a driver's record; None if it is missing or not finite."""
    return _finite(record.get(key))


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):  # a whole number may have hundreds of digits
        return float(value) if math.isfinite(value) else None
    return None


def strict_json(value: Any) -> Any:
    """`value` as strict JSON requires it: a number that does not fit into 64 bits is a string.

    Python's `json` also reads infinite and undefined numbers, whole ones of any length, and
    halves of characters, for which a question mark stands.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {strict_json(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict_json(item) for item in value]
    return value


def redact_record(text: str, drop: Sequence[str] = ()) -> str:
    """The driver's output file with secrets hidden, without the keys in `drop`.

    Lines that are not JSON objects are dropped.
    """
    kept = []
    for line in text.splitlines():
        # A driver that was killed may leave half a line, in which secrets cannot be hidden.
        with contextlib.suppress(AttributeError, *UNDECODABLE):
            kept.append(json.dumps(redact(without(json.loads(line), drop))) + "\n")
    return "".join(kept)


def requested_of(output: str, asked: int) -> int:
    """How many requests the driver was to send: the total of its last progress bar, or `asked`.

    A data set may hold fewer prompts than were asked for; the missing ones have not failed.
    """
    bars = _BAR.findall(output)
    return int(bars[-1][1]) if bars else asked


def progress_of(output: str, requests: int) -> str:
    """` 18/24`, from the driver's newest progress bar of so many requests; "" before that."""
    done = [done for done, total in _BAR.findall(output) if int(total) == requests]
    return f" {done[-1]}/{requests}" if done else ""


def reason(output: str) -> list[str]:
    """Lines of the driver's output that say why it failed: its last traceback, or its end."""
    lines = [line for line in re.split(r"[\r\n]+", output) if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call")]
    if not starts:
        return lines[-6:]
    block = lines[starts[-1] :]
    # The exception follows the last indented line; later lines are from the clean-up.
    last = max((i for i, line in enumerate(block) if line.startswith(" ")), default=0)
    return block[: last + 2][-_REASON_LINES:]


# Keywords of `bench_serving` for loads that are equal or unequal on purpose.


def balanced_load(
    *, concurrency: int = 32, requests: int = 256, input_len: int = 256, output_len: int = 256
) -> dict[str, Any]:
    """Requests of one length, of which the server gives each DP rank equally many.

    concurrency: in flight, over all ranks. input_len, output_len: tokens.
    """
    return {
        "num_prompts": requests,
        "max_concurrency": concurrency,
        "random_input_len": input_len,
        "random_output_len": output_len,
        "random_range_ratio": 1.0,
    }


def one_rank_load(rank: int = 0, *, field: str = "routed_dp_rank", **shape: int) -> dict[str, Any]:
    """All requests to one DP rank. shape: keywords of `balanced_load`.

    field: the request's field for the rank; before SGLang 0.5.23 `data_parallel_rank`.
    """
    return {**balanced_load(**shape), "extra_request_body": {field: rank}}


def uneven_load(**shape: int) -> dict[str, Any]:
    """Requests of lengths between 1 and the full length: ranks get equally many requests, but
    different work. The driver shuffles them, so that long and short ones follow each other by
    chance. shape: keywords of `balanced_load`.
    """
    return {**balanced_load(**shape), "random_range_ratio": 0.0}


def routing_key_load(
    *, groups: int = 16, requests: int = 256, concurrency: int = 32, skew: float = 1.5
) -> dict[str, Any]:
    """Requests of a few users, most of them from one; a request's routing key is its user.

    For a server behind SGLang's router, which sends equal keys to the same rank. Needs
    SGLang's load driver. skew: exponent of the Zipf distribution of users, above 0.
    """
    return {
        "dataset_name": "generated-shared-prefix",
        "num_prompts": requests,
        "max_concurrency": concurrency,
        "gsp_num_groups": groups,
        "gsp_prompts_per_group": max(1, requests // groups),
        "gsp_group_distribution": "zipf",
        "gsp_zipf_alpha": skew,
        "gsp_send_routing_key": True,
    }
