"""Thresholds of server lives and of the load: what they can be of, and what is refused."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli import check as command
from pytest_sglprof._config.load import Settings, build_settings, load_config, resolve_options
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._config.thresholds import thresholds_from_keywords
from pytest_sglprof._config.windows import window_spec
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._metrics import METRICS
from pytest_sglprof._trace.categories import CATEGORY_NAMES
from pytest_sglprof._verdict.judge import judge, of_windows
from tests.support.kernel_tables import build


@pytest.mark.parametrize(
    ("limits", "described"),
    [
        (1.05, "regression of compute <= 1.05"),
        ({"moe": 1.1}, "regression of moe <= 1.1"),
        ({"moe in decode": 1.1}, "regression of moe in decode <= 1.1"),
        ({"pass_wall in prefill": 1.1}, "regression of pass_wall in prefill <= 1.1"),
        ({"/fused_moe/": 1.2}, "regression of kernel /fused_moe/ <= 1.2"),
        ({"ttft_p99": 1.1}, "regression of ttft_p99 <= 1.1"),
        ({"output_throughput": 1.1}, "regression of output_throughput <= 1.1"),
    ],
)
def test_regression_is_of_scopes_kernels_steps_and_loads(limits: Any, described: str) -> None:
    (threshold,) = thresholds_from_keywords(
        {"regression": limits}, "here", categories=CATEGORY_NAMES
    )
    assert threshold.describe() == described


def test_load_metrics_take_a_number_alone() -> None:
    keywords = {"ttft_p99": 300, "output_throughput": 1500}
    thresholds = thresholds_from_keywords(keywords, "here", categories=CATEGORY_NAMES)
    assert [each.describe() for each in thresholds] == [
        "ttft_p99 of the load <= 300",
        "output_throughput of the load >= 1500",
    ]


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"regression": 0.9}, "must be ≥ 1.0"),
        ({"regression": {"ttft_p98": 1.1}}, "did you mean ttft_p9"),
        ({"regression": {"ttft_p99 in decode": 1.1}}, "the load driver knows no stages"),
        ({"regression": {"compute across sync": 1.1}}, "is of server lives"),
        ({"ttft_p99": {"moe": 1.1}}, "is of the whole load"),
        ({"ttft_p99": {"/x/": 1.1}}, "is of the whole load"),
        ({"ttft_p99": {"compute in decode": 1.1}}, "the load driver knows no stages"),
        ({"goodput": 0}, "must be > 0"),
        ({"slowdown": {"pass_wall": 1.1}}, "'pass_wall' is not a scope"),
    ],
)
def test_what_a_metric_cannot_be_of_is_refused(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        thresholds_from_keywords(keywords, "here", categories=CATEGORY_NAMES)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        (Threshold("regression", 1.05, min_us=-1.0), "microseconds a step, 0 or more"),
        (Threshold("regression", 1.05, "ttft_p99", min_us=2.0), "is no time a step"),
        (Threshold("slowdown", 1.05, min_us=2.0), "is no time a step"),
        (Threshold("regression", 1.05, "moe", "fused"), "of 'moe' and of /fused/"),
    ],
)
def test_a_listed_threshold_is_checked(threshold: Threshold, said: str) -> None:
    settings = Settings(Path("out"))
    with pytest.raises(SettingsError) as error:
        window_spec(settings, {"thresholds": [threshold]}, origin="marker")
    assert said in str(error.value)


def test_a_threshold_of_the_file_has_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "sglprof.toml"
    path.write_text(
        '[[threshold]]\nmetric = "regression"\nscope = "pass_wall"\nlimit = 1.05\nmin_us = 5\n'
        '[baseline]\ndir = "kept"\nconfirm = 1\n'
    )
    values, origins = resolve_options({}, {})
    settings = build_settings(
        values, origins, load_config(path), config_file=path, invocation_dir=tmp_path / "work"
    )
    (threshold,) = settings.thresholds
    assert threshold.describe() == "regression of pass_wall <= 1.05 and 5 µs a step"
    assert (settings.baselines, settings.confirm) == (tmp_path / "kept", 1)
    for given in ({"baselines": "kept"}, {"set": ["baseline.dir=kept"]}):
        values, origins = resolve_options(given, {})
        settings = build_settings(
            values, origins, load_config(path), config_file=path, invocation_dir=tmp_path / "work"
        )
        assert settings.baselines == tmp_path / "work" / "kept"


def test_a_window_alone_is_not_judged_by_them() -> None:
    of_lives = [Threshold(name, 2.0) for name, row in METRICS.items() if row.is_of_lives]
    assert of_windows(of_lives) == ()
    verdict = judge(build(), [*of_lives, Threshold("slowdown", 1.5)])
    assert [each.threshold.metric for each in verdict.judgements] == ["slowdown"]
    assert judge(None, of_lives).judgements == ()


def test_commands_that_read_files_do_not_offer_them(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(partial(parser.add_subparsers().add_parser, "check"))
    with pytest.raises(SystemExit):
        parser.parse_args(["check", "x", "--metric", "regression"])
    assert "invalid choice: 'regression'" in capsys.readouterr().err
