"""Keyword arguments of `bench_serving(...)` → the load driver's command line."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pytest_sglprof.errors import SettingsError
from pytest_sglprof.server.command import load_driver

DEFAULT_NUM_PROMPTS = 1000  # the driver's own default
# The driver's default data set is a download; this one is made from random token ids.
DEFAULT_DATASET = "random-ids"
WARM_UP_LIMIT = 64

_OWNED = {
    "host": "the address is that of the server fixture",
    "port": "the address is that of the server fixture",
    "base_url": "the address is that of the server fixture",
    "output_file": "the result is what bench_serving() returns",
}


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Refuses keywords that cannot be options of the driver, or that are not the user's.

    Names that only the driver can judge pass; see `usage_error`. Raises SettingsError.
    """
    for name, value in keywords.items():
        if name in _OWNED:
            raise SettingsError(
                f"bench_serving({name}=…) is not yours to set", expected=_OWNED[name]
            )
        if name == "profile" or name.startswith("profile_"):
            raise SettingsError(
                f"bench_serving({name}=…) would start the driver's own profiling",
                expected="windows are opened by this plugin",
                hint="use the profile_window marker or fixture: the driver sends no key to the "
                "profiler and hides its failures",
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
    """How many prompts these keywords ask for."""
    return int(keywords.get("num_prompts", DEFAULT_NUM_PROMPTS))


def target_concurrency(keywords: Mapping[str, Any]) -> int:
    """How many requests run at once when the load is steady."""
    return min(int(keywords.get("max_concurrency", num_prompts(keywords))), num_prompts(keywords))


def warm_up_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The same shape of load with just enough prompts to fill the batch once."""
    return {**keywords, "num_prompts": min(target_concurrency(keywords), WARM_UP_LIMIT)}


def bench_command(
    python: str,
    kind: Literal["sglang", "standin"],
    url: str,
    model: str,
    keywords: Mapping[str, Any],
    output_file: Path,
) -> list[str]:
    """The driver's command for one run against the server at `url`.

    python: the server's interpreter (of an SGLang server; the stand-in's driver runs in
    ours). model: "" lets the driver ask the server. True becomes a bare flag, False and
    None leave the option out, lists become several words, dicts JSON.
    Raises SettingsError for unusable keywords, ServerMissing when `python` has no driver.
    """
    check_keywords(keywords)
    command = [*_driver(python, kind), "--base-url", url, "--output-file", str(output_file)]
    defaults = {"backend": "sglang", "dataset_name": DEFAULT_DATASET}
    if model:
        defaults["model"] = model
    for name, value in {**defaults, **keywords}.items():
        command += _option(name, value)
    return command


def _option(name: str, value: Any) -> list[str]:
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


def _driver(python: str, kind: str) -> list[str]:
    if kind == "standin":
        return [sys.executable, "-m", "pytest_sglprof.standin.load_driver"]
    return [python, "-m", load_driver(python)]


def usage_error(output: str, keywords: Mapping[str, Any]) -> SettingsError | None:
    """The driver's complaint about its command line (argparse), in the user's terms.

    Names like the unknown ones are taken from the usage that the driver itself printed,
    so they are right for every version. None when `output` holds no such complaint.
    """
    complaint = re.search(r"^usage: (?:.*\n)*?.+: error: (.+)$", output, re.M)
    if not complaint:
        return None
    flags = re.findall(r"--([a-z][a-z0-9-]+)", output)
    unknown = re.findall(r"--([a-z0-9-]+)", complaint[1]) if "unrecognized" in complaint[1] else []
    names = [name.replace("-", "_") for name in unknown]
    known = sorted({flag.replace("-", "_") for flag in flags} - set(names))
    near = [match for name in names for match in difflib.get_close_matches(name, known, n=3)]
    hint = f"did you mean {_or(near)}?" if near else f"it was given {_or(sorted(keywords))}"
    asked = ", ".join(f"{name}=…" for name in names) or "…"
    return SettingsError(
        f"the load driver does not accept bench_serving({asked})", hint=hint, log=[complaint[1]]
    )


def _or(names: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(names)) or "no keywords"
