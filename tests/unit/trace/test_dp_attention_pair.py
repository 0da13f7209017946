"""The two ranks of a real server with DP attention (tests/data/dp-attention-cpu)."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._config.load import Settings
from pytest_sglprof._run.measure import WindowFiles, read_recorded
from pytest_sglprof._server.sizes import PassSettings
from pytest_sglprof._trace.table import KernelTable

STEP = re.compile(r"step\[(\w+) bs=(\d+)(.*)\]")
SECRET = "sk-verysecret"
TOPK = 2


@pytest.fixture(params=["plain", "ep2"])
def pair(request: pytest.FixtureRequest, project_root: Path) -> Path:
    return project_root / "tests/data/dp-attention-cpu" / str(request.param)


def table_of(folder: Path) -> KernelTable:
    return read_recorded(WindowFiles((folder,)), Settings(folder))


def spans(folder: Path, dp_rank: int) -> list[tuple[str, int, dict[str, int]]]:
    """(word, batch, pairs) of each step of a rank, by plain json, in order."""
    (file,) = folder.glob(f"*-DP-{dp_rank}*.gz")
    events: list[Any] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    events.sort(key=lambda event: event["ts"])
    found = [match for event in events if (match := STEP.fullmatch(event["name"]))]
    return [
        (match[1], int(match[2]), {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", match[3])})
        for match in found
    ]


def test_the_steps_of_both_ranks(pair: Path) -> None:
    table = table_of(pair)
    assert len(table.ranks) == 2
    for dp_rank, rank in enumerate(table.ranks):
        assert f"DP{dp_rank}" in rank
        steps = table.steps[table.steps["rank"] == rank].sort_values("start_ns")
        rows = zip(steps["substage"], steps["batch_size"], steps["forward_id"], strict=True)
        expected = [(word, batch, more["forward_id"]) for word, batch, more in spans(pair, dp_rank)]
        assert list(rows) == expected
        assert (steps["step"] == steps["forward_id"]).all()


def test_passes_have_a_kind_of_each_rank(pair: Path) -> None:
    """What the analysis of passes needs: idle beside decode, and a prefill beside either."""
    words = [{m["forward_id"]: w for w, _, m in spans(pair, rank)} for rank in (0, 1)]
    both = Counter((words[0][n], words[1][n]) for n in words[0].keys() & words[1].keys())
    assert sum(both.values()) >= 58
    assert both["DECODE", "DECODE"] >= 20
    assert both["DECODE", "IDLE"] >= 5
    assert {pair for pair in both if "EXTEND" in pair}


def test_the_load_that_was_sent(pair: Path) -> None:
    load = json.loads((pair / "load.json").read_text())
    for dp_rank in (0, 1):
        sent = [request for request in load if request["dp_rank"] == dp_rank]
        largest = max(batch for word, batch, _ in spans(pair, dp_rank) if word == "DECODE")
        assert largest == len(sent)


def test_the_settings_beside_them(pair: Path) -> None:
    assert table_of(pair).settings == PassSettings(
        regime="gather", graphs=False, custom_all_reduce=False, dp_attention=True
    )


def test_tokens_of_experts_are_those_of_both_ranks_or_padded(project_root: Path) -> None:
    """Decode batches are padded to the larger one; with a prefill they are laid end to end."""
    folder = project_root / "tests/data/dp-attention-cpu/ep2"
    table = table_of(folder)
    rows = [
        {m["forward_id"]: (w, m.get("toks", b)) for w, b, m in spans(folder, n)} for n in (0, 1)
    ]
    counted = table.experts.groupby(["step", "layer"])["tokens"].sum()
    seen = 0
    for (step, _layer), tokens in counted.items():
        if not all(step in own for own in rows):
            continue
        seen += 1
        own = [0 if word == "IDLE" else size for word, size in (rows[0][step], rows[1][step])]
        assert tokens in (TOPK * sum(own), TOPK * 2 * max(own)), (step, own)
    assert seen >= 2 * 58
    assert not [note for note in table.notes if note.startswith("experts")]
    with np.load(folder / "experts.npz", allow_pickle=False) as stored:
        assert int(stored["counts"].sum()) >= int(counted.sum())


def test_other_settings_by_an_option(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = json.loads((pair / "server_info.json").read_text())
    given = tmp_path / "info.json"
    given.write_text(json.dumps({**info, "enable_dp_attention": False, "api_key": SECRET}))
    files = WindowFiles((pair,), server_info=given)
    settings = read_recorded(files, Settings(pair)).settings
    assert settings is not None
    assert not settings.dp_attention
    main(["check", str(pair), "--server-info", str(given), "--format", "json"])
    out = capsys.readouterr()
    assert json.loads(out.out)["verdict"]
    assert SECRET not in out.out + out.err
    given.write_text(f'{{"api_key": "{SECRET}"')
    assert main(["check", str(pair), "--server-info", str(given)]) == 2
    err = capsys.readouterr().err
    assert f"{given}: is not JSON" in err
    assert SECRET not in err


def test_a_broken_file_beside_is_a_note(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "w"
    shutil.copytree(pair, folder)
    (folder / "server_info.json").write_text(f'{{"api_key": "{SECRET}"')
    (folder / "experts.npz").write_bytes(b"no")
    main(["check", str(folder), "--format", "json"])
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert {note.partition(" is left out")[0] for note in notes} >= {
        "server_info.json",
        "experts.npz",
    }
    assert SECRET not in str(notes)
