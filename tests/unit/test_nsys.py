"""Finding and probing nsys, its sessions and their faults, with fakes."""

from __future__ import annotations

import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pytest_sglprof import _nsys
from pytest_sglprof._config.load import read_settings
from pytest_sglprof._errors import (
    NsysError,
    NsysMissing,
    NsysSessionError,
    NsysTooOld,
    SettingsError,
)
from pytest_sglprof._nsys import (
    REFUSED,
    NsysSession,
    NsysTool,
    StopOutput,
    check_profile_args,
    find_nsys,
    profile_prefix,
    read_session_list,
)
from pytest_sglprof._nsys_export import export, hide_credentials
from tests.support.fake_nsys import HELP, VERSION, calls, fake_nsys, listed


def session(path: Path, name: str = "mine") -> NsysSession:
    return NsysSession(NsysTool(str(path), "2023.4.4"), name)


def test_an_argument_beats_the_variable_which_beats_the_path(tmp_path, monkeypatch):
    first, second, third = (fake_nsys(tmp_path / name) for name in ("a", "b", "c"))
    monkeypatch.delenv("SGLPROF_NSYS", raising=False)
    monkeypatch.setenv("PATH", f"{third.parent}:/usr/bin:/bin")
    assert find_nsys().path == str(third)
    monkeypatch.setenv("SGLPROF_NSYS", str(second))
    assert find_nsys().path == str(second)
    assert find_nsys(str(first)).path == str(first)
    assert find_nsys(str(first.parent)) == NsysTool(str(first), "2023.4.4.54")


def test_no_nsys_is_said_with_a_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SGLPROF_NSYS", raising=False)
    with pytest.raises(NsysMissing, match="no nsys command") as caught:
        find_nsys()
    assert "SGLPROF_NSYS" in caught.value.hint


def test_fault_4_what_lies_in_the_working_directory_never_hides_nsys(tmp_path, monkeypatch):
    real = fake_nsys(tmp_path / "real")
    here = tmp_path / "here"
    (here / "nsys").mkdir(parents=True)
    (here / "nsys" / "nsys").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("SGLPROF_NSYS", raising=False)
    monkeypatch.setenv("PATH", f"{real.parent}:/usr/bin:/bin")
    assert find_nsys().path == str(real)
    assert find_nsys("nsys").path == str(real)
    monkeypatch.setenv("SGLPROF_NSYS", "nsys")
    assert find_nsys().path == str(real)
    (here / "nsys" / "nsys").rmdir()
    (here / "nsys").rmdir()
    for stray in ("file", "broken link"):
        if stray == "file":
            fake_nsys(here, version="another program")
        else:
            (here / "nsys").symlink_to("nowhere")
        monkeypatch.setenv("PATH", f":{real.parent}::/usr/bin:/bin:")
        assert find_nsys("nsys").path == str(real), stray
        (here / "nsys").unlink()


def test_fault_4_entries_of_the_path_that_hold_no_command_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.delenv("SGLPROF_NSYS", raising=False)
    monkeypatch.chdir(tmp_path)
    real = fake_nsys(tmp_path / "real")
    (tmp_path / "a" / "nsys").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "nsys").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "nsys").write_text("not executable")
    folders = [tmp_path / name for name in ("a", "b", "c")]
    path = ":".join(map(str, [*folders, "missing", real.parent, "/bin"]))
    monkeypatch.setenv("PATH", path)
    assert find_nsys().path == str(real)
    monkeypatch.setenv("PATH", ":".join([*map(str, folders), "/bin"]))
    with pytest.raises(NsysMissing, match="'nsys' is not an executable file"):
        find_nsys()
    monkeypatch.setenv("PATH", "real:/bin")  # relative, but named: it counts
    assert find_nsys().path == str(real)


def test_fault_4_only_a_path_may_be_the_folder_that_holds_nsys(tmp_path, monkeypatch):
    monkeypatch.delenv("SGLPROF_NSYS", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    real = fake_nsys(tmp_path / "tools")
    for path in ("./tools", "tools/", "tools/nsys", "./tools/nsys", str(real.parent)):
        assert find_nsys(path).path == str(real), path
        monkeypatch.setenv("SGLPROF_NSYS", path)
        assert find_nsys().path == str(real), path
    with pytest.raises(NsysMissing, match="'tools' is not an executable file on PATH") as caught:
        find_nsys("tools")
    assert "./tools" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(NsysMissing, match="empty/nsys' is not an executable file"):
        find_nsys("./empty")


def test_something_else_called_nsys(tmp_path):
    with pytest.raises(NsysMissing, match="is not a working nsys"):
        find_nsys(str(fake_nsys(tmp_path, version="network systems monitor")))
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF no program")
    broken.chmod(0o755)
    with pytest.raises(NsysMissing, match="could not be run"):
        find_nsys(str(broken))


def test_an_old_nsys_is_known_by_what_it_cannot_do(tmp_path):
    old = fake_nsys(
        tmp_path, version="NVIDIA Nsight Systems version 2022.4.2", help_text="usage: profile"
    )
    with pytest.raises(NsysTooOld, match=r"version 2022\.4\.2.*has no `profile --start-later`"):
        find_nsys(str(old))


def test_the_prefix_records_cuda_graphs_on_gpus_only(tmp_path):
    tool = NsysTool(str(fake_nsys(tmp_path)), "2023.4.4")
    report = Path("/r/first.nsys-rep")
    words = profile_prefix(tool, "mine", report, (), gpu=True)
    assert words[:5] == [
        tool.path,
        "profile",
        "--start-later=true",
        "--session-new=mine",
        "--output=/r/first.nsys-rep",
    ]
    assert {"--trace=cuda,nvtx", "--cuda-graph-trace=node", "--sample=none"} <= set(words)
    on_cpu = profile_prefix(tool, "mine", report, (), gpu=False)
    assert "--trace=nvtx" in on_cpu
    assert not any("cuda" in word for word in on_cpu[2:])
    assert "--discard-environment=true" not in words


def test_the_users_options_replace_ours_and_cannot_break_the_session(tmp_path):
    tool = NsysTool(str(fake_nsys(tmp_path, help_text=HELP + "--discard-environment=")), "2025.1.1")
    extra = ("-t", "cuda-sw,nvtx", "--sample=process-tree")
    words = profile_prefix(tool, "mine", Path("r"), extra, gpu=True)
    assert tuple(words[-3:]) == extra
    assert not any(word.startswith("--trace=") for word in words)
    assert "--sample=none" not in words
    assert "--discard-environment=true" in words
    with pytest.raises(SettingsError, match="--session-new is set by"):
        profile_prefix(tool, "mine", Path("r"), ["--session-new=other"], gpu=True)


@pytest.mark.parametrize(
    "words",
    [
        *([f"{name}=1"] for name in sorted(REFUSED)),
        ["--delay", "5"],
        ["-y", "5"],
        ["-d5"],
        ["-c", "cudaProfilerApi"],
        ["--trace=cuda", "-x", "false"],
        ["-h"],
    ],
)
def test_what_means_nothing_beside_start_later_is_refused(tmp_path, words):
    with pytest.raises(
        SettingsError, match=r"set by pytest-sglprof|means nothing|no server"
    ) as why:
        check_profile_args(words, "server moe: nsys_args")
    assert why.value.hint.startswith("remove --")
    config = tmp_path / "sglprof.toml"
    config.write_text(f"[servers.moe]\nkind = 'standin'\nnsys_args = {words}\n")
    with pytest.raises(SettingsError, match="server moe: nsys_args: --"):
        read_settings(
            {"config": str(config)},
            {},
            start=[tmp_path],
            rootdir=tmp_path,
            invocation_dir=tmp_path,
            of_pytest=True,
        )


def test_values_are_no_options():
    words = ("--gpu-metrics-devices=all", "-t", "cuda,nvtx", "--env-var", "A=--delay=3", "-w", "-1")
    assert check_profile_args(words) >= {"--trace", "--gpu-metrics-devices", "--env-var"}


@pytest.mark.parametrize(
    ("model", "help_text", "extra", "trace"),
    [
        ("NVIDIA GB200", "'cuda-sw'", (), "--trace=cuda-sw,nvtx"),
        ("NVIDIA B300 SXM6 AC", "'cuda-sw'", (), "--trace=cuda-sw,nvtx"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "cuda-sw", (), "--trace=cuda-sw,nvtx"),
        ("NVIDIA GB200", "", (), "--trace=cuda,nvtx"),
        ("NVIDIA GB200", "'cuda-sw'", ("--trace=cuda",), "--trace=cuda"),
        ("NVIDIA H200", "'cuda-sw'", (), "--trace=cuda,nvtx"),
        ("NVIDIA GH200 480GB", "'cuda-sw'", (), "--trace=cuda,nvtx"),
        ("NVIDIA RTX A4500 Laptop GPU B12", "'cuda-sw'", (), "--trace=cuda,nvtx"),
        (None, "'cuda-sw'", (), "--trace=cuda,nvtx"),
    ],
)
def test_cuda_is_recorded_in_software_on_blackwell(
    tmp_path, monkeypatch, model, help_text, extra, trace
):
    if model is not None:
        gpu = tmp_path / "gpus" / "0000:01:00.0"
        gpu.mkdir(parents=True)
        (gpu / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 134\n")
    monkeypatch.setattr(_nsys, "_DRIVER", tmp_path / "gpus")
    tool = NsysTool(str(fake_nsys(tmp_path, help_text=HELP + help_text)), "2026.1.1")
    words = profile_prefix(tool, "mine", Path("r"), extra, gpu=True)
    assert [word for word in words if word.startswith("--trace=")] == [trace]
    assert "--trace=nvtx" in profile_prefix(tool, "mine", Path("r"), (), gpu=False)


def states(text):
    return {session.name: session.state for session in read_session_list(text)}


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("7  1d 02:03:12  Collection  1  my run", {"my run": "Collection"}),
        ("7  1 day 02:03:12  Launched  1  a", {"a": "Launched"}),
        ("7  2 days 3 hours  RangeGeneration  2  a 1 B", {"a 1 B": "RangeGeneration"}),
        ("30763  41:07  RangeGeneration  1  Run 5 Copy 2 b", {"Run 5 Copy 2 b": "RangeGeneration"}),
        ("7  00:12  Collection  1  ", {}),
        ("WARNING: 7 CPU sampling not supported, 1 disabled", {}),
        ("    ID        TIME       STATE       LAUNCH   NAME", {}),
    ],
)
def test_a_time_may_hold_blanks(line, read):
    assert states(line) == read


def test_names_with_blanks_are_read():
    text = listed("my session 2", "Collection") + listed("b", "DelayedCollection") + "noise\n"
    assert states(text) == {"my session 2": "Collection", "b": "DelayedCollection"}
    assert states("There are no active sessions.\n") == {}


def test_an_unknown_session_is_never_started(tmp_path):
    path = fake_nsys(tmp_path, sessions=listed("other", "Launched"))
    with pytest.raises(NsysSessionError, match="there is no nsys session 'mine'") as caught:
        session(path).start(tmp_path / "w.nsys-rep")
    assert "other" in caught.value.expected
    with pytest.raises(NsysSessionError, match="there is no"):
        session(path).stop(timeout=1)
    assert session(path).state() == ""
    session(path).shutdown()  # gone already: nothing to do
    assert set(calls(path)) == {"sessions"}


def test_start_twice_and_stop_when_idle_are_errors_of_their_own(tmp_path):
    path = fake_nsys(tmp_path, sessions=listed("mine", "Collection"))
    with pytest.raises(NsysSessionError, match="already collects"):
        session(path).start(tmp_path / "w.nsys-rep")
    with pytest.raises(NsysSessionError, match="still has an open window"):
        session(path).shutdown()
    path = fake_nsys(tmp_path / "b", sessions=listed("mine", "Launched"))
    with pytest.raises(NsysSessionError, match="no open window"):
        session(path).stop(timeout=1)


def test_start_makes_the_folder_and_forces(tmp_path):
    collecting = listed("mine", "Collection").strip()
    path = fake_nsys(
        tmp_path,
        sessions=listed("mine", "Launched"),
        commands=f"start) echo '1 {collecting}' | sed 's/^1 //' > {tmp_path}/sessions ;;",
    )
    session(path).start(tmp_path / "new" / "w.nsys-rep", capture_range="cudaProfilerApi")
    assert (tmp_path / "new").is_dir()
    line = next(c for c in (tmp_path / "calls").read_text().splitlines() if c.startswith("start"))
    assert "--session=mine" in line
    assert "--force-overwrite=true" in line
    assert "--capture-range=cudaProfilerApi --capture-range-end=stop" in line


def test_start_that_starts_nothing_is_noticed(tmp_path):
    path = fake_nsys(tmp_path, sessions=listed("mine", "Launched"))
    refused = r"asked to collect, but after 0\.2 s its state is Launched"
    with pytest.raises(NsysSessionError, match=refused):
        session(path).start(tmp_path / "w.nsys-rep", timeout=0.2)


def test_nsys_own_words_are_in_the_error(tmp_path):
    said = "Configuring is not allowed in this state."
    path = fake_nsys(
        tmp_path, sessions=listed("mine", "Launched"), commands=f"start) echo '{said}'; exit 1 ;;"
    )
    with pytest.raises(NsysSessionError) as caught:
        session(path).start(tmp_path / "w.nsys-rep")
    assert caught.value.log == (said,)


def stopping(tmp_path: Path, commands: str) -> NsysSession:
    return session(
        fake_nsys(tmp_path, sessions=listed("mine", "Collection"), commands=f"stop) {commands} ;;")
    )


@pytest.mark.parametrize("state", ["RangeGeneration", "Finalizing"])
def test_a_state_that_lasts_is_ended_by_a_stop(tmp_path, state):
    report = tmp_path / "w.nsys-rep"
    report.write_bytes(b"report")
    path = fake_nsys(
        tmp_path,
        sessions=listed("mine", state),
        commands=f"stop) printf 'Generated:\\n\\t{report}\\n' ;;",
    )
    assert session(path).stop(timeout=1.0) == report
    assert calls(path).count("sessions") > 2, "it was waited for"
    with pytest.raises(NsysSessionError, match=rf"already collects .state {state}"):
        session(path).start(tmp_path / "next.nsys-rep", timeout=0.4)
    with pytest.raises(NsysSessionError, match="still has an open window"):
        session(path).shutdown(timeout=0.4)


def test_a_range_that_ends_while_it_is_waited_for_has_left_its_report(tmp_path):
    report = tmp_path / "w.nsys-rep"
    over = listed("mine", "Launched").strip()
    path = fake_nsys(
        tmp_path,
        sessions=listed("mine", "Launched"),
        commands=f"""start) sed -i s/Launched/RangeGeneration/ {tmp_path}/sessions ;;
stop) exit 1 ;;""",
    )
    mine = session(path)
    mine.start(report)

    def end():
        report.write_bytes(b"report")
        (tmp_path / "sessions").write_text(over)

    threading.Timer(0.5, end).start()
    assert mine.stop(timeout=20) == report
    assert "stop" not in calls(path)
    with pytest.raises(NsysSessionError, match="no open window"):
        mine.stop(timeout=1)


def test_errors_of_an_import_that_succeeded_are_kept(tmp_path):
    report = tmp_path / "w.nsys-rep"
    report.write_bytes(b"report")
    mine = stopping(
        tmp_path,
        "printf 'Importer error status: Importation succeeded with non-fatal errors.\\n"
        f"Status:   TargetProfilingFailed\\nGenerated:\\n  {report}\\n'",
    )
    assert mine.stop(timeout=10) == report
    assert mine.remarks == (
        "Importer error status: Importation succeeded with non-fatal errors.",
        "Status: TargetProfilingFailed",
    )


CASES = {
    "N01_plain": "Collection",
    "N02_range_generation": "RangeGeneration",
    "N03_days": "Collection",
    "N03b_days_blank": "Collection",
    "N04_no_name_blank": None,
    "N05_warning_first": "Collection",
    "N08_stop_importer_warn": "Collection",
    "N09_stop_color": "Collection",
    "N10_version_cli": None,
}


@pytest.mark.parametrize("name", CASES)
def test_what_nsys_prints_in_public_reports_is_read(tmp_path, shared_data, name):
    folder = shared_data.parent / "cases" / "server" / "nsys_cases" / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    text = {path.stem: path.read_text() for path in folder.iterdir()}
    said = tmp_path / "said"
    said.write_text(text.get("stop", "").replace("x.nsys-rep", f"{tmp_path}/x.nsys-rep"))
    (tmp_path / "x.nsys-rep").write_bytes(b"report")
    path = fake_nsys(
        tmp_path,
        version=text.get("version", VERSION).splitlines()[0],
        sessions=text.get("sessions", ""),
        commands=f"stop) cat {said} ;;",
    )
    tool = find_nsys(str(path))
    assert tool.version == ("2026.1.0.1" if "version" in text else "2023.4.4.54")
    mine = NsysSession(tool, "sglprof-x")
    assert mine.state() == (CASES[name] or "")
    if name.startswith("N04"):
        assert NsysSession(tool, "[default]").state() == "Collection"
    if "stop" in text:
        assert mine.stop(timeout=1.0) == tmp_path / "x.nsys-rep"
        assert any("non-fatal errors" in line for line in mine.remarks) == ("N08" in name)


def test_the_report_is_where_nsys_says_and_progress_is_told(tmp_path, shared_data):
    report = tmp_path / "elsewhere" / "win-b.nsys-rep"
    report.parent.mkdir()
    report.write_bytes(b"report")
    text = (shared_data / "logs" / "nsys_stop_output.txt").read_text()
    (tmp_path / "said").write_text(text.replace("/srv/run/", f"{report.parent}/"))
    told: list[str] = []
    mine = stopping(tmp_path, f"cat {tmp_path}/said")
    assert mine.stop(timeout=10, progress=told.append) == report
    assert "win-b.nsys-rep: 82 %" in told
    assert told[-1] == "win-b.sqlite: 100 %"


def test_a_broken_importer_is_recognised(tmp_path):
    stream = tmp_path / "nsys-report-1af6.qdstrm"
    stream.write_bytes(b"stream")
    mine = stopping(
        tmp_path,
        f"printf \"Generating '{stream}'\\nImporter error status: importer failed\\n"
        f'Generated:\\n    {stream}\\n"',
    )
    with pytest.raises(NsysError, match="no report: its importer did not work") as caught:
        mine.stop(timeout=10)
    assert "libssh" in caught.value.hint
    assert any("Importer error status" in line for line in caught.value.log)


def test_an_importer_that_stumbled_works_the_second_time(tmp_path):
    """Seen on a loaded machine: an exception in the importer, whose input is left."""
    stream = tmp_path / "w.qdstrm"
    stream.write_bytes(b"stream")
    mine = stopping(tmp_path / "target", f"printf 'Generated:\\n    {stream}\\n'")
    importer = tmp_path / "host-linux-x64" / "QdstrmImporter"
    importer.parent.mkdir()
    importer.write_text('#!/bin/sh\n[ "$1" = --input-file ] && cp "$2" "$4"\n')
    importer.chmod(0o755)
    report = mine.stop(timeout=10)
    assert report == tmp_path / "w.nsys-rep"
    assert report.read_bytes() == b"stream"
    assert not stream.exists()


def test_the_head_may_stand_at_the_end_of_a_progress_bar(tmp_path):
    """Seen on a loaded machine: importer and command write at the same time."""
    report = tmp_path / "w.nsys-rep"
    report.write_bytes(b"report")
    bar = r"\r[1/1] [===50%%      ] w.nsys-rep"
    mine = stopping(tmp_path / "n", f"printf '{bar}Generated:\\n    {report}\\n'")
    assert mine.stop(timeout=10) == report


def test_a_report_that_is_named_but_not_there(tmp_path):
    mine = stopping(tmp_path, f"printf 'Generated:\\n\\t{tmp_path}/none.nsys-rep\\n'")
    with pytest.raises(NsysError, match="printed no path of an existing report"):
        mine.stop(timeout=10)
    with pytest.raises(NsysError, match="printed no path of an existing report"):
        stopping(tmp_path / "b", "true").stop(timeout=10)


def test_a_stop_that_takes_too_long_is_ended(tmp_path):
    mine = stopping(tmp_path, "echo working; exec sleep 60")
    began = time.monotonic()
    with pytest.raises(NsysError, match=r"did not end within 0\.3 s") as caught:
        mine.stop(timeout=0.3)
    assert time.monotonic() - began < 5
    assert caught.value.log == ("working",)


def test_a_stop_that_closes_its_output_and_hangs(tmp_path):
    mine = stopping(tmp_path, "exec >/dev/null 2>&1; exec sleep 60")
    with pytest.raises(NsysError, match="did not end within"):
        mine.stop(timeout=0.3)


def test_carriage_returns_are_line_ends():
    told: list[str] = []
    output = StopOutput(told.append)
    output.feed("[1/1] [0%      ] a.nsys-rep\r[1/1] [==5")
    output.feed("0%     ] a.nsys-rep\r")
    assert told == ["a.nsys-rep: 0 %", "a.nsys-rep: 50 %"]


def test_an_export_that_fails_leaves_nothing(tmp_path):
    report = tmp_path / "r.nsys-rep"
    with pytest.raises(NsysError, match="no such report"):
        export(NsysTool("nsys", "1"), report, "sqlite", tmp_path / "r.sqlite", 5)
    report.write_bytes(b"x")
    path = fake_nsys(tmp_path / "n", commands="export) echo 'unknown report version'; exit 3 ;;")
    with pytest.raises(NsysError, match="could not export") as caught:
        export(NsysTool(str(path), "2023.4"), report, "sqlite", tmp_path / "r.sqlite", 5)
    assert caught.value.log == ("unknown report version",)
    slow = fake_nsys(tmp_path / "s", commands="export) exec sleep 60 ;;")
    with pytest.raises(NsysError, match=r"did not answer within 0\.2 s"):
        export(NsysTool(str(slow), "2023.4"), report, "parquet", tmp_path / "p", 0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n", "r.nsys-rep", "s"]


def test_a_parquet_export_is_a_folder_and_replaces_an_old_one(tmp_path):
    report = tmp_path / "r.nsys-rep"
    report.write_bytes(b"x")
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.parquet").touch()
    script = 'for w; do case $w in --output=*) o=${w#--output=};; esac; done; mkdir "$o"; :>"$o/a"'
    path = fake_nsys(tmp_path / "n", commands=f"export) {script} ;;")
    assert export(NsysTool(str(path), "2024"), report, "parquet", target, 5) == target
    assert [found.name for found in target.iterdir()] == ["a"]
    assert "--type=parquetdir" in (tmp_path / "n" / "calls").read_text()


def test_credentials_are_hidden_in_every_shape_that_an_environment_has(tmp_path):
    database = tmp_path / "r.sqlite"
    block = b"PATH=/bin\x00HF_TOKEN=hf_abcdef\x00LANG=\xff\x00"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT)")
        connection.execute("CREATE TABLE TARGET_INFO_SYSTEM_ENV (name TEXT, value TEXT)")
        connection.executemany(
            "INSERT INTO StringIds VALUES (?, CAST(? AS TEXT))",
            [(1, block), (2, b"AWS_SECRET_KEY=aws;x"), (3, b"void f<a=1>()"), (4, b"max_tokens=5")],
        )
        connection.execute(
            "INSERT INTO TARGET_INFO_SYSTEM_ENV VALUES ('DeviceEnvironment', ?)",
            ("A=1;MY_API_KEY=kkkk;B=2",),
        )
    connection.close()
    assert hide_credentials(database) == 3
    data = database.read_bytes()
    for secret in (b"hf_abcdef", b"aws;x", b"kkkk"):
        assert secret not in data
    with sqlite3.connect(database) as connection:
        connection.text_factory = bytes
        rows = dict(connection.execute("SELECT id, value FROM StringIds").fetchall())
        (told,) = connection.execute("SELECT value FROM TARGET_INFO_SYSTEM_ENV").fetchone()
    connection.close()
    assert rows[1] == b"PATH=/bin\x00HF_TOKEN=<redacted>\x00LANG=\xff\x00"
    assert rows[3] == b"void f<a=1>()"
    assert rows[4] == b"max_tokens=5"
    assert told == b"A=1;MY_API_KEY=<redacted>;B=2"


def test_our_credentials_are_not_given_to_nsys(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    path = fake_nsys(tmp_path, commands=f"sessions) env > {tmp_path}/environment ;;")
    assert NsysSession(NsysTool(str(path), "1"), "x", tmpdir=tmp_path / "t").state() == ""
    seen = (tmp_path / "environment").read_text()
    assert "hf_abcdef" not in seen
    assert f"TMPDIR={tmp_path / 't'}" in seen


def test_follow_gives_up_at_its_limit_while_output_goes_on():
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as process:
        assert not StopOutput().follow(process, 0.1)
        process.kill()
