"""Who runs the tasks of `tasks.py`: the workers of a Dask cluster, or a command for each task.

`dask://HOST:PORT` is a scheduler of dask.distributed. `command:TEMPLATE` runs a command with the
Python call in it (`command:srun -N1 -n1 {command}`): the call goes in by stdin, as a pickle, and
its result comes back by stdout, from wherever the template starts it.
"""

from __future__ import annotations

import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from pytest_sglprof._errors import SettingsError, described

DASK, COMMAND = "dask:", "command:"
EXPECTED = "dask://HOST:PORT, a scheduler of dask.distributed, or command:TEMPLATE, as in "
EXPECTED += "command:srun -N1 -n1 {command}"
AT_ONCE = 32  # commands; srun and kubectl queue them as well
CONNECT_S = 30.0  # for a scheduler to answer, and again until it has a worker
CALL = "{command}"
_RESULT = b"\0pytest-sglprof result\0"  # before it on stdout, where others may have written


@contextmanager
def opened(address: str) -> Iterator[Executor]:
    """The executor of that address, until the body ends; then no task of it goes on.

    Raises `SettingsError` for any other address, and where nothing answers there.
    """
    with ExitStack() as until:
        if address.startswith(DASK):
            yield until.enter_context(_dask(address))
        elif address.startswith(COMMAND):
            yield until.enter_context(Commands(address[len(COMMAND) :]))
        else:
            raise SettingsError(
                f"--executor {address}: not an executor", expected=EXPECTED, hint="correct it"
            )


@contextmanager
def _dask(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError as error:
        raise SettingsError(
            f"--executor {address} needs dask.distributed, which is not installed here",
            expected="the package distributed, of the same version as on the cluster",
            hint="pip install 'pytest-sglprof[cluster]'",
        ) from error
    place = address[len(DASK) :]  # also tls://…, as distributed itself is configured for it
    place = f"tcp:{place}" if place.startswith("//") else place
    try:
        client = Client(place, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:  # also its TimeoutError
        raise SettingsError(
            f"--executor {address}: no scheduler answers there",
            expected="a scheduler of dask.distributed, of the same version as here",
            hint="dask scheduler, then dask worker ADDRESS on each node, print their addresses",
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_S)
        except TimeoutError as error:
            raise SettingsError(
                f"--executor {address}: the scheduler has no worker",
                expected="at least one worker that sees the traces",
                hint="start some: dask worker ADDRESS",
            ) from error
        with client.get_executor() as executor:
            try:
                yield executor
            finally:
                executor.shutdown(wait=False)  # what is still running, nobody waits for


class Commands(ThreadPoolExecutor):
    """Runs each call by a command. template: its words; `{command}` stands for the call."""

    def __init__(self, template: str) -> None:
        words = shlex.split(template)
        if CALL not in words:
            raise SettingsError(
                f"--executor {COMMAND}{template} does not say where the call stands",
                expected=f"{CALL} as a word of it",
                hint=f"--executor '{COMMAND}srun -N1 -n1 {CALL}'",
            )
        super().__init__(AT_ONCE)
        call = [sys.executable, "-m", __name__]
        self._words = [part for word in words for part in (call if word == CALL else [word])]
        self._processes: set[subprocess.Popen[bytes]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Runs `fn(*args, **kwargs)` by the command; all of them must be picklable."""
        return super().submit(self._run, pickle.dumps((fn, args, kwargs)))

    def _run(self, call: bytes) -> Any:
        pipe = subprocess.PIPE
        with subprocess.Popen(self._words, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            self._processes.add(process)
            try:
                out, log = process.communicate(call)
            finally:
                self._processes.discard(process)
        _, mark, result = out.partition(_RESULT)
        if not mark:
            last = " ".join(log.decode(errors="replace").splitlines()[-3:])
            raise OSError(f"{shlex.join(self._words)}: status {process.returncode}: {last}")
        is_done, value = pickle.loads(result)
        if is_done:
            return value
        raise value

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=False, cancel_futures=True)
        for process in [*self._processes]:
            with suppress(OSError):
                process.terminate()
        self.shutdown()


def main() -> None:
    """Makes the call that stdin has, and writes what it returns or raises to stdout."""
    fn, args, kwargs = pickle.load(sys.stdin.buffer)
    try:
        answer = True, fn(*args, **kwargs)
    except Exception as error:
        try:
            answer = False, pickle.loads(pickle.dumps(error))
        except Exception:
            answer = False, RuntimeError(described(error))
    sys.stdout.buffer.write(_RESULT + pickle.dumps(answer))


if __name__ == "__main__":
    main()
