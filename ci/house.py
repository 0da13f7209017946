"""``python -m ci.house``: how large the house is, and what its tests assert.

It prints the modules (files that are not empty) and their lines, the longest function, every
module with one importer beside the reason why it stays apart (ci/house.toml), and every test
function that asserts less than at ``--base`` and has no successor named in that file. The exit
status is 1 where a file has more than 600 lines, a reason or a successor is missing or stale.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "pytest_sglprof"
MOST_LINES = 600  # of one file: beyond this a reader scrolls instead of reading
CHECKS = {
    "raises",
    "warns",
    "fnmatch_lines",
    "re_match_lines",
    "no_fnmatch_line",
    "assert_outcomes",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """One file of Python: its path below the root, its text, its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """How many lines it has."""
        return self.text.count("\n")

    @property
    def module(self) -> str:
        """Its dotted name."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def functions(self) -> Iterator[Function]:
        """All its functions and methods."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield node


def sources(folder: str, revision: str | None = None) -> list[Source]:
    """The files of Python below `folder` that are not empty, of the checkout or of a revision."""
    list_files = ["ls-files"] if revision is None else ["ls-tree", "-r", "--name-only", revision]
    files = []
    for path in _git(*list_files, "--", folder).splitlines():
        if path.endswith(".py"):
            here = ROOT / path
            text = here.read_text() if revision is None else _git("show", f"{revision}:{path}")
            if text.strip():
                files.append(Source(path, text, ast.parse(text)))
    return files


def importers(files: Iterable[Source]) -> Mapping[str, set[str]]:
    """Of each module the modules that import it or a name of it."""
    files = list(files)
    modules = {each.module for each in files}
    result = defaultdict(set)
    for each in files:
        for node in ast.walk(each.tree):
            for name in _imported(node):
                if name in modules and name != each.module:
                    result[name].add(each.module)
    return result


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (each.name for each in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{each.name}" for each in node.names)


def assertions(files: Iterable[Source]) -> Counter[str]:
    """How many assertions the test functions of each name hold, wherever they stand."""
    counts: Counter[str] = Counter()
    for each in files:
        for function in each.functions():
            if function.name.startswith("test"):
                counts[function.name] += sum(map(_is_assertion, ast.walk(function)))
    return counts


def _is_assertion(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in CHECKS
    return isinstance(node, ast.Assert)


def longest_function(files: Iterable[Source]) -> tuple[int, str]:
    """The lines of the longest function, and where it stands."""
    return max(
        (function.end_lineno - function.lineno + 1, f"{each.path}:{function.name}")
        for each in files
        for function in each.functions()
        if function.end_lineno is not None
    )


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def report_size(files: list[Source]) -> list[str]:
    """Prints modules, lines and the longest function; tells which files are too long."""
    lines = [each.lines for each in files]
    print(f"modules            {len(files)} (median {statistics.median(lines):.0f} lines)")
    print(f"lines              {sum(lines)}")
    length, where = longest_function(files)
    print(f"longest function   {length} lines, {where}")
    everything = [*files, *sources("tests"), *sources("benchmarks"), *sources("ci")]
    return [
        f"{each.path} has {each.lines} lines, {MOST_LINES} at most"
        for each in everything
        if each.lines > MOST_LINES
    ]


def report_importers(files: list[Source], reasons: Mapping[str, str]) -> list[str]:
    """Prints each module with one importer and its reason; tells which have none."""
    by_module = importers(files)
    single = {name: next(iter(by_module[name])) for name in by_module if len(by_module[name]) == 1}
    print(f"one importer       {len(single)} modules")
    for name, importer in sorted(single.items()):
        print(f"  {_short(name)} <- {_short(importer)}: {reasons.get(_short(name), 'NO REASON')}")
    names = {_short(name) for name in single}
    return [
        *(f"{name} has one importer and no reason in ci/house.toml" for name in names - {*reasons}),
        *(f"{name} of ci/house.toml has more importers, or is gone" for name in {*reasons} - names),
    ]


def _short(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.")


def report_assertions(base: str, successors: Mapping[str, str]) -> list[str]:
    """Prints what tests assert now and at `base`; tells which lost some without a successor."""
    before, after = assertions(sources("tests", base)), assertions(sources("tests"))
    print(f"test functions     {len(before)} at {base}, {len(after)} now")
    print(f"assertions         {before.total()} at {base}, {after.total()} now")
    lost = [name for name in before if after[name] < before[name]]
    for name in lost:
        successor = successors.get(name, "NO SUCCESSOR")
        print(f"  {name}: {before[name]} -> {after[name]}: {successor}")
    return [
        f"{name} asserts less and names no successor" for name in lost if name not in successors
    ]


def main() -> int:
    """Print the report; 1 where something is too long, apart or lost without a reason."""
    parser = argparse.ArgumentParser(prog="python -m ci.house", description=__doc__)
    parser.add_argument("--base", help="compare the tests' assertions with those of this revision")
    base = parser.parse_args().base
    notes = tomllib.loads((ROOT / "ci/house.toml").read_text())
    files = sources(PACKAGE)
    problems = report_size(files) + report_importers(files, notes["one-importer"])
    if base:
        problems += report_assertions(base, notes["successors"])
    for problem in sorted(problems):
        print(f"problem: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
