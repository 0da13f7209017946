"""The exceptions by which a bad verdict reaches pytest."""

from __future__ import annotations

import pytest


class VerdictFailed(pytest.fail.Exception):  # type: ignore[name-defined,misc]  # a variable to mypy
    """A test whose body passed, but whose profile windows did not.

    ``verdict`` is "fail" or "inconclusive". Usable in
    ``@pytest.mark.xfail(raises=VerdictFailed, strict=True)``.
    """

    def __init__(self, message: str, *, verdict: str = "fail") -> None:
        super().__init__(message, pytrace=False)
        self.verdict = verdict
