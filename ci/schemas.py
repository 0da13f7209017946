"""Writes the schemas that follow from types and from tables: `python -m ci.schemas`.

`--check` writes nothing and fails when one of them is stale.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from jsonschema import Draft202012Validator

import pytest_sglprof
from pytest_sglprof._baselines.records import RECORD_FORMAT, Baseline, LifeRecord
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.model import ACROSS, NODE_LAUNCHERS, SERVER_ENTRIES, SERVER_KINDS
from pytest_sglprof._config.options import OPTIONS
from pytest_sglprof._report.model import FORMAT, Results

FOLDER = Path(pytest_sglprof.__file__).parent / "schemas"
CONFIG = "config.schema.json"
NO_DEFAULT = object()
ADDED_LATER = (
    "across",
    "min_us",
    "role",
)  # fields that older documents lack, although their default is not None
KINDS: dict[str, dict[str, Any]] = {  # what a value of each `Option.kind` may be
    "flag": {"type": "boolean"},
    "text": {"type": "string", "minLength": 1},
    "regex": {"type": "string", "format": "regex", "minLength": 1},
    "count": {"type": "integer", "minimum": 0},
    "positive": {"type": "integer", "minimum": 1},
    "confirm": {"type": "integer", "minimum": 0, "maximum": 3},
    "size": {"type": "number", "exclusiveMinimum": 0},
    "repeat": {"type": ["integer", "string"], "minimum": 1, "pattern": "^certain$"},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
}


def schemas() -> dict[str, str]:
    """File name -> text of each schema."""
    return {
        "results.schema.json": _text(Results, f"results-{FORMAT.major}", "results of a run"),
        "baseline.schema.json": _text(Baseline, f"baseline-{RECORD_FORMAT[0]}", "accepted lives"),
        "life.schema.json": _text(
            LifeRecord, f"life-{RECORD_FORMAT[0]}", "record of a server life"
        ),
        CONFIG: _config_text(),
    }


def _config_text() -> str:
    """The schema of sglprof.toml: the keys of `OPTIONS`, the kinds of server, the backends.

    The rest is written by hand and stays as it is.
    """
    schema = json.loads((FOLDER / CONFIG).read_text(encoding="utf-8"))
    tables = schema["properties"]
    definitions = schema["$defs"]
    definitions["server"]["properties"]["kind"]["enum"] = list(SERVER_KINDS)
    definitions["server"]["properties"]["entry"]["enum"] = list(SERVER_ENTRIES)
    definitions["server"]["properties"]["launcher"]["enum"] = list(NODE_LAUNCHERS)
    definitions["window"]["properties"]["backend"]["enum"] = list(BACKENDS)
    definitions["threshold"]["properties"]["across"]["enum"] = [*ACROSS, ""]
    for name in {option.table for option in OPTIONS if option.key} - set(definitions):
        tables[name] = {"type": "object", "additionalProperties": False, "properties": {}}
    for option in OPTIONS:
        if option.key:
            table = definitions.get(option.table) or tables[option.table]
            rule = {"enum": list(option.choices)} if option.choices else KINDS[option.kind]
            table["properties"][option.last_key] = {**rule, "description": option.help}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _text(kind: type, name: str, title: str) -> str:
    schema: dict[str, Any] = {
        "$schema": Draft202012Validator.META_SCHEMA["$id"],
        "$id": f"urn:pytest-sglprof:schema:{name}",
        "title": f"pytest-sglprof: {title}",
        **msgspec.json.schema(kind),
    }
    # Writers write every field. Older documents lack those added later, whose default is None;
    # the other defaults are of dataclasses that people fill in as well.
    for definition in schema["$defs"].values():
        if "description" in definition:  # msgspec before 0.23 keeps the indent of docstrings
            definition["description"] = inspect.cleandoc(definition["description"])
        if "properties" in definition:
            definition["required"] = [
                name
                for name, rule in definition["properties"].items()
                if rule.get("default", NO_DEFAULT) is not None and name not in ADDED_LATER
            ]
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
