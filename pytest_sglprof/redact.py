"""Keeps API keys out of everything that is stored or shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "<redacted>"
_SECRET_NAME = re.compile(
    r"(api|admin|access|secret|auth)[-_]?(key|token)|token$|password|secret", re.I
)
_SECRET_ENV = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.I)
_NOT_SECRET = re.compile(r"tokens|tokenizer|_token_id|token_usage", re.I)


def is_secret_env(name: str) -> bool:
    """True for environment variables that usually hold a credential."""
    return bool(_SECRET_ENV.search(name)) and not _NOT_SECRET.search(name)


def redact(value: Any) -> Any:
    """A copy of plain data (dict, list, scalars) with the values of secret keys hidden."""
    if isinstance(value, Mapping):
        return {key: _redact_item(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if all(type(item) is int for item in value):  # the long lists of a window
            return list(value)
        return [redact(item) for item in value]
    return value


def _redact_item(key: str, item: Any) -> Any:
    if item and isinstance(item, str) and _SECRET_NAME.search(key) and not _NOT_SECRET.search(key):
        return HIDDEN
    return redact(item)


def redact_text(text: str, secrets: Iterable[str]) -> str:
    """`text` with each known secret (of 4 characters or more) replaced."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, HIDDEN)
    return text


def redact_command(command: Iterable[str]) -> list[str]:
    """A command line with the values of secret options hidden (`--api-key X`, `--api-key=X`)."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = (
            name.startswith("--")
            and bool(_SECRET_NAME.search(name))
            and not _NOT_SECRET.search(name)
        )
        if hide_next:
            shown.append(HIDDEN)
        elif secret and equals:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(word)
        hide_next = secret and not equals and not hide_next
    return shown
