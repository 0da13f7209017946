"""Runs modules of a wheel without what they need: everything heavy is a stub.

A wheel is a folder that holds a package. `Wheel.load` executes one file of it. Its imports of the
standard library are real, and of the modules that `real` names; everything else becomes a
`Stub`, which can be called, indexed, compared, inherited from, and used as a decorator. What the
caller then runs is the wheel's code; where a stub reached its answer, `plain` refuses it.
"""

from __future__ import annotations

import builtins
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

INSTALLED = ("msgspec", "numpy", "typing_extensions")
MARK = "<stub "


class _StubBase:
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()


class Stub:
    """Whatever is not there. Attributes stay the same object, so that enums can be compared."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    __all__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        made = Stub(f"{self._name}.{name}")
        self.__dict__[name] = made
        return made

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What a decorator decorates, else one more stub."""
        if (
            len(args) == 1
            and not options
            and (inspect.isroutine(args[0]) or inspect.isclass(args[0]))
        ):
            return args[0]  # a decorator
        return Stub(f"{self._name}()")

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (type("StubBase", (_StubBase,), {}),)

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __or__
    __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __and__ = __or__

    def __lt__(self, other: Any) -> bool:
        return False

    __le__ = __gt__ = __ge__ = __contains__ = __instancecheck__ = __subclasscheck__ = __lt__

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __int__(self) -> int:
        return 0

    __index__ = __len__ = __int__

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        return

    def __repr__(self) -> str:
        return f"{MARK}{self._name}>"


class Wheel:
    """An unpacked wheel.

    stubs: modules that the caller gives. real: modules of the wheel that its imports execute.
    ends: what of a module is not executed, from the given text on.
    """

    def __init__(
        self,
        root: Path,
        stubs: Mapping[str, Any],
        real: tuple[str, ...] = (),
        ends: Mapping[str, str] | None = None,
    ) -> None:
        self.root = root
        self.stubs = dict(stubs)
        self.real = real
        self.ends = dict(ends or {})
        self.loaded: dict[str, types.ModuleType] = {}

    def path(self, name: str) -> Path:
        """The file of a module; FileNotFoundError where the wheel has none of that name."""
        base = self.root / name.replace(".", "/")
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        raise FileNotFoundError(f"{self.root.name} has no module {name}")

    def has(self, name: str) -> bool:
        """Whether the wheel has a module."""
        try:
            return self.path(name).is_file()
        except FileNotFoundError:
            return False

    def first(self, *names: str) -> str:
        """The first of these modules that the wheel has."""
        return next(name for name in names if self.has(name))

    def text(self, name: str) -> str:
        """The source of a module."""
        return self.path(name).read_text(encoding="utf-8")

    def load(self, name: str) -> types.ModuleType:
        """The executed module."""
        if name in self.loaded:
            return self.loaded[name]
        path = self.path(name)
        module = types.ModuleType(name)
        module.__file__ = str(path)
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
        self.loaded[name] = sys.modules[name] = module  # dataclasses look names up there
        text = self.text(name).partition(self.ends.get(name, "\0"))[0]
        exec(compile(text, str(path), "exec"), vars(module))
        return module

    def _import(
        self,
        name: str,
        of: Mapping[str, Any] | None = None,
        local: Any = None,
        wanted: Any = (),
        level: int = 0,
    ) -> Any:
        top = name.partition(".")[0]
        if level == 0 and name in self.stubs:
            return self.stubs[name]
        if level == 0 and top in self.stubs and not wanted:
            return self.stubs[top]
        if level == 0 and (top in sys.stdlib_module_names or top in INSTALLED):
            return builtins.__import__(name, of, local, wanted, level)
        if level == 0 and wanted and name.startswith(self.real) and self.has(name):
            module = self.load(name)
            for each in wanted:  # as the import statement does for modules of a package
                if not hasattr(module, each) and self.has(f"{name}.{each}"):
                    setattr(module, each, self.load(f"{name}.{each}"))
            return module
        made = self.stubs[name] = Stub(name if wanted else top)
        return made


def plain(value: Any, where: str = "answer") -> Any:
    """The value as JSON has it; ValueError where a stub reached it."""
    if isinstance(value, Mapping):
        return {str(key): plain(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each, f"{where}[]") for each in value]
    if isinstance(value, Stub) or (isinstance(value, str) and MARK in value):
        raise ValueError(f"{where} is a stub: {value!r}; give the module that makes it as real")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where} is not plain: {type(value).__name__}")
