from __future__ import annotations

import gzip
import json

import pytest

from pytest_sglprof._capture.torch_files import TraceFiles, is_whole, stage_of
from pytest_sglprof._server.sizes import ServerSizes


def packed(text: bytes) -> bytes:
    return gzip.compress(text, mtime=0)  # the same in every xdist worker


WHOLE = packed(b'{"traceEvents": []}\n')


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        pytest.param(WHOLE, True, id="whole"),
        pytest.param(packed(b'{"a": [') + packed(b"]}"), True, id="two members"),
        pytest.param(WHOLE[:-1], False, id="last byte missing"),
        pytest.param(WHOLE[:-9], False, id="trailer missing"),
        pytest.param(WHOLE[:12], False, id="header only"),
        pytest.param(WHOLE[:-8] + b"\0" * 8, False, id="wrong checksum"),
        pytest.param(packed(b'{"traceEvents": [{"a"'), False, id="json cut before compression"),
        pytest.param(b"", False, id="empty"),
        pytest.param(b"plain", False, id="no gzip"),
        pytest.param(WHOLE + b"junk", False, id="junk behind"),
    ],
)
def test_whole_is_where_gzip_checksum_and_json_end(tmp_path, data, whole):
    path = tmp_path / "x.trace.json.gz"
    path.write_bytes(data)
    assert is_whole(path) is whole


def test_real_traces_are_whole_and_cut_ones_are_not(shared_data, tmp_path):
    real = sorted((shared_data / "torch" / "sglang-cpu-tp2dp2").iterdir())
    assert all(is_whole(path) for path in real)
    for share in (0.3, 0.99):
        data = real[1].read_bytes()
        cut = tmp_path / "cut.gz"
        cut.write_bytes(data[: int(len(data) * share)])
        assert not is_whole(cut)


def test_stage_is_the_end_of_the_name():
    assert stage_of("p-DECODE-1.5-TP-0-EXTEND.trace.json.gz") == "EXTEND"
    assert stage_of("p-DECODE-1.5-TP-0.trace.json.gz") == ""


def files(folder, **options):
    return TraceFiles(folder, ServerSizes(tp=2).ranks(), **options)


def write(folder, name, data=WHOLE):
    (folder / f"{name}.trace.json.gz").write_bytes(data)


def test_a_file_is_read_only_when_it_stands_still(tmp_path):
    watched = files(tmp_path)
    write(tmp_path, "i-TP-0", WHOLE[:10])
    assert watched.whole() == {}
    write(tmp_path, "i-TP-0")
    assert watched.whole() == {}, "its size has just changed"
    assert [rank.label for rank in watched.whole().values()] == ["TP0"]
    assert [rank.label for rank in watched.missing(watched.whole())] == ["TP1"]
    write(tmp_path, "i-TP-1")
    assert len(watched.whole(settled=True)) == 2
    assert watched.all_whole()


def test_merged_and_foreign_files_are_no_ranks(tmp_path):
    write(tmp_path, "mine-TP-0")
    write(tmp_path, "theirs-TP-1")
    write(tmp_path, "merged-mine")
    watched = files(tmp_path, profile_id="mine")
    assert [path.name for path in watched.rank_files()] == ["mine-TP-0.trace.json.gz"]
    assert [path.name for path in watched.others()] == ["merged-mine.trace.json.gz"]


def test_by_stage_a_rank_must_have_each_stage_that_others_have(tmp_path):
    watched = files(tmp_path, stages=("EXTEND", "DECODE"))
    write(tmp_path, "i-TP-0-DECODE")
    write(tmp_path, "i-TP-1-DECODE")
    complete = watched.whole(settled=True)
    assert watched.missing(complete) == []
    assert watched.missing_stages(complete) == ["EXTEND"]
    assert not watched.all_whole()
    write(tmp_path, "i-TP-0-EXTEND")
    complete = watched.whole(settled=True)
    assert [rank.label for rank in watched.missing(complete)] == ["TP1"]


def test_no_folder_is_no_file(tmp_path):
    watched = files(tmp_path / "absent")
    assert watched.rank_files() == {}
    assert [rank.label for rank in watched.missing({})] == ["TP0", "TP1"]
    assert json.dumps(list(watched.sizes())) == "[]"
