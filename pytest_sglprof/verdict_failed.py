"""The exceptions by which a bad verdict reaches pytest.

They are two classes that do not inherit from each other, so that
`xfail(raises=VerdictFailed)` is not satisfied by a window with too little data.
"""

from __future__ import annotations

import pytest


class VerdictFailed(pytest.fail.Exception):  # type: ignore[name-defined,misc]  # a variable to mypy
    """A test whose body passed, but one of whose profile windows failed.

    For `@pytest.mark.xfail(raises=VerdictFailed, strict=True)`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, pytrace=False)


class VerdictInconclusive(pytest.fail.Exception):  # type: ignore[name-defined,misc]  # likewise
    """A test whose body passed, but whose profile windows hold too little for a verdict."""

    def __init__(self, message: str) -> None:
        super().__init__(message, pytrace=False)
