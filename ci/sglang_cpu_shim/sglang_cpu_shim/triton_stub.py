"""A `triton` that can be imported and decorated with, but not run.

Every missing attribute of its modules is a class of its own, because a class can take all
the parts that an import may ask for: base class, annotation, `isinstance`, decorator.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types


class _AnyMeta(type):
    """Makes a class usable as a decorator, a value and a container (annotation it is anyway)."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = make_placeholder(name)
        setattr(cls, name, value)
        return value

    def __call__(cls, *args, **kwargs):
        # @autotune(...) must hand the function on; anything else is a value nobody uses.
        decorates = len(args) == 1 and not kwargs and callable(args[0])
        return args[0] if decorates else cls

    def __getitem__(cls, _key):
        return cls

    def __iter__(cls):
        return iter(())

    def __bool__(cls):
        return False


def make_placeholder(name):
    """A new class that stands for whatever the real triton has under this name."""
    return _AnyMeta(name, (), {"__module__": "triton"})


class Kernel:
    """A function under `@triton.jit`: keeps its name, refuses to run."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.fn = function

    def __getitem__(self, _grid):
        return self

    def __call__(self, *_args, **_kwargs):
        """Says so, instead of computing nothing."""
        raise RuntimeError(f"the triton kernel {self.__name__} was called on a CPU server")


def jit(function=None, **_options):
    """`@triton.jit` and `@triton.jit(...)`."""
    return Kernel if function is None else Kernel(function)


class NoDriver:
    """`triton.runtime.driver` on a machine without GPU."""

    @property
    def active(self):
        """Fails as the real one does; SGLang then concludes that it is on a CPU."""
        raise RuntimeError("0 active drivers")


# The few names whose real value matters to the code that is imported.
_KNOWN = {
    "triton": {
        "__version__": "3.0.0",  # torch parses it
        "jit": jit,
        "cdiv": lambda a, b: -(-a // b),
        "next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length(),
    },
    "triton.runtime": {"driver": NoDriver()},
    "triton.compiler.compiler": {"triton_key": lambda: "no triton"},
    # These stand in `except` clauses.
    "triton.runtime.autotuner": {
        "OutOfResources": type("OutOfResources", (Exception,), {}),
        "PTXASError": type("PTXASError", (Exception,), {}),
    },
    "triton.runtime.jit": {"JITFunction": Kernel},
}


class StubModule(types.ModuleType):
    """A package of which every sub-module and every attribute exists."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        if any(f"{known}.".startswith(f"{path}.") for known in _KNOWN):
            return importlib.import_module(path)
        value = make_placeholder(name)
        setattr(self, name, value)
        return value


class TritonFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `triton` and everything below it."""

    def find_spec(self, fullname, path=None, target=None):
        """A stub for names of triton, None for all others."""
        if fullname.partition(".")[0] != "triton":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=__file__, is_package=True)

    def create_module(self, spec):
        """An empty stub."""
        return StubModule(spec.name)

    def exec_module(self, module):
        """Fills in the known names, and makes `parent.child` the module itself."""
        vars(module).update(_KNOWN.get(module.__name__, {}))
        parent, _, child = module.__name__.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)
