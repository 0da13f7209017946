"""Reads secrets from a file, then becomes a server or a load driver.

    python exec_step.py FILE module MODULE [ARG ...]     like `python -m MODULE ARG ...`
    python exec_step.py FILE serve [ARG ...]             like `sglang serve ARG ...`

Everyone who lists processes sees the arguments and the environment that a command was
started with, and nsys writes both into every report. So API keys and tokens come through
FILE (for a server a fifo) as one JSON object, and the command runs in this process. Each
key of the object may be missing:

    environ   variables to set for the command and its children
    private   variables that must not be in the *environment block* of any child, since
              nsys records the block of each process that it follows. Python code still
              sees them in os.environ, here and in children of multiprocessing.
    args      arguments to add to the command (--api-key KEY)
    before    Python source to run before the command
    log       file or fifo for the output ("": stdout and stderr stay as they are), since
              nsys would store what goes through its pipes
    pid_file  file to write this process's pid to

The server's interpreter runs this file and need not have pytest-sglprof, so it uses the
standard library only and works from Python 3.8 on.
"""

import importlib
import json
import os
import runpy
import signal
import sys

READ_LIMIT = 120  # s

# Also runs in each child that multiprocessing spawns, when it unpickles its parent's data.
_IN_CHILD = """
import os
import multiprocessing.spawn as spawn
for name, value in private.items():
    os.environ._data[os.environ.encodekey(name)] = os.environ.encodevalue(value)
class Carrier:
    def __reduce__(self):
        return exec, (source, {"source": source, "private": private})
original = spawn.get_preparation_data
def with_private(name):
    data = original(name)
    data["sglprof_private"] = Carrier()
    return data
spawn.get_preparation_data = with_private
import subprocess
start = subprocess.Popen.__init__
def without_private(self, *args, **keywords):
    if keywords.get("env") is not None:  # such as os.environ.copy()
        seen = keywords["env"].items()
        keywords["env"] = {name: value for name, value in seen if private.get(name) != value}
    start(self, *args, **keywords)
subprocess.Popen.__init__ = without_private
"""


def main() -> None:
    """Reads the secrets, prepares this process, and runs the command in it."""
    fifo, mode, words = sys.argv[1], sys.argv[2], sys.argv[3:]
    signal.alarm(READ_LIMIT)  # the writer may have been killed
    with open(fifo, encoding="utf-8") as stream:  # noqa: PTH123
        handover = json.load(stream)
    signal.alarm(0)
    if handover.get("log"):
        _write_to(handover["log"])
    os.environ.update(handover.get("environ", {}))
    if handover.get("private"):
        exec(_IN_CHILD, {"source": _IN_CHILD, "private": handover["private"]})
    if handover.get("pid_file"):
        _write_pid(handover["pid_file"])
    # `python FILE` puts the folder of FILE first; its modules must not hide others.
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # noqa: PTH100, PTH120
        del sys.path[0]
    if handover.get("before"):
        exec(handover["before"], {"__name__": "sglprof_before"})
    if mode == "module":
        sys.argv = [words[0], *words[1:], *handover.get("args", ())]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        serve = importlib.import_module("sglang.cli.main").main

        sys.argv = ["sglang", "serve", *words, *handover.get("args", ())]
        sys.exit(serve())


def _write_to(path: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _write_pid(path: str) -> None:
    with open(path + ".new", "w", encoding="utf-8") as stream:  # noqa: PTH123
        stream.write(str(os.getpid()))
    os.replace(path + ".new", path)


if __name__ == "__main__":
    main()
