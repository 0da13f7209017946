"""Files of a node that does not share the folder of the run: brought into the same folder here.

A command beside the node's keeper walks the folder there and writes what is new to its stdout, and
this end writes it into the folder of the same name. So a log grows here, and a trace appears, as
on a shared disk, a moment later. Files that this process has not got from the node are never
written to: a folder that is shared after all stays as it is. A file that has gone here, such as a
trace that was moved into the results, is removed on the node; at the end all are.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated

import msgspec

from pytest_sglprof._errors import ServerError
from pytest_sglprof._files import RUN_FILE

CHUNK = 1 << 20  # bytes of a file that are sent at once
LOOK_EVERY = 0.25  # s between two looks at the folder of a node
SWEEP_EVERY = 1.0  # s between two looks for files that have gone here
CATCH_UP = 10.0  # s for what a node has written to be here
ON_REQUEST = (".nsys-rep", ".qdstrm", ".sqlite")  # are not only appended to while they are written
SHARED_LOG = "keeper.log"  # also holds, here, what the launcher says


class Piece(msgspec.Struct, frozen=True, tag_field="piece", tag="file"):
    """The next `size` bytes of the stream are those of a file from `at` on, then comes a newline.

    last: they are the last ones of a file that was asked for.
    """

    name: str
    at: Annotated[int, msgspec.Meta(ge=0)]
    size: Annotated[int, msgspec.Meta(ge=0, le=CHUNK)]
    last: bool = False


class Gone(msgspec.Struct, frozen=True, tag_field="piece", tag="gone"):
    """A file that was sent is not there any more, or one that was asked for never was."""

    name: str


class Level(msgspec.Struct, frozen=True, tag_field="piece", tag="level"):
    """All that was written before `Sync` was read has been sent. left: files, at the end."""

    left: tuple[str, ...] = ()


class Root(msgspec.Struct, frozen=True, tag_field="order", tag="root"):
    """The first order: which folder."""

    folder: str


class Send(msgspec.Struct, frozen=True, tag_field="order", tag="send"):
    """A file that is complete, and is sent as a whole."""

    name: str


class Drop(msgspec.Struct, frozen=True, tag_field="order", tag="drop"):
    """Files to remove. is_last: the end, at which folders go that are empty."""

    names: tuple[str, ...]
    is_last: bool = False


class Sync(msgspec.Struct, frozen=True, tag_field="order", tag="sync"):
    """Asks for `Level`."""


Message = Piece | Gone | Level
Order = Root | Send | Drop | Sync


# On the node.


class Sender:
    """Writes what is new below a folder to a stream, until its orders end."""

    def __init__(self, orders: IO[bytes], out: IO[bytes]) -> None:
        self._orders = orders
        self._out = out
        self._inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._root = Path()
        self._sent: dict[str, tuple[int, int]] = {}  # inode, and bytes that were sent

    def run(self) -> int:
        """Returns at the end of the orders."""
        threading.Thread(target=self._read, daemon=True).start()
        first = self._inbox.get()
        if not isinstance(first, Root):
            return 2
        self._root = Path(first.folder)
        while True:
            with contextlib.suppress(queue.Empty):
                order = self._inbox.get(timeout=0 if self._send_new() else LOOK_EVERY)
                if order is None:
                    return 0
                self._take(order)

    def _read(self) -> None:
        for line in self._orders:
            self._inbox.put(msgspec.json.decode(line, type=Order))
        self._inbox.put(None)

    def _take(self, order: Order) -> None:
        if isinstance(order, Send):
            self._send_whole(order.name)
        elif isinstance(order, Drop):
            for name in order.names:
                self._sent.pop(name, None)
                with contextlib.suppress(OSError):
                    (self._root / name).unlink()
            if order.is_last:
                self._say(Level(tuple(self._remove_empty())))
        else:
            while self._send_new():
                pass
            self._say(Level())

    def _send_new(self) -> bool:
        """Sends the next piece of each file that has one; whether any has more than that."""
        there = dict(self._files())
        has_more = False
        for name, status in there.items():
            inode, sent = self._sent.get(name, (status.st_ino, 0))
            if inode != status.st_ino or status.st_size < sent:
                sent = 0  # another file of that name
            if (size := status.st_size - sent) or name not in self._sent:
                taken = self._send(name, sent, min(size, CHUNK))
                self._sent[name] = status.st_ino, sent + taken
                has_more |= 0 < taken < size
        for name in self._sent.keys() - there.keys():
            del self._sent[name]
            self._say(Gone(name))
        return has_more

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = Path(folder, name)
                if name != RUN_FILE and path.suffix not in ON_REQUEST:
                    with contextlib.suppress(OSError, UnicodeError):
                        if path.is_file() and not path.is_symlink():
                            relative = str(path.relative_to(self._root))
                            relative.encode()  # JSON has no other names
                            yield relative, path.stat()

    def _send(self, name: str, at: int, size: int, *, last: bool = False) -> int:
        content = b""
        with contextlib.suppress(OSError), (self._root / name).open("rb") as stream:
            stream.seek(at)
            content = stream.read(size)
        self._say(Piece(name, at, len(content), last), content)
        return len(content)

    def _send_whole(self, name: str) -> None:
        path, at = self._root / name, 0
        if not path.is_file():
            self._say(Gone(name))
            return
        size = path.stat().st_size
        while at < size:
            taken = self._send(name, at, CHUNK, last=at + CHUNK >= size)
            if not taken:
                self._say(Gone(name))
                return
            at += taken

    def _say(self, message: Message, content: bytes = b"") -> None:
        # The last newline: `srun` keeps back what is not a whole line.
        self._out.write(b"\n".join((msgspec.json.encode(message), content, b"")))
        self._out.flush()

    def _remove_empty(self) -> Iterator[str]:
        """Removes empty folders, the lowest first; gives the files that are left."""
        for folder, _, names in os.walk(self._root, topdown=False):
            left = (str(Path(folder, name)) for name in names if name != RUN_FILE)
            yield from (path.encode(errors="replace").decode() for path in left)
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


# Here.


class Gathering:
    """The files of one node, brought into `root` here as long as its server lives.

    process: the command on the node, with pipes. node: its name. fault: why none come any more, ""
    as long as they do.
    """

    def __init__(self, process: subprocess.Popen[bytes], root: Path, node: str) -> None:
        self.node = node
        self.fault = ""
        self._root = root
        self._process = process
        self._accepted: set[str] = set()
        self._refused: set[str] = set()
        self._level = threading.Event()
        self._left: tuple[str, ...] = ()
        self._whole: dict[str, threading.Event] = {}
        self._missing: set[str] = set()
        self._swept = time.monotonic()
        self._order(Root(str(root)))
        self._reader = threading.Thread(target=self._read, name=f"files of {node}", daemon=True)
        self._reader.start()

    def catch_up(self) -> None:
        """Returns when all is here that the node has written until now, or after `CATCH_UP` s."""
        self._level.clear()
        self._order(Sync())
        self._wait(self._level, CATCH_UP)

    def bring(self, path: Path, timeout: float) -> Path:
        """Brings one complete file; raises `ServerError` if it does not come."""
        name = str(path.relative_to(self._root))
        arrived = self._whole[name] = threading.Event()
        self._missing.discard(name)
        self._order(Send(name))
        if not self._wait(arrived, timeout) or name in self._missing:
            raise ServerError(
                f"{path} did not come from node {self.node}"
                + (f": {self.fault}" if self.fault else ""),
                expected=f"the whole file within {timeout:.0f} s",
                hint="look whether it is on the node, and at the connection to it",
            )
        return path

    def close(self) -> tuple[str, ...]:
        """Brings the rest, removes on the node what is here, and returns what is left there."""
        self.catch_up()
        self._level.clear()
        self._order(Drop(tuple(self._accepted), is_last=True))
        self._wait(self._level, CATCH_UP)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(CATCH_UP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        return tuple(f"{name} on node {self.node}" for name in self._left)

    def _wait(self, event: threading.Event, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not event.wait(0.1):
            if not self._reader.is_alive() or time.monotonic() > deadline:
                return event.is_set()
        return True

    def _order(self, order: Order) -> None:
        stream = self._process.stdin
        if stream is not None and not stream.closed:
            with contextlib.suppress(OSError):
                stream.write(msgspec.json.encode(order) + b"\n")
                stream.flush()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                try:
                    message = msgspec.json.decode(line, type=Message)
                except msgspec.DecodeError:  # a launcher may greet
                    continue
                self._take(message, stream)
                self._sweep()
        status = self._process.wait()
        if status:
            self.fault = f"the command that brings its files ended with status {status}"

    def _take(self, message: Message, stream: IO[bytes]) -> None:
        if isinstance(message, Level):
            self._left = message.left
            self._level.set()
        elif isinstance(message, Gone):
            self._forget(message.name)
        else:
            content = stream.read(message.size + 1)[:-1]
            if self._is_ours(message):
                self._write(message, content)
            if message.last and message.name in self._whole:
                self._whole[message.name].set()

    def _forget(self, name: str) -> None:
        if name in self._whole:
            self._missing.add(name)
            self._whole[name].set()
        if name in self._accepted and Path(name).name != SHARED_LOG:
            self._accepted.discard(name)
            (self._root / name).unlink(missing_ok=True)

    def _is_ours(self, piece: Piece) -> bool:
        """Whether the file may be written: it came from the node, or is not here."""
        name = piece.name
        if name in self._accepted or name in self._refused:
            return name in self._accepted
        path = self._root / name
        is_below = ".." not in Path(name).parts and not Path(name).is_absolute()
        is_new = is_below and (path.name == SHARED_LOG or not path.exists())
        (self._accepted if is_new else self._refused).add(name)
        return is_new

    def _write(self, piece: Piece, content: bytes) -> None:
        path = self._root / piece.name
        if piece.at and not path.exists():
            return  # moved into the results: the node hears of it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = "ab" if path.name == SHARED_LOG else "r+b" if piece.at else "wb"
            with path.open(mode) as stream:
                if mode != "ab":
                    stream.seek(piece.at)
                stream.write(content)
        except OSError as error:
            self.fault = f"{path} could not be written: {error.strerror or error}"

    def _sweep(self) -> None:
        if time.monotonic() < self._swept + SWEEP_EVERY:
            return
        self._swept = time.monotonic()
        gone = {name for name in self._accepted if not (self._root / name).exists()}
        if gone:
            self._accepted -= gone
            self._order(Drop(tuple(gone)))


def send_files() -> int:
    """The command on the node."""
    return Sender(sys.stdin.buffer, sys.stdout.buffer).run()
