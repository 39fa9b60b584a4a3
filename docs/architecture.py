"""What docs/architecture.md takes from the code: its floors, its rooms with what they import, and its files."""

import ast
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "compressor"


def blocks() -> dict[str, str]:
    """The generated parts of the page, by the name of their marks."""
    floors = read_floors()
    return {"floors": draw_floors(floors), "rooms": tabulate_rooms(floors, find_imports()), "files": list_files(floors)}


def read_floors() -> Sequence[Sequence[str]]:
    """The rooms of each floor, from the top, as import-linter checks them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [layer.replace(" ", "").split("|") for layer in layers]


def find_imports() -> Mapping[str, set[str]]:
    """The rooms that each room imports from; a file of the package's own folder is a room with one file."""
    graph = grimp.build_graph("compressor", exclude_type_checking_imports=True)
    found: dict[str, set[str]] = {}
    for module in graph.modules - {"compressor"}:
        room = module.split(".")[1]
        others = {name.split(".")[1] for name in graph.find_modules_directly_imported_by(module) if "." in name}
        found[room] = found.get(room, set()) | (others - {room})
    return found


def draw_floors(floors: Sequence[Sequence[str]]) -> str:
    """The floors as a Mermaid diagram, one box each, an arrow from each to the one below."""
    lines = ["```mermaid", "flowchart TD"]
    for number, rooms in reversed(list(enumerate(reversed(floors), start=1))):
        lines.append(f'    floor{number}["{number}: {" · ".join(rooms)}"]')
    lines.append("    " + " --> ".join(f"floor{number}" for number in range(len(floors), 0, -1)))
    return "\n".join([*lines, "```"])


def tabulate_rooms(floors: Sequence[Sequence[str]], imports: Mapping[str, set[str]]) -> str:
    """Each room with its floor, what it is, and the rooms that it imports from, the nearest floor first."""
    order = [room for rooms in floors for room in rooms]
    lines = ["| floor | room | what it is | imports from |", "|--:|---|---|---|"]
    for number, rooms in reversed(list(enumerate(reversed(floors), start=1))):
        for room in rooms:
            below = ", ".join(sorted(imports[room], key=order.index)) or "nothing"
            lines.append(f"| {number} | `{room}` | {read_summary(find_file(room))} | {below} |")
    return "\n".join(lines)


def list_files(floors: Sequence[Sequence[str]]) -> str:
    """Every file with its first line, room by room, from the top floor down."""
    parts = []
    for room in (room for rooms in floors for room in rooms):
        if (PACKAGE / room).is_dir():
            files = [file for file in sorted((PACKAGE / room).rglob("*.py")) if file.name != "__init__.py"]
            lines = [f"- [{file.relative_to(PACKAGE / room)}]({link(file)}): {read_summary(file)}" for file in files]
            parts.append("\n".join([f"### {room}/", "", *lines]))
    alone = [f"- [{file.name}]({link(file)}): {read_summary(file)}" for file in sorted(PACKAGE.glob("*.py"))]
    return "\n\n".join([*parts, "\n".join(["### Files of the package's own folder", "", *alone])])


def find_file(room: str) -> Path:
    """The file whose first line says what a room is."""
    folder = PACKAGE / room / "__init__.py"
    return folder if folder.exists() else PACKAGE / f"{room}.py"


def read_summary(file: Path) -> str:
    """The first line of a file's docstring, ready for a table."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return docstring.partition("\n")[0].replace("|", "\\|")


def link(file: Path) -> str:
    """The way to a file from a page in docs/."""
    return f"../{file.relative_to(ROOT)}"
