"""Records what Apache Otava finds in 50 series, to compare our change points with.

`python -m ci.otava PYTHON`, where PYTHON has apache-otava==0.8.0; it pins numpy and pulls
clients of databases, so that it needs a virtual environment of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

RECORDING = Path(__file__).parents[1] / "tests" / "data" / "otava-0.8.0.json"
SERIES = 50

# Reads series, and writes the change points of each, on the other interpreter.
ASK = """
import importlib.metadata, json, sys
from otava.analysis import compute_change_points
assert importlib.metadata.version("apache-otava") == "0.8.0"
answers = [
    [int(point.index) for point in compute_change_points([float(each) for each in series])[0]]
    for series in json.load(sys.stdin)
]
json.dump(answers, sys.stdout)
"""


def series_of(seed: int) -> list[int]:
    """Figures of nights: white or correlated noise, steps of some per cent, spikes, any length."""
    rng = np.random.default_rng(seed)
    nights = int(rng.choice([3, 12, 30, 49, 51, 75, 120, 200, 330]))
    phi = float(rng.choice([0.0, 0.0, 0.6]))
    noise = rng.normal(0, 0.015, nights)
    for night in range(1, nights):
        noise[night] += phi * noise[night - 1]
    levels = np.zeros(nights)
    for start in rng.integers(1, nights, int(rng.integers(0, 5))):
        levels[start:] += rng.choice([-0.08, -0.03, 0.03, 0.05, 0.10])
    spikes = np.where(rng.random(nights) < 0.02, 0.2, 0.0)
    times: list[int] = np.rint(100_000 * np.exp(levels + noise + spikes)).astype(int).tolist()
    return times


def main() -> int:
    """Writes the recording."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    series = [series_of(seed) for seed in range(SERIES)]
    answer = subprocess.run(
        [sys.argv[1], "-c", ASK],
        input=json.dumps(series),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = [
        {"series": each, "change_points": points}
        for each, points in zip(series, json.loads(answer.stdout), strict=True)
    ]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    RECORDING.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{RECORDING.name}: {sum(len(row['change_points']) for row in rows)} change points")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
