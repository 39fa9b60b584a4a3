"""The layout of the package: one word, one room."""

import ast
from collections import Counter
from pathlib import Path

import compressor
from compressor.config.installed_stages import stage_names

PACKAGE = Path(__file__).parents[1] / "compressor"
FILES = sorted(PACKAGE.rglob("*.py"))


def repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def test_few_files_lie_beside_the_rooms():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_name_of_a_file_says_which_it_is():
    assert repeated([file.name for file in FILES if file.name != "__init__.py"]) == []


def test_name_of_a_class_says_which_it_is():
    trees = (ast.parse(file.read_text()) for file in FILES)
    assert repeated([node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]) == []


def test_name_in_yaml_leads_to_the_file_of_the_stage():
    own = {name: target for name, target in stage_names().items() if target.startswith("compressor.")}
    assert own
    for name, target in own.items():
        assert target.partition(":")[0] == f"compressor.stages.{name}"
        assert (PACKAGE / "stages" / f"{name}.py").is_file()


def test_editors_see_what_the_package_offers():
    (block,) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    seen = {
        (alias.name, node.module.removeprefix("compressor."))
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == set(compressor._HOMES.items())


def test_no_function_is_longer_than_60_lines():
    functions = [
        (file.name, node.name, node.end_lineno - node.lineno + 1)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [found for found in functions if found[2] > 60] == []
