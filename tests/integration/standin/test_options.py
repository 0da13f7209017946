"""The stand-in's command line."""

from __future__ import annotations

import pytest

from pytest_sglprof.standin.model import Sizes, Slow
from pytest_sglprof.standin.options import parse


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
        ("stray --tp 2", "unexpected argument: stray"),
        ("--start-fault fire", "invalid choice"),
    ],
)
def test_wrong_values_are_refused(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(line.split())
    assert refused.value.code == 2
    assert says in capsys.readouterr().err
