"""A server with a certificate of its own and a file of options, started and attached to."""

from __future__ import annotations

import socket
import time

import pytest

from pytest_sglprof._cli.main import main
from tests.support.certificates import certificate
from tests.support.project import Outcome, Project
from tests.support.running import Running, standin

KEY = "sk-of-the-file-4711"
PASSWORD = "of the key, 4712"
TESTS = """
@pytest.mark.profile_window(num_steps=60)
def test_marked(sglang_server, load, load_watch):
    assert sglang_server.url.startswith("https://localhost:")
    assert load(1500).completed == 4
    assert load_watch.samples
"""
CONFIG = """
[server]
kind = "standin"
args = ["--config", "server.yaml", "--ssl-certfile", "c.pem", "--ssl-keyfile=c.key"]
standin_args = ["--step-ms", "4", "--layers", "1"]

[[threshold]]
limit = 1.10
"""
FILE = f"""
tensor-parallel-size: 2
api-key: {KEY}
ssl-keyfile-password: "{PASSWORD}"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("tls") / "job", TESTS, CONFIG)


@pytest.fixture(scope="module")
def ran(project: Project) -> Outcome:
    certificate(project.folder, "c", password=PASSWORD)
    (project.folder / "server.yaml").write_text(FILE)
    return project.run("--sglprof-set=output.keep=all")


def test_it_starts_is_loaded_watched_and_profiled_over_https(ran):
    assert ran.status == 0
    (window,) = ran.windows("test_marked")
    assert window["verdict"] == "pass"
    (server,) = ran.results["servers"]
    assert server["url"].startswith("https://localhost:")


def test_the_sizes_of_the_file_count(ran):
    (server,) = ran.results["servers"]
    assert server["sizes"]["tp"] == 2


def test_secrets_of_the_file_stand_nowhere(ran):
    for path in ran.run_folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert KEY.encode() not in content, path
            assert PASSWORD.encode() not in content, path
    assert KEY not in ran.text
    assert PASSWORD not in ran.text


def test_nothing_is_left(ran, project):
    assert project.left_over(20.0) == []


# A server that somebody else runs.


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    made = certificate(folder, "c")
    words = ("--tp", "2", "--dp", "2", "--step-ms", "4", "--layers", "1")
    tls = ("--ssl-certfile", str(made.file), "--ssl-keyfile", str(made.key))
    with standin(folder, *words, *tls, ca=made.file) as running:
        yield running, made.file


def test_it_is_attached_to_by_its_certificate(theirs, tmp_path):
    running, file = theirs
    project = Project(tmp_path / "job", TESTS, "[[threshold]]\nlimit = 2.0\n")
    shared = tmp_path / "shared"
    shared.mkdir()
    options = (f"--sglprof-server={running.url}", f"--sglprof-server-dir={shared}:{shared}")
    outcome = project.run(*options, SGLPROF_SERVER_CA=str(file))
    assert outcome.word("test_marked") == "PASSED"
    (window,) = outcome.windows("test_marked")
    assert window["state"] == "complete"


def test_it_is_watched(theirs, capsys):
    running, file = theirs
    watch = ["watch", running.url, "--for", "2"]
    assert main([*watch, "--server-ca", str(file)]) == 0
    assert main(watch) != 0
    assert "certificate is not trusted" in capsys.readouterr().err


def test_a_connection_that_stalls_stops_no_other(theirs: tuple[Running, object]):
    running, _ = theirs
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)):
        began = time.monotonic()
        assert running.get("/health").status_code == 200
        assert time.monotonic() - began < 10
