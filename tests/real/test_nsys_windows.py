"""The main job on a real SGLang under a real nsys: two windows in one server life."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.drawn_secrets import Secrets
from tests.support.real_env import real_nsys, real_sglang
from tests.support.real_project import Outcome, left_over, run_project, write_project

pytestmark = [pytest.mark.real_server, pytest.mark.real_nsys]

BODY = """
import pytest

pytestmark = pytest.mark.sglang_server(nsys=True)


def test_two_windows_in_one_life(bench_serving, profile_window):
    load = dict(max_concurrency=4, random_input_len=32, random_output_len=64)
    with bench_serving.running(num_prompts=240, random_range_ratio=1.0, **load):
        for name in ("first", "second"):
            with profile_window(name, backend="nsys", duration=3.0) as window:
                window.wait()


def test_prompts_that_hold_secrets(sglang_server):
    import os

    import httpx

    headers = {"Authorization": f"Bearer {os.environ['SVC_API']}"}
    for name in ("SVC_ADM", "MY_SETTING", "HF_TOKEN", "DB_URL"):
        print("the prompt is", os.environ[name])
        request = {"text": os.environ[name], "sampling_params": {"max_new_tokens": 2}}
        answer = httpx.post(
            f"{sglang_server.url}/generate", json=request, headers=headers, timeout=60
        )
        assert answer.status_code == 200
"""
KEYS = """
api_key_env = "SVC_API"
admin_api_key_env = "SVC_ADM"
secrets = ["MY_SETTING"]
"""
BATCHES = """
    SELECT (e.globalTid >> 24) & 0xFFFFFF AS pid, count(*)
    FROM NVTX_EVENTS AS e LEFT JOIN StringIds AS s ON s.id = e.textId
    WHERE coalesce(e.text, s.value) = 'scheduler.run_batch' GROUP BY pid
"""


@pytest.fixture(scope="module")
def drawn() -> Secrets:
    return Secrets()


SHARED = Path("/dev/shm")


@pytest.fixture(scope="module")
def shared_before() -> set[Path]:
    return set(SHARED.iterdir())


@pytest.fixture(scope="module")
def under_nsys(
    tmp_path_factory: pytest.TempPathFactory, drawn: Secrets, shared_before: set[Path]
) -> Outcome:
    real_nsys()
    folder = tmp_path_factory.mktemp("nsys")

    def url(name: str) -> str:
        return f"https://me:{quote(drawn.draw(name), safe='')}@host/x"

    names = ("SVC_API", "SVC_ADM", "MY_SETTING", "HF_TOKEN", "DB_PASS", "TOKENIZER_API_KEY")
    variables = {name: drawn.draw(name) for name in (*names, "GITHUB_PAT")}
    variables["DB_URL"] = url("DB_URL")
    overrides = json.dumps({"auth_token": drawn.draw("auth_token")})
    write_project(
        folder,
        real_sglang(),
        BODY,
        model="llama",
        args=(
            *("--tp", "2", "--log-requests", "--log-requests-level", "3"),
            *("--weight-version", url("weight-version")),
            *("--json-model-override-args", overrides),
        ),
        ranks=2,
        env={"WANDB_TOKEN": drawn.draw("WANDB_TOKEN"), "SOME_URL": url("SOME_URL")},
        more=KEYS,
    )
    return run_project(folder, "-rP", **variables)


def test_both_windows_are_complete_and_judged(under_nsys: Outcome) -> None:
    assert under_nsys.status == 0, under_nsys.output
    versions = under_nsys.results["run"]["versions"]
    assert versions["nsys"]
    assert versions["sglang"]
    print(f"sglang {versions['sglang']} under nsys {versions['nsys']}")
    assert len(under_nsys.results["servers"]) == 1
    for window in under_nsys.windows().values():
        assert window["state"] == "complete", window["state_reason"]
        assert window["verdict"] == "pass"
        assert window["source"] == "nvtx"
        assert window["ranks"] == ["TP0", "TP1"]


def test_the_ranks_in_the_report_are_those_of_the_server(under_nsys: Outcome) -> None:
    for name, window in under_nsys.windows().items():
        exports = [a["path"] for a in window["artifacts"] if a["path"].endswith(".sqlite")]
        batches = dict(_query(under_nsys.folder / exports[0], BATCHES))
        assert len(batches) == 2
        steps = window["steps"]["per_rank"]
        print(f"nsys window {name}: scheduler.run_batch {steps} (by pid: {batches})")
        assert sorted(steps.values()) == sorted(batches.values())
        assert min(steps.values()) >= 30


def test_fault_b_none_of_twelve_secrets_is_written(under_nsys: Outcome, drawn: Secrets) -> None:
    assert len(set(drawn.words.values())) == 12
    project = under_nsys.folder.parents[1]
    assert drawn.leaks(project, under_nsys.output) == {}
    log = next(under_nsys.folder.glob("servers/*/server.log")).read_text()
    assert log.count("<redacted>") >= 4  # its arguments, and each prompt
    assert under_nsys.output.count("the prompt is") == 4
    reports = list(under_nsys.folder.glob("windows/*/*.nsys-rep"))
    assert len(reports) == 2
    for report in reports:
        raw = project / "raw.sqlite"  # as nsys itself exports it, with nothing taken out
        words = [real_nsys(), "export", "--type=sqlite", "--force-overwrite=true"]
        environment = {"PATH": os.environ["PATH"]}
        subprocess.run(
            [*words, f"--output={raw}", str(report)],
            check=True, capture_output=True, env=environment,
        )  # fmt: skip
        assert drawn.among(raw.read_bytes()) == set()


def test_nothing_is_left_of_server_session_and_agent(
    under_nsys: Outcome, shared_before: set[Path]
) -> None:
    project = under_nsys.folder.parents[1]
    assert left_over(project) == []
    assert list((project / "leases").glob("*")) == []
    assert set(SHARED.iterdir()) - shared_before == set()


def _query(path: Path, text: str) -> list[tuple[int, int]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(text).fetchall()
    finally:
        connection.close()
