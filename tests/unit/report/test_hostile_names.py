"""Kernel names that try to break a view: they are text in all of them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from pytest_sglprof._report.ci import attachments, kernel_table, properties, step_summary
from pytest_sglprof._report.heat_map import heat_map_svg
from pytest_sglprof._report.terminal import rank_table
from tests.support.kernel_tables import build, slow
from tests.support.windows import as_run, as_window, run, window

NAMES = (
    "<script>alert(1)</script>",
    "</details></script>",
    "a\"b'c\\d`e`",
    "| pipe | [link](http://x) ![i](http://x) **b** ~~s~~ $m$ &lt; &amp;",
    "🦥\x00\x1b[31m\u202e",
    "```\n# head\n",
    "z" * 10_000,
)
KERNELS = tuple((name, "moe", 100_000 + at) for at, name in enumerate(NAMES))
MARKUP = re.compile(r"(?<!\\)(?:\\\\)*[<`\[\]*~$&]")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return window(build(kernels=KERNELS, scale=slow("TP1", "moe", 1.4)))


def test_markdown_shows_every_name_as_text(document: dict[str, Any]) -> None:
    lines = kernel_table(as_window(document))
    assert len(lines) == 2 + len(NAMES)
    for line in lines:
        assert "\n" not in line
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 7
        assert MARKUP.search(line) is None, line
        assert len(line) < 500
    text = step_summary(as_run(run([document])))
    assert "<script" not in text.replace("\\<script", "")
    fenced = re.search(r"\n(`{3,})text\n(.*?)\n\1\n", text, re.DOTALL)
    assert fenced is not None
    assert text.count("<details>") == text.replace("\\</details", "").count("</details>") == 1


def test_junit_takes_every_name(
    document: dict[str, Any], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = [*properties(as_window(document)), *(("name", name) for name in NAMES)]
    picture = pytester.path / "a <b>.svg"
    picture.write_text(heat_map_svg(as_window(document)))
    hostile += attachments([picture, pytester.path / "absent.svg"])
    body = "".join(f"    record_property({name!r}, {value!r})\n" for name, value in hostile)
    pytester.makepyfile(f"def test_it(record_property):\n{body}")
    result = pytester.runpytest_subprocess("--junitxml=junit.xml", "-p", "no:sglprof")
    assert result.ret == 0
    root = ET.parse(pytester.path / "junit.xml").getroot()
    values = [found.get("value") for found in root.iter("property")]
    assert len(values) == len(hostile)
    assert NAMES[0] in values
    assert NAMES[-1] in values
    assert f"[[ATTACHMENT|{picture.resolve()}]]" in values
    assert not list(root.iter("script"))


def test_the_terminal_and_the_picture_stay_small(document: dict[str, Any]) -> None:
    assert max(map(len, rank_table(as_window(document)))) < 1000
    assert len(heat_map_svg(as_window(document))) < 20_000
    ET.fromstring(heat_map_svg(as_window(document)))
