"""A metric is one row: every room follows the table, and the table keeps its own rules."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from string import Formatter

import pytest

from pytest_sglprof._analysis.budget import StepBudget, budget_of, step_walls
from pytest_sglprof._analysis.imbalance import ImbalanceFinding, imbalance_of_groups
from pytest_sglprof._analysis.lives import LifeChange
from pytest_sglprof._analysis.times import sum_times
from pytest_sglprof._baselines.figures import Figure
from pytest_sglprof._baselines.records import LoadFigure
from pytest_sglprof._cli import check as command
from pytest_sglprof._config.load import Settings, load_config
from pytest_sglprof._config.model import Threshold, WindowSpec
from pytest_sglprof._config.thresholds import check_limit, thresholds_from_keywords
from pytest_sglprof._config.windows import window_spec
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._metrics import METRICS, UNITS, Metric, metrics_of
from pytest_sglprof._report.page.figures import heat_maps
from pytest_sglprof._report.page.jinja import head_unit
from pytest_sglprof._report.page.lead import headline
from pytest_sglprof._report.results import validate
from pytest_sglprof._report.terminal import imbalance_line
from pytest_sglprof._verdict.judge import judge
from pytest_sglprof._verdict.life_words import change_facts, load_facts
from pytest_sglprof._verdict.reasons import facts
from pytest_sglprof._verdict.repeats import judge_repeats
from tests.support.kernel_tables import build, slow
from tests.support.passes import TWO, decoding
from tests.support.windows import run, window

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
EVENNESS = Metric(
    name="evenness",
    of="ranks",
    value="factor",
    interval="factor_interval",
    estimate="share_of_mean",
    sentence="{group}the evenness of {subject} is {value}{limit}",
    better="higher",
    best=2.0,
)
CHANGE = LifeChange(accepted=5, fresh=1, log_ratio=0.1, error=0.01, freedom=4.0, sd=0.01)
SLOW = build(scale=slow("TP1", "moe", 1.4))


@pytest.fixture
def evenness(monkeypatch: pytest.MonkeyPatch) -> Metric:
    """A metric that is a row of the table and stands nowhere else."""
    monkeypatch.setitem(METRICS, EVENNESS.name, EVENNESS)
    return EVENNESS


def finding(row: Metric) -> ImbalanceFinding | StepBudget | LifeChange | LoadFigure:
    """Of the kind that has the metric."""
    if row.of == "lives":
        return CHANGE
    if row.of == "load":
        return LoadFigure(value=40.0, lives=2, interval=(38.0, 42.0))
    if row.of == "steps":
        return budget_of(step_walls(SLOW))
    if row.across == "sync":
        (judgement,) = judge(decoding(TWO), [Threshold(row.name, 0.1)]).judgements
        assert judgement.finding is not None
        return judgement.finding
    return imbalance_of_groups(sum_times(SLOW))[0]


@pytest.mark.parametrize("row", METRICS.values(), ids=lambda row: row.name)
class TestEveryRow:
    def test_is_an_attribute_of_its_finding_with_an_interval(self, row: Metric) -> None:
        assert isinstance(row.read(finding(row)), float)
        low, high = row.read_interval(finding(row))
        assert low <= high

    def test_has_its_line_in_the_docs(self, row: Metric) -> None:
        cells = (f"`{row.name}`", f"`{row.value}`", row.unit, row.better, row.bounds)
        line = f"| {' | '.join(cells)} | "
        assert line in DOCS.read_text(encoding="utf-8")

    def test_has_sentences_that_name_the_figure_and_the_limit(self, row: Metric) -> None:
        limit = row.best * 1.01 or 0.01
        found = finding(row)
        threshold = Threshold(row.name, limit if limit < float("inf") else 30.0)
        if isinstance(found, LifeChange):
            known = change_facts(Figure("compute"), threshold, found, 9e5, 1e6)
        elif isinstance(found, LoadFigure):
            known = load_facts(threshold, found.value, found.lives)
        else:
            known = facts(found, threshold, row.read(found), failed=True)
        for sentence in filter(None, (row.sentence, row.at_best)):
            assert sentence.format(**known, within=", limit 1.10")
            names = {name for _, name, _, _ in Formatter().parse(sentence)}
            assert names & {"limit", "within"}
        assert "{value}" in row.sentence

    def test_is_no_option_of_a_window(self, row: Metric) -> None:
        assert row.name not in {item.name for item in fields(WindowSpec)}

    def test_has_a_known_unit_and_a_limit_that_it_allows(self, row: Metric) -> None:
        assert row.unit in UNITS
        assert METRICS[row.name] is row
        if row.best < UNITS[row.unit].top:
            assert row.allows(row.best)
        with pytest.raises(SettingsError, match="must be"):
            check_limit(row.name, row.best - 0.1 if row.better == "lower" else -1, "here", "limit")


def test_a_new_row_is_accepted_by_thresholds_markers_and_configuration(
    evenness: Metric, tmp_path: Path
) -> None:
    (threshold,) = thresholds_from_keywords({"evenness": 0.9}, "here")
    assert threshold.describe() == "evenness of compute >= 0.9"
    spec = window_spec(Settings(Path("out")), {"evenness": {"moe": 0.8}}, origin="marker")
    assert spec.thresholds[-1].identity == ("", "moe", "", "", "evenness", "")
    path = tmp_path / "sglprof.toml"
    path.write_text('[[threshold]]\nmetric = "evenness"\nlimit = 0.5\n')
    assert load_config(path)["threshold"][0]["metric"] == "evenness"
    with pytest.raises(SettingsError, match="did you mean evenness"):
        path.write_text('[[threshold]]\nmetric = "eveness"\nlimit = 0.5\n')
        load_config(path)
    with pytest.raises(SettingsError, match="must be > 0 and ≤ 2"):
        check_limit("evenness", 2.5, "here", "limit")


def test_a_new_row_is_an_option_of_the_command_line(evenness: Metric) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(partial(parser.add_subparsers().add_parser, "check"))
    assert parser.parse_args(["check", "x", "--metric", "evenness"]).metric == "evenness"


def test_a_new_row_of_which_higher_is_better_fails_below_its_limit(evenness: Metric) -> None:
    moe = {"scope": "moe"}
    verdict = judge(SLOW, [Threshold("evenness", 1.5, **moe)])
    assert verdict.word == "fail"
    assert verdict.reason.startswith("the evenness of moe is 1.17 (limit 1.50), slowest in 100 %")
    assert judge(SLOW, [Threshold("evenness", 1.1, **moe)]).word == "pass"
    too_short = judge(build(steps=5), [Threshold("evenness", 1.5, **moe)])
    repeated = judge_repeats([verdict, verdict, too_short], 3)
    assert repeated.word == "fail"
    assert "is 1.17 in the median of 2 windows (limit 1.50)" in repeated.reason


def test_a_new_row_stands_in_results_on_the_terminal_and_on_the_page(evenness: Metric) -> None:
    document = window(SLOW, keywords={"evenness": 1.01, "slowdown": 1.1})
    whole = json.loads(json.dumps(run([document])))
    (recorded,) = validate(whole).windows
    judged = next(each for each in recorded.judgements if each.threshold.metric == "evenness")
    assert judged.finding is not None
    assert "evenness 1.10" in imbalance_line(judged.finding)
    assert headline(judged) == ("1.10", "evenness of compute, limit 1.01")
    (heat_map,) = heat_maps(recorded)
    labels = [figure.label for figure in heat_map.figures]
    of_peers = [row for row in metrics_of("ranks") if not row.across]
    assert labels == [row.label.capitalize() + head_unit(row) for row in of_peers]
    assert labels[-1] == "Evenness"


def test_a_metric_without_a_figure_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "evenness", EVENNESS._replace(value="ns_per_token"))
    verdict = judge(build(with_steps=False), [Threshold("evenness", 0.5)], min_steps=0)
    assert verdict.word == "inconclusive"
    assert verdict.reason == "evenness of compute has no figure in this window"


@pytest.mark.parametrize(
    ("row", "value", "limit", "severity"),
    [
        (METRICS["slowdown"], 1.5, 1.0, 1.5),
        (METRICS["lost_share"], 0.9, 0.5, 5.0),
        (METRICS["lost_share"], 0.5, 0.0, 2.0),
        (EVENNESS, 0.25, 0.5, 2.0),
        (METRICS["slowdown"], 9.0, float("inf"), 0.0),
        (METRICS["slowdown"], None, 1.1, float("inf")),
    ],
)
def test_severity_compares_metrics_by_their_ratio_to_the_limit(
    row: Metric, value: float | None, limit: float, severity: float
) -> None:
    assert row.severity(value, limit)[0] == pytest.approx(severity)


def test_no_limit_is_never_exceeded() -> None:
    for row in (*METRICS.values(), EVENNESS):
        assert not row.is_beyond(100.0, float("inf"))
