"""`[window] repeat` on the stand-in."""

from __future__ import annotations


def test_the_option_repeats_all_windows_that_end_by_themselves(make_project):
    tests = """
@pytest.mark.profile_window(num_steps=60)
def test_marked(load):
    load(2000)

@pytest.mark.profile_window(num_steps=60, repeat=1)
def test_once(load):
    load(1200)

@pytest.mark.profile_window(whole_body=True)
def test_whole_body(drive):
    drive()
"""
    outcome = make_project(tests).run("--sglprof-set=window.repeat=2")
    assert outcome.status == 0
    numbers = {
        name: len(outcome.windows(name)) for name in ("test_marked", "test_once", "test_whole_body")
    }
    assert numbers == {"test_marked": 2, "test_once": 1, "test_whole_body": 1}
