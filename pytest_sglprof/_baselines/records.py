"""What is kept of a server life: one small record a test and window, typed, with a schema.

The unit of every comparison between runs is the server life: steps of one life are not
independent samples of a version.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from pytest_sglprof._analysis.certainty import Amount, Count, Interval
from pytest_sglprof._analysis.strata import GroupStrata
from pytest_sglprof._config.backends import Backend
from pytest_sglprof._files import safe_name
from pytest_sglprof._metrics import VerdictWord

REGRESSION = "regression"  # the metric that compares lives
RECORD_FORMAT = (1, 0)  # major, minor: a minor one adds, a major one changes what was there
Driven = Literal["rate", "concurrency", "unlimited"]  # how a load sends its requests


class BaselineKey(msgspec.Struct, frozen=True, kw_only=True):
    """Lives with equal keys are compared with each other.

    Versions are not in it, since they are what is under test; nor is the host. gpu: its model,
    "cpu" without one. gpus: their number. sizes: of parallelism. load: digest of the load's
    shape; server: digest of the server's options that shape the run.
    """

    test: str
    window: str
    backend: Backend
    gpu: str
    gpus: Count
    model: str
    quantization: str
    kv_dtype: str
    sizes: dict[str, int | bool | str]
    load: str
    server: str
    standin: bool

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that depend on every field."""
        return digest_of(self)

    @property
    def file_name(self) -> str:
        """`test_decode-steady-1f3a9c02.json`: the name of its baseline in the folder."""
        return f"{safe_name(f'{self.test}-{self.window}', limit=100)}-{self.digest}.json"


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the load driver measured before the first window of the life, after warm-up.

    figures: by name (`ttft_mean`, `ttft_p99`, `tpot_median`, `itl_p95`: ms; `output_throughput`,
    `goodput`: tokens/s and requests/s; `accept_length`: tokens). driven: at a fixed rate, at a
    fixed concurrency, or as fast as possible; only the first two are judged. queue_grows:
    whether requests waited longer and longer; None if it is not known.
    """

    figures: dict[str, float]
    driven: Driven
    requested: Count
    completed: Count
    queue_grows: bool | None


class LoadFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of the load driver over the new lives. value: their geometric mean.

    interval: what it may be, as far as accepted lives tell how much lives differ; else None.
    """

    value: float
    lives: Count
    interval: Interval | None = None


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a record comes from. Nothing of it is in the key.

    versions: of SGLang, torch, CUDA, the driver, nsys, pytest-sglprof; "" where unknown. commit:
    of SGLang, "" where unknown. clocks_mhz, power_limit_w: of each rank. options, load: the
    server's options and the load's, whose digests are in the key, redacted.
    """

    host: str
    versions: dict[str, str]
    commit: str
    clocks_mhz: dict[str, float]
    power_limit_w: dict[str, float | None]
    options: dict[str, str]
    load: dict[str, str]


class LifeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One window of one server life, or several that repeat each other.

    life: names the server life; several records may share it. groups: robust times of each kind
    of step, see `GroupStrata`. load: None where no load was complete before the first window.
    verdict: of the test's windows. failed: metrics by which it failed. not_acceptable: why it
    must never be accepted (inconclusive, truncated); empty if it may be. apart: why it is kept
    apart from comparisons, so that it neither passes nor fails, and is never accepted (compiled
    inside of the window, throttled, disturbed); "".
    """

    format: tuple[int, int]
    id: str
    life: str
    run: str
    recorded: str
    key: BaselineKey
    groups: tuple[GroupStrata, ...]
    load: LoadFigures | None
    provenance: Provenance
    verdict: VerdictWord | None
    failed: tuple[str, ...] = ()
    not_acceptable: tuple[str, ...] = ()
    apart: str = ""


class AcceptedLife(msgspec.Struct, frozen=True, kw_only=True):
    """A life to which later ones are compared.

    reason: why a life that failed by `regression` was accepted, "" otherwise. begins_level: it
    begins a new level: lives before it give the variance alone, those since then also the mean.
    """

    record: LifeRecord
    accepted: str
    reason: str = ""
    begins_level: bool = False


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine shows between lives of one version (A/A).

    sd: of the logarithm between lives, by figure. upper: factor of its upper end (95 %).
    """

    lives: Count
    sd: dict[str, Amount]
    upper: float
    measured: str
    host: str


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """The content of one file: the last accepted lives of one key, the oldest first."""

    format: tuple[int, int]
    key: BaselineKey
    lives: tuple[AcceptedLife, ...]
    floor: Floor | None = None


def digest_of(value: object) -> str:
    """The first eight hexadecimal digits of the SHA-256 of a value, whatever its order of keys."""
    text = msgspec.json.encode(value, order="sorted")
    return hashlib.sha256(text).hexdigest()[:8]
