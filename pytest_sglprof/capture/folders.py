"""Where a torch window is written: one folder, as the server and as this machine name it."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_sglprof.errors import WindowRefused
from pytest_sglprof.files import safe_name
from pytest_sglprof.values import WindowSpec

if TYPE_CHECKING:
    from pytest_sglprof.server.server import Server


@dataclass(frozen=True)
class OutputFolder:
    """server: the path that the server is told. local: the same folder as we reach it.

    ours: made for this window alone, so that it is emptied and removed afterwards.
    """

    server: str
    local: Path
    ours: bool

    def prepare(self, *, shared: bool) -> None:
        """Makes the folder and writes into it: an unwritable one would kill the server.

        shared: a server that may run as another user writes here as well.
        """
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            if shared and self.ours:
                self.local.chmod(0o777)
            with tempfile.TemporaryFile(dir=self.local):
                pass
        except OSError as error:
            raise WindowRefused(
                f"{self.local} cannot be written: {error.strerror or error}",
                expected="a folder that the server can write its traces into",
                hint="choose another output_dir; a server that cannot write there dies",
            ) from error

    def collect(self, files: list[Path], target: Path) -> dict[Path, Path]:
        """Brings `files` into `target`; old path -> new path.

        Files in a folder of ours are moved, in the user's own folder they stay as well.
        """
        target.mkdir(parents=True, exist_ok=True)
        moved = {}
        for path in files:
            new = target / path.name
            if self.ours:
                shutil.move(path, new)
            else:
                _copy(path, new)
            moved[path] = new
        self.remove()
        return moved

    def remove(self) -> None:
        """Removes the folder with all that is in it, if it is ours."""
        if self.ours:
            shutil.rmtree(self.local, ignore_errors=True)


def _copy(path: Path, new: Path) -> None:
    """A second name for the same bytes where the file system can, else a copy."""
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
    except OSError:
        shutil.copy2(path, new)


def output_folder(server: Server, spec: WindowSpec, window_id: str) -> OutputFolder:
    """The folder of a window. Raises `WindowRefused` when its files could not be read here."""
    if not server.attached:
        if spec.output_dir:
            local = Path(spec.output_dir).expanduser().absolute()
            return OutputFolder(str(local), local, ours=False)
        local = server.trace_root.absolute() / _fresh(server.trace_root, window_id)
        return OutputFolder(str(local), local, ours=True)
    if server.server_dir is None:
        raise WindowRefused(
            f"the server at {server.url} was started by somebody else, and nothing tells which "
            "of its folders can be read from here",
            expected="one folder that both machines (or containers) see",
            hint="give --sglprof-server-dir SERVER:LOCAL",
        )
    theirs, ours = PurePosixPath(server.server_dir[0]), Path(server.server_dir[1]).absolute()
    if not spec.output_dir:
        name = _fresh(ours, window_id)
        return OutputFolder(str(theirs / name), ours / name, ours=True)
    wanted = PurePosixPath(spec.output_dir)
    try:
        below = wanted.relative_to(theirs)
    except ValueError:
        raise WindowRefused(
            f"output_dir {spec.output_dir} is a folder of the server's machine that cannot be "
            "read from here",
            expected=f"a folder below {theirs}",
            hint="leave output_dir out, or name another pair with --sglprof-server-dir",
        ) from None
    return OutputFolder(str(wanted), ours / below, ours=False)


def _fresh(root: Path, window_id: str) -> str:
    """A name below `root` that nobody has used: every file in a folder of ours is ours."""
    name = safe_name(window_id)
    number = 1
    while (root / name).exists():
        number += 1
        name = safe_name(f"{window_id}-{number}")
    return name
