"""`python -m pytest_sglprof` is the `sglprof` command."""

from __future__ import annotations

import sys

from pytest_sglprof._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
