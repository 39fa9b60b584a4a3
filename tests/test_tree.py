"""The tree in CONTRIBUTING.md, which says of every file what it is for."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = ("compressor", "pipelines", "benchmarks")


def tree() -> dict[str, str]:
    """What the tree says of each path; directories end with a slash."""
    _, _, rest = (ROOT / "CONTRIBUTING.md").read_text().partition("## The tree\n\n```\n")
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in rest.partition("\n```")[0].splitlines():
        name, _, text = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        found["".join(parents)] = text.strip()
    return found


def first_line(module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text()))
    assert docstring, module
    return docstring.partition("\n")[0]


def test_the_tree_has_the_first_line_of_every_module():
    modules = {path.relative_to(ROOT): path for top in SHOWN for path in (ROOT / top).rglob("*.py")}
    packages = {path.parent for path in modules if path.name == "__init__.py" and len(path.parts) > 2}
    wanted = {f"{package}/": first_line(ROOT / package / "__init__.py") for package in packages} | {
        str(path): first_line(file)
        for path, file in modules.items()
        if path.name != "__init__.py" or len(path.parts) == 2
    }
    said = tree()
    assert {path: said.get(path) for path in wanted} == wanted
    assert {path for path in said if path.endswith(".py")} <= wanted.keys()


def test_what_the_tree_names_is_there():
    assert [path for path in tree() if not list(ROOT.glob(path.rstrip("/")))] == []
