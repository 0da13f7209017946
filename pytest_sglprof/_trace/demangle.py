"""Demangle C++ names (Itanium ABI) far enough to tell kernels apart.

The result is the qualified name with its nested template arguments. A back reference to an
earlier type (`S1_`) stays as it is, and the function's parameters are left out, since keys
do not contain them.
"""

from __future__ import annotations

import re

_STARTS_NAME = re.compile(r"_Z[NLZS\d]")
_NUMBER = re.compile(r"\d+")
_SEQUENCE = re.compile(r"S[0-9A-Z]*_|T[0-9]*_|TL\d*_[0-9]*_")
_LITERAL = re.compile(r"n?[0-9a-f]*")
_FLOAT = re.compile(r"DF\d+[b_x]?|D[acdehinsuf]")
_STANDARD = {
    "Sa": "std::allocator",
    "Sb": "std::basic_string",
    "Ss": "std::string",
    "Si": "std::istream",
    "So": "std::ostream",
    "Sd": "std::iostream",
}
_BUILTIN = {
    "v": "void", "w": "wchar_t", "b": "bool", "c": "char", "a": "signed char",
    "h": "unsigned char", "s": "short", "t": "unsigned short", "i": "int", "j": "unsigned int",
    "l": "long", "m": "unsigned long", "x": "long long", "y": "unsigned long long",
    "n": "__int128", "o": "unsigned __int128", "f": "float", "d": "double",
    "e": "long double", "g": "__float128", "z": "...",
}  # fmt: skip
_ANONYMOUS = "_GLOBAL__N_"


class _Unreadable(Exception):
    """A production that this reader does not know."""


def demangled(name: str) -> str:
    """`_ZN5aiter10add_kernelILi4EEEvPi` becomes `aiter::add_kernel<4>`.

    Arguments that cannot be parsed are reduced to the identifiers in them. A name that cannot
    be parsed at all is returned unchanged.
    """
    reader = _Reader(name, len("_Z"))
    if not _STARTS_NAME.match(name):
        return name
    try:
        return reader.name() or name
    except (_Unreadable, RecursionError, IndexError):
        return _roughly(name)


class _Reader:
    """Reads from a position on; each method takes one production of the grammar."""

    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at

    def _peek(self, count: int = 1) -> str:
        return self.text[self.at : self.at + count]

    def _take(self, prefix: str) -> bool:
        if not self.text.startswith(prefix, self.at):
            return False
        self.at += len(prefix)
        return True

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise _Unreadable
        self.at = match.end()
        return match[0]

    def name(self) -> str:
        if self._take("N"):
            return self._nested()
        if self._take("Z"):
            return self._local()
        base = self._substitution() if self._peek() == "S" else self._component()
        return base + self._arguments() if self._peek() == "I" else base

    def _nested(self) -> str:
        while self._peek() in tuple("rVKRO"):
            self.at += 1
        parts: list[str] = []
        while not self._take("E"):
            if self._peek() == "I":
                if not parts:
                    raise _Unreadable
                parts[-1] += self._arguments()
            elif self._peek() == "S" and self._peek(2) != "St":
                parts.append(self._substitution())
            elif self._take("St"):
                parts.append("std")
            elif self._peek() == "T":
                parts.append(self._match(_SEQUENCE))
            elif part := self._component():
                parts.append(part)
        return "::".join(parts)

    def _local(self) -> str:
        """What is defined inside of a function: `outer()::inner`."""
        outer = self.name()
        while not self._take("E"):
            self._type()
        inner = "string literal" if self._take("s") else self.name()
        if self._take("_"):
            self._match(_NUMBER)
        return f"{outer}()::{inner}"

    def _component(self) -> str:
        """One unqualified name; empty for an anonymous namespace."""
        self._take("L")
        if self._peek().isdigit():
            return self._source_name()
        if self._take("Ul"):
            while not self._take("E"):
                self._type()
            return self._numbered("{lambda}")
        if self._take("Ut"):
            return self._numbered("{unnamed}")
        code = self._peek(2)
        if code[:1] in ("C", "D") and code[1:].isdigit():
            self.at += 2
            return "{constructor}"
        if code.isalpha() and code.islower():
            self.at += 2
            return "operator"
        raise _Unreadable

    def _numbered(self, text: str) -> str:
        if self._peek().isdigit():
            self._match(_NUMBER)
        if not self._take("_"):
            raise _Unreadable
        return text

    def _source_name(self) -> str:
        length = int(self._match(_NUMBER)[:6])
        word = self._peek(length)
        if len(word) != length:
            raise _Unreadable
        self.at += length
        while self._take("B"):
            self._source_name()
        return "" if word.startswith(_ANONYMOUS) else word

    def _substitution(self) -> str:
        if self._take("St"):
            return f"std::{self._component()}"
        standard = _STANDARD.get(self._peek(2))
        if standard is not None:
            self.at += 2
            return standard
        return self._match(_SEQUENCE)

    def _arguments(self) -> str:
        """`I…E` as `<…>`."""
        self._take("I")
        arguments: list[str] = []
        while not self._take("E"):
            if argument := self._argument():
                arguments.append(argument)
        return f"<{', '.join(arguments)}>"

    def _argument(self) -> str:
        if self._take("Tn"):  # the type of the argument that follows
            self._type()
            return ""
        if self._take("J"):
            pack: list[str] = []
            while not self._take("E"):
                pack.append(self._argument())
            return ", ".join(pack)
        if self._take("X"):
            inner = self._expression()
            if not self._take("E"):
                raise _Unreadable
            return inner
        return self._literal() if self._peek() == "L" else self._type()

    def _expression(self) -> str:
        if self._peek() == "L":
            return self._literal()
        if self._peek() == "T":
            return self._match(_SEQUENCE)
        if self._take("ad"):
            return f"&{self._expression()}"
        raise _Unreadable

    def _literal(self) -> str:
        """`Li128E`, `Lb1E`, `LN3foo4ModeE0E`, `L_Z4siluIfE…E`."""
        self._take("L")
        if self._take("_Z"):
            name = self.name()
            while not self._take("E"):
                self._type()
            return name
        kind = self._type()
        value = self._match(_LITERAL).replace("n", "-")
        if not self._take("E"):
            raise _Unreadable
        if kind == "bool":
            return "true" if value == "1" else "false"
        return value if kind in _BUILTIN.values() else f"({kind}){value}"

    def _type(self) -> str:
        head = self._peek()
        if head in tuple("PROKVrCG"):
            self.at += 1
            return self._type() + {"P": "*", "R": "&", "O": "&&"}.get(head, "")
        if head in _BUILTIN:
            self.at += 1
            return _BUILTIN[head]
        if head == "D":
            return self._extended_type()
        if self._take("F"):
            self._take("Y")
            while not self._take("E"):
                self._type()
            return "function"
        if self._take("A"):
            if self._peek().isdigit():
                self._match(_NUMBER)
            if not self._take("_"):
                raise _Unreadable
            return f"{self._type()}[]"
        if self._take("M"):
            return f"{self._type()}::{self._type()}"
        if head == "T" and self._peek(2) not in ("Ts", "Tu", "Te"):
            parameter = self._match(_SEQUENCE)
            return parameter + self._arguments() if self._peek() == "I" else parameter
        if head == "u" or head == "T":
            self.at += 1 if head == "u" else 2
        return self.name()

    def _extended_type(self) -> str:
        if self._take("Dp"):
            return self._type()
        if self._take("Dv"):
            self._match(_NUMBER)
            if not self._take("_"):
                raise _Unreadable
            return f"{self._type()} vector"
        return self._match(_FLOAT)


def _roughly(name: str) -> str:
    """The qualified name up to its first template, and the identifiers after it."""
    at = 3 if name.startswith("_ZN") else 2
    parts: list[str] = []
    while match := _NUMBER.match(name, at):
        end = match.end() + int(match[0][:6])
        if end > len(name):
            break
        parts.append(name[match.end() : end])
        at = end
    parts = [part for part in parts if not part.startswith(_ANONYMOUS)]
    if not parts:
        return name
    bare = "::".join(parts)
    return f"{bare}<{', '.join(_identifiers(name[at:]))}>" if name[at : at + 1] == "I" else bare


def _identifiers(text: str) -> list[str]:
    identifiers: list[str] = []
    at = 0
    while match := _NUMBER.search(text, at):
        length = int(match[0][:6])
        word = text[match.end() : match.end() + length]
        is_name = 2 < length == len(word) and (word[0].isalpha() or word[0] == "_")
        if is_name:
            identifiers.append(word)
        at = match.end() + (length if is_name else 0)
    return identifiers
