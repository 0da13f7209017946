"""What is refused before a server sees it, and what it is sent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_sglprof._capture.torch import last_step, read_progress
from pytest_sglprof._capture.torch_request import (
    STEP_BYTES,
    bytes_per_rank,
    default_activities,
    knows_annotations,
    refuse_request,
    request_body,
    wanted_stages,
)
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import WindowRefused
from pytest_sglprof._server.log import ServerLog
from pytest_sglprof._server.sizes import ServerSizes

GPU = ServerSizes(tp=2, version="0.5.23")
CPU = replace(GPU, device="cpu")


def refuse(
    spec: WindowSpec, sizes: ServerSizes = GPU, last_step: int | None = None, **options: object
) -> None:
    facts = {"under_nsys": False, "standin": False, "env": {}, **options}
    refuse_request(spec, sizes, last_step=last_step, **facts)


@pytest.mark.parametrize(
    ("spec", "sizes", "told"),
    [
        (WindowSpec(activities=("GPU",)), CPU, "on a CPU server"),
        (WindowSpec(activities=("CPU", "MEM")), CPU, "on a CPU server"),
        (WindowSpec(activities=("cpu",)), GPU, "would record no kernel"),
        (WindowSpec(activities=()), GPU, "would record no kernel"),
        (WindowSpec(activities=("MEM",)), GPU, "would record no kernel"),
        (WindowSpec(activities=("CUDA_PROFILER",)), GPU, "would record no kernel"),
        (WindowSpec(profile_by_stage=True), GPU, "dies at its next batch"),
        (
            WindowSpec(profile_by_stage=True, num_steps=5),
            replace(GPU, attn_dp=2, dp_attention=True),
            "under DP attention",
        ),
        (WindowSpec(profile_by_stage=True, num_steps=5, profile_stages=("x",)), GPU, "_stages: x"),
        (WindowSpec(profile_stages=("decode",)), GPU, "without profile_by_stage"),
        (WindowSpec(num_steps=0), GPU, "num_steps=0"),
        (WindowSpec(start_step=0), GPU, "is past"),
    ],
)
def test_deadly_and_useless_requests(spec, sizes, told):
    with pytest.raises(WindowRefused, match=told):
        refuse(spec, sizes)


@pytest.mark.parametrize(
    "spec",
    [
        WindowSpec(),
        WindowSpec(activities=("CPU", "GPU", "MEM")),
        WindowSpec(profile_by_stage=True, num_steps=5, profile_stages=("prefill",)),
        WindowSpec(num_steps=50, start_step=7),
    ],
)
def test_sound_requests(spec):
    refuse(spec)


def test_a_start_step_that_is_known_to_be_past():
    with pytest.raises(WindowRefused, match="the server is at 90"):
        refuse(WindowSpec(start_step=90), last_step=90)
    refuse(WindowSpec(start_step=91), last_step=90)


def test_profile_v2_servers():
    with pytest.raises(WindowRefused, match="SGLANG_PROFILE_V2"):
        refuse(WindowSpec(), env={"SGLANG_PROFILE_V2": "1"})
    refuse(WindowSpec(), env={"SGLANG_PROFILE_V2": "0"})


def test_cupti_takes_one_subscriber():
    with pytest.raises(WindowRefused, match="CUPTI"):
        refuse(WindowSpec(), under_nsys=True)
    refuse(WindowSpec(), CPU, under_nsys=True)
    refuse(WindowSpec(), under_nsys=True, standin=True)


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        (WindowSpec(activities=("cpu",)), "did you mean CPU?"),
        (WindowSpec(activities=("CPU", "GUP")), "did you mean GPU?"),
        (
            WindowSpec(profile_by_stage=True, num_steps=40, profile_stages=("decoed",)),
            "did you mean decode?",
        ),
    ],
)
def test_fault_8_a_name_that_only_the_server_knows_is_refused_with_the_nearest(spec, meant):
    with pytest.raises(WindowRefused) as refused:
        refuse_request(spec, GPU, under_nsys=False, standin=False, env={}, last_step=None)
    assert meant in str(refused.value)


def test_activities_follow_the_device():
    assert default_activities("cuda") == ("CPU", "GPU")
    assert default_activities("cpu") == ("CPU",)
    assert default_activities("xpu") == ("CPU", "XPU")


def body(spec: WindowSpec, sizes: ServerSizes = GPU) -> dict[str, object]:
    return request_body(spec, profile_id="i", output_dir="/o", sizes=sizes)


def test_only_what_is_set_is_sent():
    assert body(WindowSpec(detailed_annotations=False)) == {
        "output_dir": "/o",
        "profile_id": "i",
        "activities": ["CPU", "GPU"],
        "with_stack": False,
        "record_shapes": False,
    }


def test_everything_can_be_sent():
    spec = WindowSpec(
        num_steps=5,
        start_step=9,
        activities=("CPU",),
        profile_by_stage=True,
        profile_stages=("decode",),
        with_stack=True,
        record_shapes=True,
        merge_profiles=True,
        profile_prefix="p",
    )
    assert body(spec) == {
        "output_dir": "/o",
        "profile_id": "i",
        "activities": ["CPU"],
        "with_stack": True,
        "record_shapes": True,
        "num_steps": 5,
        "start_step": 9,
        "profile_by_stage": True,
        "profile_stages": ["decode"],
        "merge_profiles": True,
        "profile_prefix": "p",
        "detailed_annotations": True,
    }


def test_annotations_only_where_they_are_known():
    assert knows_annotations("0.5.23.post1")
    assert knows_annotations("1.0.0")
    assert not knows_annotations("0.5.9")
    assert not knows_annotations("dev")
    assert "detailed_annotations" not in body(WindowSpec(), replace(GPU, version="0.5.2"))


@pytest.mark.parametrize(
    ("version", "asked"), [("0.5.3", 6), ("0.5.15", 6), ("0.5.16", 5), ("0.5.23", 5), ("dev", 5)]
)
def test_a_window_has_the_steps_that_are_asked_for(version, asked):
    sizes = replace(GPU, version=version)
    assert body(WindowSpec(num_steps=5), sizes)["num_steps"] == asked
    # Windows by stage, and those that begin at a step, count in all versions alike.
    assert body(WindowSpec(num_steps=5, profile_by_stage=True), sizes)["num_steps"] == 5
    assert body(WindowSpec(num_steps=5, start_step=9), sizes)["num_steps"] == 5


@pytest.mark.parametrize("version", ["0.5.9", "0.5.20", ""])
def test_stages_of_an_older_decode_server_are_refused(version):
    spec = WindowSpec(profile_by_stage=True, num_steps=3)
    sizes = replace(GPU, version=version)
    with pytest.raises(WindowRefused, match="decode server"):
        refuse_request(
            spec, sizes, under_nsys=False, standin=False, env={}, last_step=None, role="decode"
        )
    for role, newest in (("decode", "0.5.23"), ("prefill", version), ("", version)):
        sizes = replace(GPU, version=newest)
        refuse_request(
            spec, sizes, under_nsys=False, standin=False, env={}, last_step=None, role=role
        )


def test_stages_become_suffixes():
    assert wanted_stages(WindowSpec()) == ()
    assert wanted_stages(WindowSpec(profile_by_stage=True)) == ("EXTEND", "DECODE")
    spec = WindowSpec(profile_by_stage=True, profile_stages=("extend", "prefill"))
    assert wanted_stages(spec) == ("EXTEND",)


def test_estimates_grow_with_what_is_recorded():
    assert bytes_per_rank(WindowSpec(num_steps=50)) == 50 * STEP_BYTES
    assert bytes_per_rank(WindowSpec(num_steps=50, profile_by_stage=True)) == 100 * STEP_BYTES
    plain = bytes_per_rank(WindowSpec(duration=2.0))
    assert bytes_per_rank(WindowSpec(duration=2.0, with_stack=True)) > 4 * plain
    assert bytes_per_rank(WindowSpec(duration=2.0, record_shapes=True)) > plain
    assert bytes_per_rank(WindowSpec()) > 0


def test_a_real_log_tells_who_began_and_ended(shared_data):
    log = ServerLog(shared_data / "logs" / "dp2_idle_rank.log")
    progress = read_progress(log, 0, "1795491830.2191997")
    # DP0 was idle and still profiled when the next window began: that one was lost.
    assert progress.begun == {(0, 0, 0): 2, (1, 0, 0): 1}
    assert set(progress.strangers) == {"1795491832.2717984", "1795491836.154413"}
    mixtral = ServerLog(shared_data / "logs" / "mixtral_tp2ep2.log")
    ended = read_progress(mixtral, 0, "1795491584.8582232")
    assert ended.begun == ended.ended == {(0, 0, 0): 1, (0, 0, 1): 1}
    assert ended.pending() == []
    assert ended.batches > 0


def test_steps_are_known_only_where_they_are_logged(shared_data):
    assert last_step(ServerLog(shared_data / "logs" / "tp2" / "server.log")) is None
    under_nsys = ServerLog(shared_data / "logs" / "tp2_under_nsys.log")
    assert (last_step(under_nsys) or 0) > 100
