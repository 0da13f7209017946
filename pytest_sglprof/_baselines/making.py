"""What a record keeps of a window: its kinds of steps, and the options that make lives comparable.

A baseline outlives versions of SGLang, which add options and change defaults; these are under
test. So only what was asked for counts, not what a server made of it, and nothing that differs
between two lives of one configuration.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from msgspec.structs import replace

from pytest_sglprof._analysis.strata import GroupStrata, StepWork, Stratum
from pytest_sglprof._redact import is_secret_env, is_secret_name, redact_command, redact_text

MIN_STEPS = 10  # of a kind of step; what is typical of fewer differs between windows of one life
MAX_KINDS = 8  # of a work group: those with the most steps
MAX_KERNELS = 200  # of a work group: those with the largest kernel time
MIN_KERNELS = 20
MAX_CELLS = 8_000  # kinds x kernels of a record
DIGITS = 6  # of a figure: far below what lives differ by


# Options that do not shape what a run measures: (names, why). The rest is in the key.
VOLATILE: tuple[tuple[str, str], ...] = (
    (r"model(_path)?|tokenizer(_path)?|served_model_name", "the model stands in the key itself"),
    (r"quantization|kv_cache_dtype|device", "they stand in the key themselves"),
    (
        r"(tp|tensor_parallel|dp|data_parallel|pp|pipeline_parallel|ep|expert_parallel)(_size)?"
        r"|(attn_dp|moe_dp|moe_data_parallel|attention_data_parallel)(_size)?|nnodes"
        r"|enable_dp_attention",
        "the sizes stand in the key themselves",
    ),
    (r"host|(.+_)?port|(.+_)?(url|addr|address|ip|endpoint)s?", "addresses differ in each life"),
    (r"node_rank|base_gpu_id|gpu_id_step|numa_node|.*_ib_device", "which devices, not which kind"),
    (
        r"(.+_)?(dir|folder|socket|filename)s?|output_file|file_storage_path|.*tokenizer_path",
        "places of one machine; of other paths the last part counts",
    ),
    (
        r"log_.+|.*_log_.+|show_time_cost|crash_dump_.+|decode_log_interval",
        "what is written to logs",
    ),
    (r"ssl_.+|fastapi_root_path|otlp_.+|trace_modules", "how it is reached and observed"),
    (r"(.+_)?timeout|run_name|tag|id|instance_id", "names, and limits that are not reached"),
    (r"launch_command|status|version|frontend|kv_events|internal_states|startup_time", "answers"),
    (r"max_total_num_tokens|max_req_input_len|_.+_explicitly_set", "what the server made of it"),
    (
        r"output_details|disable_tqdm|show_report|plot_.+|print_requests|header|profile(_.+)?"
        r"|no_append_to_github_summary|server_args_for_metrics|ready_check_timeout_sec",
        "what the load driver writes, and how it asks",
    ),
)
_VOLATILE = re.compile("|".join(f"(?:{names})" for names, _ in VOLATILE))
_OF_MACHINE = re.compile(r".*VISIBLE_DEVICES|.*(PATH|HOME|DIR|FILE|CACHE|ROOT)|HOSTNAME|TMPDIR")
_HUB = re.compile(r"models--(.+?)--(.+)")


def asked_for(words: Iterable[str]) -> dict[str, str]:
    """The options of a command line that shape a run: name -> value, "" for a flag.

    words: of which those before the first option are left out. Secrets are left out too.
    """
    options: dict[str, list[str]] = {}
    name = ""
    for word in redact_command(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = [value] if equals else []
        elif name:
            options[name].append(word)
    return shaping({name: " ".join(map(_portable, values)) for name, values in options.items()})


def shaping(options: Mapping[str, Any]) -> dict[str, str]:
    """Those of the options that shape a run, without secrets, as text."""
    return {
        name: redact_text(str(value))
        for name, value in sorted(options.items())
        if not _VOLATILE.fullmatch(name) and not is_secret_name(name)
    }


def server_options(
    args: Sequence[str], env: Iterable[tuple[str, str]], info: Mapping[str, Any]
) -> dict[str, str]:
    """What a server was asked for: its arguments, `$NAME` for variables of its environment.

    args: of a server that was started; else `/server_info` has its command, or, before SGLang
    0.5.23, only what became of it.
    """
    command = info.get("launch_command")
    if args:
        options = asked_for(args)
    elif isinstance(command, str):
        options = asked_for(_words(command))
    else:
        options = shaping({k: v for k, v in info.items() if not isinstance(v, dict | list)})
    variables = {
        f"${name}": redact_text(value)
        for name, value in env
        if not is_secret_env(name) and not _OF_MACHINE.fullmatch(name)
    }
    return options | variables


def model_name(path: str) -> str:
    """`org/name` of a model of the hub, also in its cache; else the last part of a path."""
    for part in PurePosixPath(path).parts:
        if match := _HUB.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    return _portable(path.rstrip("/"))


def _portable(value: str) -> str:
    """A path of this machine by its last part."""
    return PurePosixPath(value).name if value.startswith(("/", "~", "./")) else value


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quote that never ends
        return command.split()


# Kinds of steps.


def kept(windows: Sequence[Sequence[GroupStrata]]) -> tuple[GroupStrata, ...]:
    """What a record keeps of the strata of windows that repeat each other."""
    labels = list(dict.fromkeys(group.group for window in windows for group in window))
    merged = [
        _merged([g for window in windows for g in window if g.group == each]) for each in labels
    ]
    chosen = [_chosen(group) for group in merged]
    kinds = max(1, sum(max(1, len(group.strata)) for group in chosen))
    room = max(MIN_KERNELS, min(MAX_KERNELS, MAX_CELLS // kinds))
    return tuple(_cut(group, room) for group in chosen)


def _merged(groups: Sequence[GroupStrata]) -> GroupStrata:
    """One work group over windows: each kind of step is the mean of them, weighted by steps."""
    if len(groups) == 1:
        return groups[0]
    if any(each.steps is None for each in groups):
        return groups[0]  # as a whole a window is one step, and the calls of each differ
    names = list(dict.fromkeys(name for group in groups for name in group.kernels))
    by_work: dict[StepWork, list[tuple[GroupStrata, Stratum]]] = {}
    for group in groups:
        for stratum in group.strata:
            by_work.setdefault(stratum.work, []).append((group, stratum))
    every = [group.steps or {} for group in groups]
    return replace(
        groups[0],
        steps={
            stage: sum(each.get(stage, 0) for each in every) for steps in every for stage in steps
        },
        assigned_share=min(group.assigned_share for group in groups),
        kernels=tuple(names),
        strata=tuple(
            sorted((_mean(work, of, names) for work, of in by_work.items()), key=lambda s: -s.steps)
        ),
        left_out_strata=max(group.left_out_strata for group in groups),
        left_out_kernels=max(group.left_out_kernels for group in groups),
    )


def _mean(
    work: StepWork, parts: Sequence[tuple[GroupStrata, Stratum]], names: Sequence[tuple[str, str]]
) -> Stratum:
    strata = [stratum for _, stratum in parts]
    weights = [stratum.steps for stratum in strata]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None]
        total = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / total if total else None

    def of_kernels(figures: Sequence[Sequence[float]]) -> tuple[float, ...]:
        tables = [
            dict(zip(group.kernels, values, strict=True))
            for (group, _), values in zip(parts, figures, strict=True)
        ]
        # Not known where the list of a window was cut.
        cut = [group.left_out_kernels > 0 for group, _ in parts]
        return tuple(
            mean([t.get(n, None if c else 0.0) for t, c in zip(tables, cut, strict=True)]) or 0.0
            for n in names
        )

    categories = dict.fromkeys(name for stratum in strata for name in stratum.categories)
    calls = [stratum.calls for stratum in strata if stratum.calls is not None]
    return Stratum(
        work=work,
        steps=sum(weights),
        compute_ns=mean([stratum.compute_ns for stratum in strata]) or 0.0,
        categories={
            name: mean([stratum.categories.get(name, 0.0) for stratum in strata]) or 0.0
            for name in categories
        },
        kernels=of_kernels([stratum.kernels for stratum in strata]),
        calls=of_kernels(calls) if len(calls) == len(strata) else None,
        transfer_ns=mean([stratum.transfer_ns for stratum in strata]),
        wall_ns=mean([stratum.wall_ns for stratum in strata]),
        idle_ns=mean([stratum.idle_ns for stratum in strata]),
    )


def _chosen(group: GroupStrata) -> GroupStrata:
    """The group with those kinds of steps of which there are enough."""
    if group.steps is None:
        return group
    strata = [each for each in group.strata if each.steps >= MIN_STEPS][:MAX_KINDS]
    left = group.left_out_strata + len(group.strata) - len(strata)
    return replace(group, strata=tuple(strata), left_out_strata=left)


def _cut(group: GroupStrata, room: int) -> GroupStrata:
    """The group with its largest kernels alone, and with figures of a few digits."""
    return replace(
        group,
        kernels=group.kernels[:room],
        strata=tuple(
            replace(
                each,
                compute_ns=_rounded(each.compute_ns),
                categories={name: _rounded(ns) for name, ns in each.categories.items()},
                kernels=tuple(map(_rounded, each.kernels[:room])),
                calls=None if each.calls is None else tuple(map(_rounded, each.calls[:room])),
                transfer_ns=None if each.transfer_ns is None else _rounded(each.transfer_ns),
                wall_ns=None if each.wall_ns is None else _rounded(each.wall_ns),
                idle_ns=None if each.idle_ns is None else _rounded(each.idle_ns),
            )
            for each in group.strata
        ),
        left_out_kernels=group.left_out_kernels + max(0, len(group.kernels) - room),
        calls=group.calls[:room],
    )


def _rounded(figure: float) -> float:
    """With `DIGITS` digits that count."""
    if not figure:
        return 0.0
    return round(figure, DIGITS - 1 - math.floor(math.log10(abs(figure))))
