"""Keeps credentials out of everything that is stored or shown.

A secret is recognised in one of three ways:

- by its name: `is_secret_env` for environment variables, `is_secret_name` for options and keys;
- by its place: the password of a URL (``scheme://user:PASSWORD@host``), a query parameter or
  an assignment with a secret name;
- by its value: `learn` takes values, and from then on `redact`, `redact_text` and
  `redact_bytes` hide them everywhere, also if they are quoted as in a URL or escaped as in
  JSON, Python and shells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "<redacted>"
MIN_DECLARED = 4  # characters; a shorter value would be hidden in the middle of other words
MIN_GUESSED = 8  # the same for a value of which only the name says that it is a secret

# Secret names.

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
_SECRET = re.compile(
    r".*(password|passwd|passphrase|secrets?|credentials?|creds|apikeys?|token|jwt|bearer)"
)
_SECRET_AT_THE_END = re.compile(r"pat|pw|pwd|auth|cookie|passcode")
_KINDS_OF_KEY = "api|admin|access|secret|auth|private|signing|encryption|license|account|master"
_KEY = re.compile(rf"(?:.* )?(?:{_KINDS_OF_KEY}|shared) ?keys?(?: .*)?")
# Words that turn a name into that of an amount: `token_ids`, `token_budget`.
_AMOUNT = re.compile(r"ids?|budget|ratio|num|per|throughput")
# A name that ends like this describes a secret (its path, its length) and does not hold it.
_DESCRIPTION = re.compile(
    r"path|files?|dir|folder|name|type|count|limit|size|length|len|usage|parallelism|ttl|expiry|"
    r"url|uri|endpoint|host|port|env|format|provider|algorithm|header|prefix|sock"
)


def is_secret_env(name: str) -> bool:
    """True for environment variables that usually hold a credential (`HF_TOKEN`, `DB_PASS`)."""
    words = _words(name)
    if _is_secret(words):
        return True
    ends_like_one = words[-1:] in (["pass"], ["api"]) and len(words) > 1
    return ends_like_one or bool({"key", "keys"} & set(words[-2:]))


def is_secret_name(name: str) -> bool:
    """True for options (`--api-key`) and keys of documents that usually hold a credential.

    Stricter than `is_secret_env`: here `key` or `pass` alone does not mean a secret.
    """
    return _is_secret(_words(name))


def _words(name: str) -> list[str]:
    """The words of `TOKENIZER_API_KEY_2` or `tokenizerApiKey`; [] if it describes a secret."""
    words = [word.lower() for word in _WORD.findall(name)]
    return [] if words and _DESCRIPTION.fullmatch(words[-1]) else words


def _is_secret(words: list[str]) -> bool:
    following = [*words[1:], ""]
    for word, after in zip(words, following, strict=False):
        if _SECRET.fullmatch(word) and not _AMOUNT.fullmatch(after):
            return True
    if _KEY.fullmatch(" ".join(words)):
        return True
    if words == ["pat"]:
        return True
    # PWD alone is the working directory.
    return len(words) > 1 and bool(_SECRET_AT_THE_END.fullmatch(words[-1]))


# Secret values.

_LITERALS = frozenset({"true", "false", "null", "none"})


class _Known:
    """The secret values that this process knows, and a pattern that matches each of them."""

    def __init__(self, values: frozenset[str] = frozenset()) -> None:
        self.values = values
        spellings = sorted({s for v in values for s in _spellings(v)}, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, spellings)) or r"(?!)"
        self.text = re.compile(alternatives)
        raw = [text.encode("utf-8", "surrogateescape") for text in spellings]
        self.longest = max(map(len, raw), default=0)
        self.raw = re.compile(b"|".join(map(re.escape, raw)) or rb"(?!)")


_known = _Known()


def learn(values: Iterable[str], *, guessed: bool = False) -> None:
    """Makes this process hide these values, and each line of them, in all that it writes.

    guessed: only a name or a place says that they are secrets, so numbers, existing paths,
    addresses and short words are not taken.
    """
    global _known
    whole = {value.strip() for value in values}
    lines = {line.strip() for value in whole for line in value.splitlines() if line != value}
    usable = {value for value in whole if _is_usable(value, guessed=guessed)}
    usable |= {line for line in lines if _is_usable(line, guessed=True)}
    if not usable <= _known.values:
        _known = _Known(_known.values | usable)


def learn_environment(environment: Mapping[str, str], declared: Iterable[str] = ()) -> None:
    """Learns the secrets among these variables. declared: names that the user declares."""
    learn(environment[name] for name in declared if environment.get(name))
    learn((v for k, v in environment.items() if is_secret_env(k)), guessed=True)
    learn((s for v in environment.values() for s in _secrets_in(v)), guessed=True)


def learn_command(command: Iterable[str]) -> None:
    """Learns the values of secret options, and the secrets in secret places of its words."""
    words = list(_with_secret_parts(command))
    learn((word[start:] for word, start in words if start is not None), guessed=True)
    learn((s for word, _ in words for s in _secrets_in(word)), guessed=True)


def is_secret_variable(name: str, value: str) -> bool:
    """True for a variable that is named like a credential or holds a known secret."""
    return is_secret_env(name) or redact_text(value) != value


def known_values() -> frozenset[str]:
    """All learnt values."""
    return _known.values


def longest_spelling() -> int:
    """Length in bytes of the longest string that is hidden; 0 if nothing was learnt."""
    return _known.longest


def _is_usable(value: str, *, guessed: bool) -> bool:
    if guessed:
        return len(value) >= MIN_GUESSED and not _is_ordinary(value)
    return len(value) >= MIN_DECLARED and value.lower() not in _LITERALS


def _is_ordinary(value: str) -> bool:
    """True for a number, a word, an address or a path, which also occur in harmless text."""
    if value.replace(".", "").isdigit() or re.match(r"[a-z][a-z0-9+.-]{0,30}://", value, re.I):
        return True
    if value.islower() and value.isalpha() and len(value) < 16:
        return True
    try:
        return value[0] in "/~." and Path(value).exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


def _spellings(value: str) -> set[str]:
    """The value as it is, quoted as in a URL, and escaped as in Python, shells and JSON."""
    escaped = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    escaped |= {repr(value)[1:-1], value.replace("\\", "\\\\").replace("'", "\\'")}
    escaped |= {value.replace("'", end) for end in ("'\"'\"'", "'\\''")}
    escaped |= {json.dumps(text)[1:-1] for text in escaped}
    raw = value.encode("utf-8", "surrogateescape")
    quoted = {quote(raw), quote(raw, safe=""), quote_plus(raw), quote(raw, safe="!*'();:@&=+$,/?")}
    quoted |= {re.sub("%..", lambda match: match[0].lower(), text) for text in quoted}
    return escaped | quoted


# Secret places.

# Every pattern is bounded or begins with a rare character, since logs have lines of megabytes.
_USERINFO = re.compile(r"(://[^\s/?#:@'\"]{0,256}:)([^\s/?#'\"]{1,1024})@")
_BARE_USERINFO = re.compile(r"(://)([^\s/?#:@'\"]{16,1024})@")
# For a URL that is a whole word, whose password may hold characters that should be quoted. Digits
# before a slash are a port.
_WHOLE_USERINFO = re.compile(r"([^/?#:@]*)(?::(?!\d*[/?#])(.+))?@", re.S)
_PARAMETER = re.compile(r"([?&])([\w.-]{1,64})=([^&#\s'\"]+)")
_ASSIGNED = re.compile(
    r"(?<![\w-])([\w-]{1,64})(['\"]?\s{0,4}[:=]\s{0,4})(['\"])((?:\\.|(?!\3)[^\\]){1,4096})\3"
)
_AUTHORIZATION = re.compile(
    r"(\bauthorization['\"]?\s{0,4}[:=]\s{0,4}['\"]?(?:bearer|basic)\s{1,4})([^\s'\",]+)", re.I
)


def _hide_places(text: str) -> str:
    if "://" in text:
        text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
        text = _BARE_USERINFO.sub(rf"\1{HIDDEN}@", text)
    if "?" in text:
        text = _PARAMETER.sub(_hidden_parameter, text)
    if "'" in text or '"' in text:
        text = _ASSIGNED.sub(_hidden_assignment, text)
    return _AUTHORIZATION.sub(rf"\1{HIDDEN}", text)


def _hidden_parameter(match: re.Match[str]) -> str:
    return f"{match[1]}{match[2]}={HIDDEN}" if is_secret_name(match[2]) else match[0]


def _hidden_assignment(match: re.Match[str]) -> str:
    if not is_secret_name(match[1]):
        return match[0]
    return f"{match[1]}{match[2]}{match[3]}{HIDDEN}{match[3]}"


def _secrets_in(text: str) -> set[str]:
    """The secrets in the secret places of a string; passwords of URLs also unquoted."""
    secrets = {match[3] for match in _PARAMETER.finditer(text) if is_secret_name(match[2])}
    secrets |= {match[2] for match in _AUTHORIZATION.finditer(text)}
    for match in _ASSIGNED.finditer(text):
        if is_secret_name(match[1]):
            secrets |= {match[4], _unescaped(match[4])}
    for word in {text, *text.split()}:
        secret = _url_secret(word)
        secrets |= {secret, unquote(secret)}
    return secrets


def _url_secret(url: str) -> str:
    """The password of a URL as written, or its user if that is long enough to be a token."""
    _, scheme_end, rest = url.partition("://")
    match = _WHOLE_USERINFO.match(rest) if scheme_end else None
    if match is None:
        return ""
    user, password = match.groups()
    return password or (user if len(user) >= 16 else "")


def _unescaped(text: str) -> str:
    """The value of the inside of a JSON string; `text` if it is not valid there."""
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text


# Hiding all of them.


def redact_text(text: str) -> str:
    """`text` with known secrets and the contents of secret places hidden."""
    return _hide_places(_known.text.sub(HIDDEN, text))


def redact_bytes(data: bytes) -> bytes:
    """`data` with known secrets hidden."""
    return _known.raw.sub(HIDDEN.encode(), data)


def redact(value: Any) -> Any:
    """A copy of a dict, list or scalar with the values of secret keys and known secrets hidden."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {key: _redact_item(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if all(type(item) is int for item in value):  # for speed: windows have long lists
            return list(value)
        return [redact(item) for item in value]
    return value


def _redact_item(key: str, item: Any) -> Any:
    if item and isinstance(item, str) and is_secret_name(key):
        return HIDDEN
    return redact(item)


def redact_command(command: Iterable[str]) -> list[str]:
    """A command line with the values of secret options hidden (`--api-key X`, `--api-key=X`)."""
    return [
        redact_text(word) if start is None else f"{word[:start]}{HIDDEN}"
        for word, start in _with_secret_parts(command)
    ]


def _with_secret_parts(command: Iterable[str]) -> Iterator[tuple[str, int | None]]:
    """Each word and the index at which the value of a secret option begins in it, else None."""
    is_value = False
    for word in command:
        name, equals, _ = word.partition("=")
        is_option = not is_value and name.startswith("--") and is_secret_name(name)
        if is_value:
            yield word, 0
        else:
            yield word, len(name) + 1 if is_option and equals else None
        is_value = is_option and not equals
