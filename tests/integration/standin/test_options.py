"""The stand-in's command line."""

from __future__ import annotations

import pytest

from pytest_sglprof.standin.model import EVERY_RANK, Sizes, Slow
from pytest_sglprof.standin.noise import LifeNoise, StepNoise
from pytest_sglprof.standin.options import parse, with_life_seed


def test_sglang_spellings_and_unknown_options() -> None:
    line = (
        "--tp-size 4 --data-parallel-size 2 --enable-dp-attention --watchdog-timeout 1800 "
        "--disable-radix-cache --cuda-graph-bs 1 2 4 --nccl-port=1234 --load-format dummy"
    )
    options = parse(line.split())
    assert options.sizes == Sizes(tp=4, dp=2, dp_attention=True)
    assert options.others == {
        "watchdog_timeout": 1800,
        "disable_radix_cache": True,
        "cuda_graph_bs": [1, 2, 4],
        "nccl_port": 1234,
        "load_format": "dummy",
    }


def test_planted_slowness() -> None:
    line = (
        "--tp 2 --dp 2 --slow rank=1,category=moe,factor=1.4,from_step=50 "
        "--slow rank=DP1.TP0,factor=2,until_step=9"
    )
    options = parse(line.split())
    assert options.model.slow == (
        Slow("1", "moe", 1.4, from_step=50),
        Slow("DP1 TP0", "compute", 2.0, until_step=9),
    )


def test_a_rank_that_stalls_while_it_writes() -> None:
    options = parse(["--dp", "2", "--profile-stall", "rank=DP1,s=2.5"])
    assert options.profile_stall == ("DP1", 2.5)
    for wrong in ("rank=DP1", "s=2", "rank=7,s=2", "rank=1,seconds=2"):
        with pytest.raises(SystemExit):
            parse(["--dp", "2", "--profile-stall", wrong])


def test_noise_of_steps() -> None:
    assert parse([]).model.step_noise is None
    assert parse(["--step-noise", "sd=0.08"]).model.step_noise == StepNoise(0.08)
    given = parse(["--step-noise", "sd=0.02,phi=0.6", "--random-seed", "3"]).model
    assert (given.step_noise, given.seed) == (StepNoise(0.02, 0.6), 3)


def test_a_category_that_is_slow_on_every_rank() -> None:
    given = parse(["--tp", "2", "--slow", "rank=all,category=moe,factor=1.15"]).model
    assert given.slow == (Slow(EVERY_RANK, "moe", 1.15),)


def test_a_life_is_drawn_once_for_all_processes_of_a_server() -> None:
    assert with_life_seed(["--tp", "2"]) == ["--tp", "2"]
    assert parse(["--tp", "2"]).model.life_noise is None
    named = ["--life-noise", "0.005", "--life-seed", "7"]
    assert with_life_seed(named) == named
    assert parse(named).model.life_noise == LifeNoise(0.005, 7)
    drawn = {parse(with_life_seed(named[:2])).model.life_noise for _ in range(5)}
    assert len(drawn) == 5
    assert {each.sd for each in drawn if each is not None} == {0.005}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--slow rank=1", "factor="),
        ("--slow rank=0,factor=2,colour=red", "expected rank="),
        ("--slow rank=0,factor=x", "could not convert"),
        ("--slow rank=1,factor=2", "no rank 1"),
        ("--slow rank=0,factor=2,category=communication", "category of compute, attention"),
        ("--tp 3 --dp 2 --enable-dp-attention", "multiple of --dp"),
        ("--tp 3 --ep 2", "multiple of --ep"),
        ("--tp 0", "at least 1"),
        ("--step-ms 0.01", "at least 0.1"),
        ("--step-noise phi=0.6", "expected sd="),
        ("--step-noise 0.02", "expected sd="),
        ("--step-noise sd=0.02,rho=0.6", "expected sd="),
        ("--step-noise sd=much", "could not convert"),
        ("--step-noise sd=-0.1", "sd 0 to 1"),
        ("--step-noise sd=nan", "sd 0 to 1"),
        ("--step-noise sd=0.1,phi=1", "phi 0 to less than 1"),
        ("--life-noise -0.1", "expected 0 to 1"),
        ("--life-noise nan", "expected 0 to 1"),
        ("--life-noise much", "invalid float"),
        ("--life-seed 3", "no effect without --life-noise"),
        ("stray --tp 2", "unexpected argument: stray"),
        ("--start-fault fire", "invalid choice"),
    ],
)
def test_wrong_values_are_refused(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(line.split())
    assert refused.value.code == 2
    assert says in capsys.readouterr().err
