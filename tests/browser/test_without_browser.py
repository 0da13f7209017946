"""Without a browser its tests are skipped with the reason, but never where all must be real."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.browser import chromium


def test_what_is_missing_skips_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SGLPROF_REQUIRE_REAL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium; install it with"), chromium():
        pass
    (tmp_path / "chromium").write_text("#!/bin/sh\n")
    (tmp_path / "chromium").chmod(0o755)
    with pytest.raises(pytest.skip.Exception, match="no chromedriver"), chromium():
        pass
    monkeypatch.setenv("SGLPROF_REQUIRE_REAL", "1")
    with pytest.raises(pytest.fail.Exception, match="SGLPROF_REQUIRE_REAL is set"), chromium():
        pass
