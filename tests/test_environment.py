"""docs/environment.md names exactly the environment variables that the code reads or sets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "environment.md"
NAME = re.compile(r"[A-Z][A-Z0-9_]{3,}")


def is_environment(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def accessed(node: ast.AST) -> list[ast.expr]:
    """The names that an expression looks up in `os.environ`, or declares to Typer."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_environment(node.func.value):
        return node.args[:1]
    if isinstance(node, ast.Call) and node.args and is_environment(node.args[0]):
        return node.args[1:2]
    if isinstance(node, ast.Subscript) and is_environment(node.value):
        return [node.slice]
    if isinstance(node, ast.Compare) and is_environment(node.comparators[0]):
        return [node.left]
    if isinstance(node, ast.Dict) and None in node.keys and is_environment(node.values[node.keys.index(None)]):
        return [key for key in node.keys if key is not None]
    if isinstance(node, ast.keyword) and node.arg == "envvar":
        return [node.value]
    return []


def variables(file: Path) -> Iterator[str]:
    """Those that a module accesses; where it does so in a loop, every string of it that looks like a name counts."""
    source = file.read_text(encoding="utf-8")
    if "environ" not in source and "envvar" not in source:
        return
    tree = ast.parse(source)
    for name in (name for node in ast.walk(tree) for name in accessed(node)):
        if isinstance(name, ast.Name) and name.id.isupper():
            # A constant, counted in the module that assigns it.
            assigned = [
                node.value for node in tree.body if isinstance(node, ast.Assign) and name.id in ast.unparse(node)
            ]
            yield from (value.value for value in assigned if isinstance(value, ast.Constant))
        elif isinstance(name, ast.Constant):
            yield name.value
        else:
            constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            yield from (value for value in constants if isinstance(value, str) and NAME.fullmatch(value))


@pytest.mark.skipif(not PAGE.exists(), reason="the page lies in the repository only")
def test_the_page_and_the_code_name_the_same_variables() -> None:
    page = PAGE.read_text(encoding="utf-8").partition("## Variables that exl's libraries read")[0]
    first_cells = re.findall(r"^\|(.*?)\|", page, flags=re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)} == {
        name for file in (ROOT / "exl_cli").rglob("*.py") for name in variables(file)
    }
