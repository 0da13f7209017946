"""Regular expressions that users write."""

from __future__ import annotations

import re

from pytest_sglprof.errors import SettingsError


def compiled(
    expression: str,
    what: str,
    *,
    expected: str = "a Python regular expression that is searched in full kernel names",
    hint: str = "escape what is meant literally, for example \\( and \\[",
) -> re.Pattern[str]:
    """Compiles `expression`; `SettingsError` says that `what` is none, and why."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise SettingsError(
            f"{what} is no regular expression: {error}", expected=expected, hint=hint
        ) from error
