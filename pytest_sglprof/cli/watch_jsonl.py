"""Samples and onsets as JSON lines."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any

from pytest_sglprof.errors import SettingsError
from pytest_sglprof.report.plain import plain
from pytest_sglprof.values import BalanceSample

if TYPE_CHECKING:
    from pytest_sglprof.analysis.unequal import Onset
    from pytest_sglprof.watch.log_lines import Sample


class JsonLines:
    """Writes to `target`: a file, "-" for standard output, None for nowhere.

    A sample is an object with the fields of `LoadSample`. Other objects say what they are
    in `event`: "onset", "end" (of an onset), or "balance" (the fields of `BalanceSample`).
    Each line is written out at once, so that a program behind a pipe sees it.
    """

    def __init__(self, target: str | None) -> None:
        self._owned = False
        self._stream: IO[str] | None = None
        if target == "-":
            self._stream = sys.stdout
        elif target is not None:
            try:
                self._stream = open(target, "w", encoding="utf-8")  # noqa: PTH123, SIM115
            except OSError as error:
                raise SettingsError(
                    f"--jsonl {target}: {error.strerror or error}", expected="a file to write"
                ) from error
            self._owned = True

    def samples(self, samples: Iterable[Sample]) -> None:
        """One object a sample."""
        if self._stream is None:
            return
        for sample in samples:
            event = {"event": "balance"} if isinstance(sample, BalanceSample) else {}
            self._write({**event, **dataclasses.asdict(sample)})
        self._stream.flush()

    def onset(self, onset: Onset) -> None:
        """One object; times in Unix s."""
        if self._stream is not None:
            self._write({"event": "onset", **plain(onset), "lost_share": onset.lost_share})
            self._stream.flush()

    def end(self, onset: Onset) -> None:
        """The end of an onset that was told before."""
        if self._stream is not None:
            self._write({"event": "end", "time": onset.ended, "onset": onset.time})
            self._stream.flush()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._owned and self._stream is not None:
            self._stream.close()

    def _write(self, value: dict[str, Any]) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n")
