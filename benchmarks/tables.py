"""How fast kernel tables are made, beside other tools: `python -m benchmarks.tables`.

Torch traces (`benchmarks.torch_tables`), then an nsys export (`benchmarks.nsys_tables`);
each of the two is a command of its own with more options. The environment variable
SGLPROF_NSYS names an nsys whose `nsys stats` is measured as well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Runs both; ends with the status of the first that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", default="3", help="runs of each way; medians are printed")
    parser.add_argument("--other", metavar="WAY=PYTHON", action="append", default=[])
    args = parser.parse_args()
    others = [f"--other={pair}" for pair in args.other]
    for module, more in (("torch_tables", others), ("nsys_tables", [])):
        command = [sys.executable, "-m", f"benchmarks.{module}", "--repeat", args.repeat, *more]
        status = subprocess.run(command, cwd=ROOT).returncode
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
