"""What stands beside traces: the server's settings and its experts' tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_sglprof._errors import TraceError
from pytest_sglprof._server.sizes import PassSettings
from pytest_sglprof._trace.beside import with_experts, with_files_beside
from pytest_sglprof._trace.paths import window_files
from pytest_sglprof._trace.table import EXPERT_COLUMNS, KernelTable, Step, expert_frame
from tests.support.kernel_tables import from_rows

RANKS = ("DP0 TP0 EP0", "DP1 TP1 EP1")
INFO = {"enable_dp_attention": True, "tp_size": 2, "attn_dp_size": 2, "moe_dense_tp_size": None}
SECRET = "sk-verysecret"


def table(ids: dict[str, list[int]], *, drafts: tuple[int, ...] = (), base: int = 0) -> KernelTable:
    """Steps with these forward ids, numbered as id + base; of `drafts`, too, on each rank."""
    steps = [
        (rank, Step(number + base, "decode", number, number + 1, forward_id=number, substage=word))
        for rank, numbers in ids.items()
        for word, listed in (("DECODE", numbers), ("DRAFT", drafts))
        for number in listed
    ]
    return from_rows([], steps=steps, ranks=RANKS)


def write_counts(folder: Path, passes: list[int], **changes: Any) -> dict[str, np.ndarray]:
    """Counts of 2 expert ranks x passes x 3 layers x 2 experts, each number another one."""
    shape = (2, len(passes), 3, 2)
    content: dict[str, Any] = {
        "passes": np.array(passes, np.int64),
        "counts": np.arange(np.prod(shape), dtype=np.int32).reshape(shape),
        "logical": np.array([[[3, 1]] * 3, [[0, 2]] * 3], np.int32),
        "labels": np.array(RANKS),
        "rank_rows": np.array([0, 1]),
        **changes,
    }
    np.savez_compressed(folder / "experts.npz", **content)
    return content


def as_dict(found: KernelTable) -> dict[tuple[str, int, int, int], int]:
    rows = found.experts.astype({"rank": str}).itertuples(index=False)
    return {(row.rank, row.step, row.layer, row.expert): row.tokens for row in rows}


def expected(content: dict[str, Any], steps: dict[str, dict[int, int]]) -> dict[Any, int]:
    """The same by plain loops. steps: rank -> forward id -> step."""
    return {
        (rank, step, layer, int(content["logical"][row, layer, place])): int(
            content["counts"][row, list(content["passes"]).index(number), layer, place]
        )
        for row, rank in enumerate(RANKS)
        for number, step in steps[rank].items()
        for layer in range(3)
        for place in range(2)
    }


def test_a_count_belongs_to_the_step_with_its_forward_id(tmp_path: Path) -> None:
    content = write_counts(tmp_path, [7, 8, 9, 11])
    found = with_experts(
        table({RANKS[0]: [7, 8, 9], RANKS[1]: [8, 9]}, base=100), tmp_path / "experts.npz"
    )
    steps = {RANKS[0]: {7: 107, 8: 108, 9: 109}, RANKS[1]: {8: 108, 9: 109}}
    assert as_dict(found) == expected(content, steps)
    assert found.notes == ()
    assert tuple(found.experts.columns) == EXPERT_COLUMNS
    assert found.experts["rank"].cat.categories.tolist() == list(RANKS)


def test_a_draft_with_the_id_of_a_pass_is_not_that_pass(tmp_path: Path) -> None:
    write_counts(tmp_path, [7, 8])
    found = with_experts(
        table({rank: [7] for rank in RANKS}, drafts=(8,)), tmp_path / "experts.npz"
    )
    assert set(found.experts["step"]) == {7}


def test_an_id_of_two_steps_is_of_neither(tmp_path: Path) -> None:
    write_counts(tmp_path, [7, 8])
    twice = table({rank: [7, 8] for rank in RANKS})
    steps = twice.steps.copy()
    steps.loc[(steps["rank"] == RANKS[0]) & (steps["forward_id"] == 8), "forward_id"] = 7
    found = with_experts(replace(twice, steps=steps), tmp_path / "experts.npz")
    assert set(found.experts["rank"]) == {RANKS[1]}
    assert found.notes == ("experts: 2 of 4 steps have no counts",)


def test_steps_without_counts_are_told(tmp_path: Path) -> None:
    write_counts(tmp_path, [8])
    found = with_experts(table({rank: [7, 8, 9] for rank in RANKS}), tmp_path / "experts.npz")
    assert set(found.experts["step"]) == {8}
    assert found.notes == ("experts: 4 of 6 steps have no counts",)


def test_ranks_without_counts_are_told(tmp_path: Path) -> None:
    write_counts(tmp_path, [8], labels=np.array(RANKS[:1]), rank_rows=np.array([0]))
    found = with_experts(table({rank: [8] for rank in RANKS}), tmp_path / "experts.npz")
    assert set(found.experts["rank"]) == {RANKS[0]}
    assert found.notes == (f"experts: the tokens of {RANKS[1]} are not recorded",)


def test_totals_are_of_no_step(tmp_path: Path) -> None:
    content = write_counts(tmp_path, [-1])
    found = with_experts(table({rank: [7] for rank in RANKS}), tmp_path / "experts.npz")
    assert as_dict(found) == expected(content, {rank: {-1: -1} for rank in RANKS})
    assert found.notes == ()


@pytest.mark.parametrize("damage", ["text", "no labels", "cut", "objects", "shapes"])
def test_a_file_that_is_not_one_is_left_out_with_a_note(tmp_path: Path, damage: str) -> None:
    write_counts(tmp_path, [7])
    file = tmp_path / "experts.npz"
    if damage == "text":
        file.write_text("no")
    elif damage == "no labels":
        np.savez_compressed(file, passes=np.array([7]))
    elif damage == "shapes":
        write_counts(tmp_path, [7], counts=np.zeros((2, 2, 3, 2), np.int32))
    elif damage == "objects":
        write_counts(tmp_path, [7], labels=np.array([{}, None], dtype=object))
    else:
        file.write_bytes(file.read_bytes()[:200])
    found = with_experts(table({rank: [7] for rank in RANKS}), file)
    assert found.experts.empty
    assert len(found.notes) == 1
    assert found.notes[0].startswith("experts.npz is left out")


def test_a_table_without_counts_has_an_empty_frame() -> None:
    frame = table({}).experts
    assert frame.empty
    assert tuple(frame.columns) == EXPERT_COLUMNS
    assert (
        frame.dtypes.astype(str).to_dict() == expert_frame((), RANKS).dtypes.astype(str).to_dict()
    )


def test_settings_beside_the_traces_are_those_of_the_table(tmp_path: Path) -> None:
    trace = tmp_path / "w-TP-0.trace.json"
    trace.touch()
    (tmp_path / "server_info.json").write_text(json.dumps({**INFO, "api_key": SECRET}))
    settings = PassSettings(regime="gather", dp_attention=True)
    for path in (tmp_path, trace):
        found = with_files_beside(table({}), [path])
        assert (found.settings, found.notes) == (settings, ())
        assert SECRET not in repr(found.settings)


def test_settings_that_are_given_count_more(tmp_path: Path) -> None:
    (tmp_path / "server_info.json").write_text(json.dumps(INFO))
    given = tmp_path / "other.json"
    given.write_text(json.dumps({"tp_size": 1, "speculative_algorithm": "EAGLE"}))
    found = with_files_beside(table({}), [tmp_path], given)
    assert found.settings == PassSettings(speculative=True)


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a": 1}', f'{{"api_key": "{SECRET}"'])
def test_a_file_without_settings(tmp_path: Path, text: str) -> None:
    file = tmp_path / "server_info.json"
    file.write_text(text)
    found = with_files_beside(table({}), [tmp_path])
    assert found.settings is None
    assert found.notes[0].startswith("server_info.json is left out")
    with pytest.raises(TraceError) as raised:
        with_files_beside(table({}), [tmp_path], file)
    assert SECRET not in str(raised.value) + found.notes[0]
    with pytest.raises(TraceError, match="No such file"):
        with_files_beside(table({}), [tmp_path], tmp_path / "gone.json")


def test_under_dp_attention_a_padded_batch_is_not_that_of_the_rank_alone(tmp_path: Path) -> None:
    step = Step(0, "decode", 0, 1, batch_size=3, graph_share=1.0)
    before = from_rows([], steps=[(RANKS[0], step)], ranks=RANKS)
    graphs = {"cuda_graph_config": {"decode": {"backend": "full", "bs": [2, 4]}}}
    for info, padded in [({**INFO, **graphs}, -1), (graphs, 4)]:
        (tmp_path / "server_info.json").write_text(json.dumps(info))
        found = with_files_beside(before, [tmp_path])
        assert found.settings is not None
        assert found.settings.capture_sizes == (2, 4)
        assert found.steps["padded_batch"].tolist() == [padded]


def test_the_answer_of_a_server_is_no_trace(tmp_path: Path) -> None:
    for name in ("rank0.json", "rank1.json", "server_info.json"):
        (tmp_path / name).write_text("{}")
    assert [file.name for file in window_files(tmp_path)] == ["rank0.json", "rank1.json"]
