"""CSV of the commands: read back by the standard library, and harmless in a spreadsheet."""

from __future__ import annotations

import csv
import io

import pytest

from pytest_sglprof._cli.options import to_csv

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1"]
PLAIN = ["void a<int>(int)", "a=b", "x, y", 'with "quotes"', "two\nlines", "'=1", ""]


@pytest.mark.parametrize("name", FORMULAS)
def test_what_a_spreadsheet_would_run_gets_an_apostrophe(name):
    ((cell,),) = list(csv.reader(io.StringIO(to_csv([{"name": name}], ["name"]), newline="")))[1:]
    assert cell == f"'{name}"


@pytest.mark.parametrize("name", PLAIN)
def test_any_other_text_is_as_it_was(name):
    row = {"name": name, "n": -5, "share": -0.25, "none": None}
    text = to_csv([row], list(row))
    assert list(csv.reader(io.StringIO(text, newline="")))[1:] == [[name, "-5", "-0.25", ""]]


def test_a_carriage_return_does_not_end_the_row():
    text = to_csv([{"name": "a\rb", "n": 1}], ["name", "n"])
    assert list(csv.reader(io.StringIO(text, newline="")))[1:] == [["a\\rb", "1"]]
