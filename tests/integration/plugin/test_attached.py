"""`--sglprof-server`: windows on a server that somebody else runs, and its key."""

from __future__ import annotations

import pytest

from tests.support.project import Outcome, Project
from tests.support.running import Running, standin

KEY = "sk-never-shown-4711"
# A key of the profile endpoints is not the one of the others.
ADMIN = "sk-admin-never-shown-4712"
KEYS = {"SGLPROF_API_KEY": KEY, "SGLPROF_ADMIN_API_KEY": ADMIN}
TESTS = """
@pytest.mark.profile_window(num_steps=60)
def test_marked(sglang_server, load):
    assert sglang_server.attached
    assert load(1500).completed == 4


def test_by_hand(sglang_server, bench_serving, profile_window):
    with bench_serving.running(num_prompts=4, max_concurrency=4, random_input_len=8,
                               random_output_len=1500, random_range_ratio=1.0, warm_up=False,
                               disable_stream=True):
        with profile_window("hand", num_steps=60) as window:
            window.wait()
    assert window.check("slowdown", 1.10, scope="moe") < 1.02
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    keys = ("--api-key", KEY, "--admin-api-key", ADMIN)
    with standin(folder, "--tp", "2", "--step-ms", "4", "--layers", "1", *keys) as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("attached") / "job", TESTS)


@pytest.fixture(scope="module")
def ran(server: Running, project: Project) -> Outcome:
    shared = project.folder / "shared"
    shared.mkdir()
    return project.run(
        f"--sglprof-server={server.url}",
        f"--sglprof-server-dir={shared}:{shared}",
        "--sglprof-set=output.keep=all",
        **KEYS,
    )


def test_both_windows_are_judged(ran):
    assert ran.status == 0
    assert ran.word("test_marked") == ran.word("test_by_hand") == "PASSED"
    for name in ("test_marked", "test_by_hand"):
        (window,) = ran.windows(name)
        assert window["verdict"] == "pass"
        assert window["ranks"] == ["TP0", "TP1"]
        assert window["standin"]


def test_the_server_is_named_and_lives_on(ran, server):
    (life,) = ran.results["servers"]
    assert life["attached"]
    assert life["url"] == server.url
    assert server.get("/ready").status_code == 200
    assert "/health answers 503" in ran.text


def test_its_keys_are_nowhere(ran, project):
    assert KEY not in ran.text
    assert ADMIN not in ran.text
    for path in project.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert KEY.encode() not in content, path
            assert ADMIN.encode() not in content, path


def test_without_the_key_the_answer_is_told_in_plain_words(server, project):
    ran = project.run(f"--sglprof-server={server.url}", "-k", "marked")
    assert ran.status == 1
    assert ran.word("test_marked") == "ERROR"
    assert "401" in ran.section("test_marked")
    assert "Traceback" not in ran.section("test_marked")


def test_on_this_machine_no_shared_folder_is_asked_for(server, project):
    ran = project.run(f"--sglprof-server={server.url}", "-k", "marked", **KEYS)
    assert ran.word("test_marked") == "PASSED"


def test_nothing_listens_there(project):
    ran = project.run("--sglprof-server=http://127.0.0.1:9", "-k", "marked")
    assert ran.word("test_marked") == "ERROR"
    assert "check the URL, and that the server is running" in ran.section("test_marked")
