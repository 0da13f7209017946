"""Every command that reads what was recorded takes runs, windows, traces, and zips of them."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pytest_sglprof import read_window
from pytest_sglprof._cli.main import main
from pytest_sglprof._report.model import NOTHING
from pytest_sglprof._report.results import write_results
from pytest_sglprof._run.folder import write_run_file
from tests.integration.cli.test_perfetto_command import trace
from tests.support.nsys_exports import STRINGS, global_id, kernel, make_export
from tests.support.windows import as_run, as_window, run, window

Output = pytest.CaptureFixture[str]
RUN = "run-20261124-031351-3f9a"


def torch_files(folder: Path, profile: str = "p-1", slow: float = 1.4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(2):
        text = json.dumps(trace(rank, slow if rank else 1.0))
        file = folder / f"{profile}-TP-{rank}.trace.json.gz"
        file.write_bytes(gzip.compress(text.encode()))
    (folder / "server_info.json").write_text('{"enable_dp_attention": false}')
    return folder


def nsys_files(folder: Path) -> Path:
    """An export of two processes, and the file that says which ranks they are."""
    folder.mkdir(parents=True)
    rows = [
        kernel(at * 1000, at * 1000 + 500 + rank, globalPid=global_id(29814 + rank), deviceId=rank)
        for at in range(50)
        for rank in range(2)
    ]
    tables = {"CUPTI_ACTIVITY_KIND_KERNEL": rows, "StringIds": STRINGS}
    make_export(folder / "w.1.sqlite", **tables)
    ranks = {"pid_ranks": {"29814": "TP1", "29815": "TP0"}, "gpu_ranks": {}}
    (folder / "w.1.ranks.json").write_text(json.dumps(ranks))
    return folder


def run_folder(place: Path, *ids: str) -> Path:
    """A run with traces of its windows."""
    documents = []
    for name in ids:
        kept = torch_files(place / "windows" / name)
        document = window(read_window(kept), window_id=name)
        document["artifacts"] = [
            {
                "path": f"windows/{name}/p-1-TP-{at}.trace.json.gz",
                "kind": "torch",
                "rank": f"TP{at}",
            }
            for at in range(2)
        ]
        documents.append(document)
    write_results(as_run(run(documents)), place / "results.json")
    write_run_file(place, started=0.0, version="0")
    return place


def killed_run(place: Path) -> Path:
    """A run that ended while it wrote a line: one test had ended, another one's window closed."""
    folder = run_folder(place, "w1", "w2")
    document = json.loads((folder / "results.json").read_text())
    ended = msgspec.structs.replace(NOTHING, windows=(as_window(document["windows"][0]),))
    line = msgspec.json.encode(ended)
    (folder / "journal.jsonl").write_bytes(line + b"\n" + line[:99])
    (folder / "results.json").unlink()
    return folder


def zipped(folder: Path, archive: Path, under: str = "") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for file in sorted(folder.rglob("*")):
            out.write(file, Path(under) / file.relative_to(folder))
    return archive


def both(folder: Path) -> Path:
    torch_files(folder / "before", slow=1.0)
    torch_files(folder / "after")
    return folder


def two_profiles(folder: Path) -> Path:
    torch_files(folder, "before", slow=1.0)
    return torch_files(folder, "after")


INPUTS: dict[str, Callable[[Path], Path]] = {
    "one trace": lambda at: torch_files(at / "w") / "p-1-TP-0.trace.json.gz",
    "torch window": lambda at: torch_files(at / "w"),
    "nsys window": lambda at: nsys_files(at / "w"),
    "nsys export": lambda at: nsys_files(at / "w") / "w.1.sqlite",
    "two windows": lambda at: both(at / "w"),
    "two profiles": lambda at: two_profiles(at / "w"),
    "run": lambda at: run_folder(at / RUN, "w1"),
    "results": lambda at: run_folder(at / RUN, "w1") / "results.json",
    "run of two": lambda at: run_folder(at / RUN, "w1", "w2"),
    "killed run": lambda at: killed_run(at / RUN),
    "folder of runs": lambda at: run_folder(at / ".sglprof" / RUN, "w1").parent,
    "zip of a run": lambda at: zipped(
        run_folder(at / RUN, "w1"), at / "a.zip", f"x/.sglprof/{RUN}"
    ),
    "zip of a run itself": lambda at: zipped(run_folder(at / RUN, "w1"), at / "a.zip"),
    "zip of a killed run": lambda at: zipped(killed_run(at / RUN), at / "a.zip", RUN),
    "zip of traces": lambda at: zipped(torch_files(at / "w"), at / "a.zip"),
    "zip of nsys": lambda at: zipped(nsys_files(at / "w"), at / "a.zip", "nested/w"),
    "zip of windows": lambda at: zipped(both(at / "w"), at / "a.zip", "deep/er"),
}
SEVERAL = {
    "two windows": "after",
    "two profiles": "after",
    "run of two": "w2",
    "killed run": "w2",
    "zip of a killed run": "w2",
    "zip of windows": "after",
}
COMMANDS = {
    "kernels": ["kernels", "{path}", "--by", "rank"],
    "check": ["check", "{path}", "--limit", "1.1"],
    "compare": ["compare", "{path}", "{path}"],
    "report": ["report", "{path}", "-o", "{out}/page.html"],
    "perfetto": ["export", "{path}", "--to", "perfetto", "--only", "kernels", "-o", "{out}/m.json"],
    "svg": ["export", "{path}", "--to", "svg", "-o", "{out}/heat.svg"],
    "nsight": ["export", "{path}", "--to", "nsight"],
}
OF_ONE = ("kernels", "check", "perfetto", "nsight")


def status_of(name: str, command: str) -> int:
    """What a command answers; `check` fails a torch window, whose second rank is slow."""
    if command == "nsight":
        return 0 if "nsys" in name else 2
    if command == "check":
        return 3 if "nsys" in name or "killed" in name or name == "one trace" else 1
    if command == "compare" and "killed" in name:
        return 3
    return 0


@pytest.fixture
def no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A temporary folder of its own, which is empty in the end."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert not [*place.iterdir()]


@pytest.mark.usefixtures("no_leftover")
@pytest.mark.parametrize("name", INPUTS)
def test_every_command_takes_every_input(name: str, tmp_path: Path, capsys: Output) -> None:
    path = INPUTS[name](tmp_path / "in")
    for command, words in COMMANDS.items():
        filled = [word.format(path=path, out=tmp_path) for word in words]
        status = main(filled)
        out, err = capsys.readouterr()
        if name in SEVERAL and command in OF_ONE:
            assert (command, status) == (command, 2)
            assert "choose with --window: " in err and SEVERAL[name] in err
            status = main([*filled, "--window", SEVERAL[name]])
            out, err = capsys.readouterr()
        assert (command, status) == (command, status_of(name, command)), err
        if command == "kernels":
            assert "pid" not in out and "TP0" in out
            assert ("TP1" in out) == (name != "one trace")
        if command == "nsight" and status == 2:
            assert "torch trace, which Nsight Systems does not open" in err
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="window"') == (2 if name in SEVERAL else 1)


# Several paths, and what is passed over.


def test_a_glob_passes_over_what_has_no_results(tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / ".sglprof"
    run_folder(folder / RUN, "w1")
    (folder / "latest").symlink_to(RUN)
    (folder / "history").mkdir()
    write_run_file(folder / "run-20261125-000000-0000", started=0.0, version="0")
    page = tmp_path / "page.html"
    assert main(["report", *map(str, sorted(folder.iterdir())), "-o", str(page)]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(": ")[0] for note in notes] == ["note"] * 2
    assert "history is passed over" in notes[0]
    assert "run-20261125-000000-0000 has no results.json, and left no window" in notes[1]
    assert page.read_text().count('class="window"') == 1
    assert main(["report", str(folder / "history"), "-o", str(page)]) == 2


def test_folders_with_ranks_of_their_own_are_one_window(tmp_path: Path, capsys: Output) -> None:
    files = sorted(torch_files(tmp_path / "w").glob("*.gz"))
    for rank, file in enumerate(files):
        (tmp_path / f"rank{rank}").mkdir()
        file.rename(tmp_path / f"rank{rank}" / "trace.json.gz")
    folders = [str(tmp_path / f"rank{rank}") for rank in range(2)]
    assert main(["kernels", *folders, "--by", "rank"]) == 0
    assert "TP0" in (out := capsys.readouterr().out) and "TP1" in out


def test_folders_with_the_same_ranks_are_windows(tmp_path: Path, capsys: Output) -> None:
    folders = [str(torch_files(tmp_path / night / "w")) for night in ("one", "two")]
    assert main(["kernels", *folders]) == 2
    assert "--window: one/w, two/w" in capsys.readouterr().err
    assert main(["kernels", *folders, "--window", "two/w"]) == 0
    assert main(["report", *folders, "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().count('class="window"') == 2


# What a page of traces says.


def test_a_page_of_traces_is_measured_or_judged_by_a_limit(tmp_path: Path, capsys: Output) -> None:
    folder = torch_files(tmp_path / "w")
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert ">– measured</span>" in page
    assert "no threshold is set: figures are recorded, not judged" in page
    assert 'href="p-1-TP-1.trace.json.gz"' in page
    assert main(["report", str(folder), "--limit", "1.1"]) == 0
    page = (folder / "report.html").read_text()
    assert "TP1 is 1.40x slower than its peers in compute (limit 1.10)" in page
    assert "<title>fail: w" in page


def test_the_page_of_a_file_is_named_after_it(tmp_path: Path, capsys: Output) -> None:
    folder = torch_files(tmp_path / "w")
    assert main(["report", str(folder / "p-1-TP-0.trace.json.gz")]) == 0
    assert (folder / "p-1-TP-0.report.html").is_file()
    archive = zipped(run_folder(tmp_path / RUN, "w1"), tmp_path / "night.zip", RUN)
    assert main(["report", str(archive)]) == 0
    page = (tmp_path / "night.report.html").read_text()
    assert f'href="{RUN}/windows/w1/p-1-TP-0.trace.json.gz"' in page


def test_a_limit_for_windows_that_were_judged_is_refused(tmp_path: Path, capsys: Output) -> None:
    folder = run_folder(tmp_path / RUN, "w1")
    assert main(["report", str(folder), "--limit", "1.1"]) == 2
    assert "sglprof check judges a window of a run anew" in capsys.readouterr().err


def test_a_killed_run_says_what_is_there(tmp_path: Path, capsys: Output) -> None:
    folder = killed_run(tmp_path / RUN)
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert f"{RUN}: the run was interrupted: only what it had recorded by then is here" in page
    assert page.count("its run stopped before this window was judged") >= 1
    assert main(["check", str(folder), "--window", "w2", "--limit", "9"]) == 3
    assert "its run stopped" in capsys.readouterr().out


def test_a_run_that_has_not_ended_says_so(tmp_path: Path) -> None:
    folder = killed_run(tmp_path / RUN)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["report", str(folder)]) == 0
    finally:
        os.close(held)
    assert "the run has not ended" in (folder / "report.html").read_text()


def test_what_a_killed_run_left_of_a_trace_is_inconclusive(tmp_path: Path) -> None:
    folder = killed_run(tmp_path / RUN)
    trace_file = folder / "windows" / "w2" / "p-1-TP-1.trace.json.gz"
    trace_file.write_bytes(trace_file.read_bytes()[:999])
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert (
        "its run stopped before this window was judged; a trace of this window is truncated" in page
    )


def test_a_run_in_an_archive_is_read_with_what_it_stored(tmp_path: Path, capsys: Output) -> None:
    folder = run_folder(tmp_path / RUN, "w1")
    stored = {"category": [{"name": "odd", "pattern": "script"}]}
    (folder / "run.json").unlink()
    write_run_file(folder, started=0.0, version="0", settings=stored)
    archive = zipped(folder, tmp_path / "a.zip", RUN)
    assert main(["kernels", str(archive), "--by", "category"]) == 0
    assert "odd" in capsys.readouterr().out


def test_one_of_several_windows_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, capsys: Output
) -> None:
    folder = both(tmp_path / "w")
    (folder / "after" / "p-1-TP-1.trace.json.gz").write_bytes(b"no trace")
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert page.count('class="window"') == 2
    assert "is not a torch trace" in page
    assert main(["report", str(folder / "after")]) == 2
    assert "is not a torch trace" in capsys.readouterr().err


# Archives that do harm.


def refused(archive: Path, capsys: Output) -> str:
    assert main(["kernels", str(archive)]) == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("no_leftover")
@pytest.mark.parametrize(
    "name", ["../out.json", "/tmp/out.json", "a/../../out.json", "C:\\out.json", "..\\out.json"]
)
def test_an_entry_outside_of_the_archive_is_refused(
    name: str, tmp_path: Path, capsys: Output
) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("w-TP-0.trace.json", "{}")
        out.writestr(zipfile.ZipInfo(name), "{}")
    assert "lies outside of it" in refused(archive, capsys)
    assert not (tmp_path / "out.json").exists()
    assert not Path("/tmp/out.json").exists()


@pytest.mark.usefixtures("no_leftover")
def test_a_link_in_an_archive_is_left_out(tmp_path: Path, capsys: Output) -> None:
    archive = zipped(torch_files(tmp_path / "w"), tmp_path / "a.zip", "w")
    link = zipfile.ZipInfo("w/r-TP-2.trace.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as out:
        out.writestr(link, "/etc/passwd")
    assert main(["kernels", str(archive), "--by", "rank", "--format", "json"]) == 0
    assert {row["rank"] for row in json.loads(capsys.readouterr().out)} == {"TP0", "TP1"}


@pytest.mark.usefixtures("no_leftover")
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, capsys: Output) -> None:
    archive = tmp_path / "a.zip"
    with (
        zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out,
        out.open("w-TP-0.trace.json", "w", force_zip64=True) as entry,
    ):
        for _ in range(300):
            entry.write(b" " * 2**20)
    assert archive.stat().st_size < 2**20
    error = refused(archive, capsys)
    assert "would become 315 MB" in error
    assert "at most 200 times its size" in error


@pytest.mark.usefixtures("no_leftover")
def test_an_entry_that_is_longer_than_it_says_is_no_trap(tmp_path: Path, capsys: Output) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("w-TP-0.trace.json", b" " * 2**20)
    shorter = archive.read_bytes().replace(
        (2**20).to_bytes(4, "little"), (99).to_bytes(4, "little")
    )
    archive.write_bytes(shorter)
    assert "cannot be unpacked" in refused(archive, capsys)


@pytest.mark.usefixtures("no_leftover")
def test_damage_passwords_and_names_that_come_twice_are_refused(
    tmp_path: Path, capsys: Output
) -> None:
    whole = zipped(torch_files(tmp_path / "w"), tmp_path / "a.zip").read_bytes()
    archive = tmp_path / "b.zip"
    archive.write_bytes(whole[: len(whole) // 2])
    assert "cannot be unpacked" in refused(archive, capsys)
    flagged = bytearray(whole)
    flagged[6] |= 1
    flagged[whole.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(flagged)
    assert "is encrypted" in refused(archive, capsys)
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("a.json", "{}")
        out.writestr("a.json/b.json", "{}")
    assert "cannot be unpacked" in refused(archive, capsys)


def test_an_archive_without_anything_to_read(tmp_path: Path, capsys: Output) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("junit.xml", "<testsuites/>")
    error = refused(archive, capsys)
    assert "a.zip has nothing to read" in error
    assert "look what CI keeps" in error
