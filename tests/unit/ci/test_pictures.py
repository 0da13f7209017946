"""Every picture of the docs is made by `python -m ci.pictures`, and every one made is shown."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

# Not by its name: the folder of these tests is a package `ci`, too.
COMMAND = runpy.run_path(str(Path(__file__).parents[3] / "ci" / "pictures.py"))
PICTURES, MADE_BY = COMMAND["PICTURES"], COMMAND["MADE_BY"]
IMAGE = re.compile(r"images/([\w-]+)\.png")


def test_the_docs_show_the_pictures_that_are_made(project_root: Path) -> None:
    pages = [project_root / "README.md", *(project_root / "docs").glob("*.md")]
    shown = {name for page in pages for name in IMAGE.findall(page.read_text())}
    assert shown == PICTURES.keys()
    files = {path.stem for path in (project_root / "docs" / "images").iterdir()}
    assert files == PICTURES.keys()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_says_which_command_made_it(project_root: Path, name: str) -> None:
    with Image.open(project_root / "docs" / "images" / f"{name}.png") as picture:
        assert picture.info["Source"] == MADE_BY
