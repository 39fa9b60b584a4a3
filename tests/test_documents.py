import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import grimp
import pytest
from ruamel.yaml import YAML

from compressor import Task, errors
from compressor.cli.main import compress
from compressor.config.chain import find_stage
from compressor.config.installed_stages import stage_names
from compressor.verdicts.budget import Budget

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
LEFT_OUT = {"batch_size", "optimizer", "round_to", "model_name"}
"""What README leaves out of pipelines/digits.yaml."""


def read(name: str) -> str:
    return (ROOT / name).read_text()


def blocks_of(page: Path, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def rows(page: str, section: str) -> list[list[str]]:
    """Cells of the first table of a section, without its head."""
    text = read(page).partition(f"## {section}\n")[2].partition("\n## ")[0]
    table = re.findall(r"^\|.*\|$", text, re.MULTILINE)[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table]


@pytest.fixture(scope="module")
def generated():
    """What the pages take from the code: page, name of its marks, text.

    docs/settings.py makes what they say of settings; docs/architecture.py the floors, rooms and files.
    """
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
        import update  # noqa: PLC0415  # a script beside the pages, no package

        yield list(update.blocks_of_code())
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent in (ROOT / "docs", ROOT / "benchmarks"):
            del sys.modules[name]


def test_what_pages_take_from_the_code_is_what_it_says(generated):
    stale = [
        f"{page.name}: {name}"
        for page, name, text in generated
        if f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->" not in page.read_text()
    ]
    assert stale == [], "run `make docs`"


def test_every_mark_has_a_source(generated):
    marked = {(page, name) for page in PAGES for name in re.findall("<!-- (\\w+):begin -->", page.read_text())}
    of_numbers = {(page, name) for page, name in marked if page.name in ("README.md", "results.md")}
    assert marked - of_numbers == {(page, name) for page, name, _ in generated}


@pytest.mark.parametrize(("page", "most"), [("README.md", 200), ("CONTRIBUTING.md", 80)])
def test_the_first_pages_stay_short(page, most):
    assert len(read(page).splitlines()) <= most


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    broken = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not leads_somewhere(page, link)]
    assert broken == []


def leads_somewhere(page: Path, link: str) -> bool:
    if link.startswith("https://"):
        return True
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_pipeline_of_the_readme_is_the_demo_without_what_it_leaves_out(page):
    shown = YAML(typ="safe").load(blocks_of(ROOT / page, "yaml")[0])
    assert shown == without_left_out(YAML(typ="safe").load(ROOT / "pipelines/digits.yaml"))


def without_left_out(value):
    if isinstance(value, list):
        return [without_left_out(part) for part in value]
    if isinstance(value, dict):
        return {name: without_left_out(part) for name, part in value.items() if name not in LEFT_OUT}
    return value


def shown_stages() -> Iterator[tuple[str, dict]]:
    for page in PAGES:
        for block in blocks_of(page, "yaml"):
            found = YAML(typ="safe").load(block)
            for stage in found if isinstance(found, list) else found.get("stages", []):
                yield page.name, stage


def test_every_stage_that_a_page_shows_is_valid():
    shown = [(page, stage) for page, stage in shown_stages() if ":" not in stage["stage"]]
    assert {page for page, _ in shown} >= {"README.md", "for_edge.md", "for_researchers.md", "write_a_stage.md"}
    for _, stage in shown:
        settings = {name: value for name, value in stage.items() if name != "stage"}
        find_stage(stage["stage"], stage_names()).model_validate_json(json.dumps(settings))


def test_readme_names_every_command():
    named = re.findall(r"^compress (\w+)", "\n".join(blocks_of(ROOT / "README.md", "")), re.MULTILINE)
    assert set(named) == set(compress.commands)


def test_the_page_for_engineers_names_every_field_of_a_task():
    named = [
        name for cells in rows("docs/for_engineers.md", "1. Give it the model and the data") for name in spans(cells[0])
    ]
    assert sorted(named) == sorted(field.name for field in fields(Task))


def test_every_exit_code_of_an_error_is_in_the_table():
    told = {cells[0] for cells in rows("docs/for_ci.md", "Exit codes")}
    raised = {str(kind.exit_code) for kind in errors.CompressorError.__subclasses__()}
    assert raised < told


def spans(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def glossary() -> Iterator[list[str]]:
    for section in re.findall(r"^## (.*)$", read("docs/glossary.md"), re.MULTILINE):
        yield from rows("docs/glossary.md", section)


def test_each_word_of_the_glossary_stands_there_once():
    words = [cells[0] for cells in glossary()]
    assert len(words) > 80
    assert sorted(words) == sorted(set(words))


def test_every_key_of_a_pipeline_file_says_what_it_means():
    settings = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", read("docs/stages.md"), re.MULTILINE)
    assert "temperature" in dict(settings)
    assert [key for key, meaning in settings if not meaning.strip()] == []


def test_what_the_glossary_names_is_in_yaml_or_in_the_code():
    known = {name for file in (ROOT / "compressor").rglob("*.py") for name in names_in(ast.parse(file.read_text()))}
    known |= {*re.findall(r'"([\w\-]+)"', read("pipelines/pipeline.schema.json"))}
    known |= {*Budget.model_fields, *(f"compress {name}" for name in compress.commands)}
    named = [span for cells in glossary() for span in spans(cells[2])]
    assert [name for name in named if name.removeprefix("--") not in known] == []


def names_in(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines or uses, and its texts, but no words of docstrings."""
    told = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name
            case ast.Constant(value=str(text)) if node not in told:
                yield text


def calls() -> list[tuple[str, str, str]]:
    """Arrows of the picture of a run: module that calls, module that is called, function or class."""
    (picture,) = [block for block in blocks_of(ROOT / "docs/architecture.md", "mermaid") if "sequenceDiagram" in block]
    modules = {
        name: f"compressor.{file.removesuffix('.py').replace('/', '.')}"
        for name, file in re.findall(r"participant (\w+) as (\S+)", picture)
    }
    return [(modules[a], modules[b], function) for a, b, function in re.findall(r"(\w+)->>(\w+): (\w+)", picture)]


def test_the_picture_of_a_run_shows_imports_and_functions_that_exist():
    graph = grimp.build_graph("compressor", exclude_type_checking_imports=True)
    assert len(calls()) > 10
    for caller, called, function in calls():
        assert called in graph.find_modules_directly_imported_by(caller), f"{caller} does not import {called}"
        tree = ast.parse((ROOT / f"{called.replace('.', '/')}.py").read_text())
        assert function in {getattr(node, "name", None) for node in tree.body}, f"{called} has no {function}"
