"""Writes the schemas, or what of them is made from types: `python -m ci.schemas`.

`--check` writes nothing and fails when one of them is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
from jsonschema import Draft202012Validator

from pytest_sglprof._config.model import SERVER_KINDS
from pytest_sglprof._report.model import FORMAT, Results

FOLDER = Path(__file__).parents[1] / "pytest_sglprof" / "schemas"


def schemas() -> dict[str, str]:
    """File name -> text of each schema."""
    return {
        "results.schema.json": _text(Results, f"results-{FORMAT.major}", "results of a run"),
        "config.schema.json": _with_kinds((FOLDER / "config.schema.json").read_text("utf-8")),
    }


def _with_kinds(schema: str) -> str:
    """The schema of the configuration, written by hand, with the kinds of server that exist."""
    line = f'"kind": {{ "enum": {json.dumps(SERVER_KINDS)} }}'
    return re.sub(r'"kind": \{ "enum": \[.*?\] \}', line, schema)


def _text(kind: type, name: str, title: str) -> str:
    schema: dict[str, Any] = {
        "$schema": Draft202012Validator.META_SCHEMA["$id"],
        "$id": f"urn:pytest-sglprof:schema:{name}",
        "title": f"pytest-sglprof: {title}",
        **msgspec.json.schema(kind),
    }
    # Writers write every field; only dataclasses that people fill in as well have defaults.
    for definition in schema["$defs"].values():
        if "properties" in definition:
            definition["required"] = list(definition["properties"])
    return json.dumps(schema, indent=1, ensure_ascii=False, default=str) + "\n"


def main() -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when one is stale")
    arguments = parser.parse_args()
    stale = []
    for name, text in schemas().items():
        path = FOLDER / name
        if path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"{'stale' if arguments.check else 'written'}: {', '.join(stale)}\n")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
