"""Runs a test again on a fresh server, where one life alone does not decide.

All of it happens inside of the call of the test, outside of what other plugins do around it: so
the test has one setup, one call, one teardown and one report, with pytest-xdist,
pytest-rerunfailures and whatever else counts these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from pytest_sglprof._plugin.markers import SERVER_FIXTURE


class Confirming:
    """The outermost hooks around the call of a test and around the making of its report.

    wants_life: whether a test needs one more server life. announce: says what it costs, from the
    seconds that the one before took without the start of its server. attach_last: adds to a
    report what other plugins did while they made it.
    """

    def __init__(
        self,
        wants_life: Callable[[pytest.Item], bool],
        announce: Callable[[pytest.Item, float], None],
        attach_last: Callable[[pytest.Item, pytest.TestReport], None],
    ) -> None:
        self._wants_life = wants_life
        self._announce = announce
        self._attach_last = attach_last
        self._is_running = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """After the call: calls the test again on another server life, as often as it takes."""
        began = time.monotonic()
        result = yield
        if self._is_running:
            return result
        self._is_running = True
        try:
            while self._wants_life(item):
                self._announce(item, time.monotonic() - began)
                began = time.monotonic()
                _take_down(item)
                item.ihook.pytest_runtest_setup(item=item)
                item.ihook.pytest_runtest_call(item=item)
        finally:
            self._is_running = False
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Completes the report of a test that was repeated while it was made."""
        report = yield
        self._attach_last(item, report)
        return report


def _take_down(item: pytest.Item) -> None:
    """Tears down the test and its server, and with it the fixtures that use it; nothing else."""
    test: Any = item  # what pytest itself and pytest-rerunfailures use is not public
    test.session._setupstate.teardown_exact(item.parent)
    for fixture in test._fixtureinfo.name2fixturedefs.get(SERVER_FIXTURE, ()):
        fixture.finish(test._request)
    if getattr(test, "_instance", None) is not None:  # of the test's class
        del test._instance
        test._obj = None
    test._initrequest()
