import sys
from pathlib import Path

import pytest

from compressor.references.source_code import call_faults, find, local_modules, source_file, summary


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def told(module: str, attribute: str, *arguments: str) -> list[str]:
    return [fault.message for fault in call_faults(module, attribute, arguments)]


def test_a_module_in_a_package_is_found_without_running_the_package(directory: Path):
    write(directory, {"pack/__init__.py": "raise SystemExit", "pack/inner/__init__.py": "1 / 0", "pack/inner/a.py": ""})

    assert source_file("pack.inner.a") == directory / "pack/inner/a.py"
    assert source_file("pack.inner.b") is None
    assert "pack" not in sys.modules


def test_a_module_without_python_source_is_found_and_has_no_file():
    assert find("sys") is not None
    assert source_file("sys") is None
    assert find("no_such_module.at_all") is None


def test_local_modules_are_followed_through_every_kind_of_import(directory: Path):
    write(
        directory,
        {
            "main.py": "import plain\nfrom named import thing\ndef f():\n    import inside\nimport json, numpy.linalg",
            "plain.py": "import pack.deep.leaf\nif True:\n    from pack import sibling",
            "named.py": "import main  # a circle",
            "inside.py": "this is no Python",
            "pack/__init__.py": "from .relative import *",
            "pack/relative.py": "from . import cousin\nfrom ..outside import nothing",
            "pack/cousin.py": "",
            "pack/sibling.py": "",
            "pack/deep/__init__.py": "",
            "pack/deep/leaf.py": "from ..up import x",
            "pack/up.py": "",
            "unused.py": "",
            "spaces/more/only.py": "from . import peer",
            "spaces/more/peer.py": "",
        },
    )

    found = local_modules("main", directory)

    assert found == {
        name: directory / file
        for name, file in {
            "main": "main.py",
            "plain": "plain.py",
            "named": "named.py",
            "inside": "inside.py",
            "pack": "pack/__init__.py",
            "pack.relative": "pack/relative.py",
            "pack.cousin": "pack/cousin.py",
            "pack.sibling": "pack/sibling.py",
            "pack.deep": "pack/deep/__init__.py",
            "pack.deep.leaf": "pack/deep/leaf.py",
            "pack.up": "pack/up.py",
        }.items()
    }
    assert set(local_modules("spaces.more.only", directory)) == {"spaces.more.only", "spaces.more.peer"}
    assert local_modules("json", directory) == {}


def test_the_summary_is_the_first_line_of_the_docstring_even_of_a_re_exported_class(directory: Path):
    write(
        directory,
        {
            "pack/__init__.py": "from pack.low_rank import LowRank as Factored",
            "pack/low_rank.py": 'class LowRank:\n    """Factor each matrix.\n\n    Slowly."""\nclass Bare: ...',
        },
    )

    assert summary("pack.low_rank", "LowRank") == "Factor each matrix."
    assert summary("pack", "Factored") == "Factor each matrix."
    assert summary("pack.low_rank", "Bare") == ""
    assert summary("pack.low_rank", "Absent") == ""
    assert summary("absent", "LowRank") == ""


SIGNATURES = """\
import functools
def task(data_dir, size=8, *, fold, shuffle=True): ...
def loose(width, **options): ...
def none(): ...
def positional(a, /, b): ...
@functools.cache
def decorated(a): ...
class Model:
    def __init__(self, width, depth=2): ...
    @classmethod
    def build(cls): ...
class Inherited(Model): ...
class Meta(metaclass=type):
    def __init__(self, a): ...
if True:
    def twice(a): ...
else:
    def twice(b): ...
alias = task
"""


@pytest.mark.parametrize(
    ("attribute", "arguments", "problems"),
    [
        ("task", ["data_dir", "fold"], []),
        ("task", ["data_dir", "fold", "size", "shuffle"], []),
        ("task", ["data_dri", "fold"], ["m:task (m.py:2) has no argument 'data_dri'; did you mean 'data_dir'?"]),
        ("task", ["data_dir"], ["m:task (m.py:2) needs the argument 'fold'"]),
        ("task", [], ["m:task (m.py:2) needs the argument 'data_dir'", "m:task (m.py:2) needs the argument 'fold'"]),
        (
            "task",
            ["data_dir", "fold", "x"],
            ["m:task (m.py:2) has no argument 'x'; it takes data_dir, size, fold, shuffle"],
        ),
        ("loose", ["anything"], ["m:loose (m.py:3) needs the argument 'width'"]),
        ("loose", ["width", "anything"], []),
        ("none", ["x"], ["m:none (m.py:4) has no argument 'x'; it takes none"]),
        ("Model", [], ["m:Model (m.py:8) needs the argument 'width'"]),
        ("Model", ["width", "self"], ["m:Model (m.py:8) has no argument 'self'; it takes width, depth"]),
        ("positional", [], []),
        ("decorated", ["x"], []),
        ("Model.build", ["x"], []),
        ("Inherited", ["x"], []),
        ("Meta", ["x"], []),
        ("twice", ["x"], []),
        ("alias", ["x"], []),
        ("functools.partial", ["x"], []),
    ],
)
def test_arguments_are_compared_with_a_signature_that_the_source_shows(
    directory: Path, attribute: str, arguments: list[str], problems: list[str]
):
    write(directory, {"m.py": SIGNATURES})

    assert told("m", attribute, *arguments) == problems


def test_a_signature_is_found_through_re_exports_and_a_circle_of_them_ends(directory: Path):
    write(
        directory,
        {
            "pack/__init__.py": "from .model import build",
            "pack/model.py": "from .deep import make as build",
            "pack/deep.py": "def make(width): ...",
            "left.py": "from right import x",
            "right.py": "from left import x",
        },
    )

    assert told("pack", "build") == ["pack:build (deep.py:1) needs the argument 'width'"]
    assert told("left", "x") == []


def test_a_name_that_the_module_does_not_bind_is_told_with_the_closest(directory: Path):
    write(directory, {"m.py": "def teacher(): ...\ndef f():\n    local = 1\n    global made\n    made = 2"})

    assert told("m", "techer") == [f"{directory / 'm.py'} has no 'techer'; did you mean 'teacher'?"]
    assert told("m", "local") == [f"{directory / 'm.py'} has no 'local'"]
    assert told("m", "made") == []


@pytest.mark.parametrize(
    "source",
    [
        "from json import *",
        "def __getattr__(name): ...",
        "globals()['teacher'] = 1",
        "import sys\nsys.modules[__name__] = object()",
        "(teacher := 1)",
        "for teacher in (): ...",
        "try:\n    import teacher\nexcept ImportError:\n    teacher = None",
        "with open('x') as (_, teacher): ...",
    ],
)
def test_a_module_that_may_have_the_name_after_all_is_left_to_the_import(directory: Path, source: str):
    write(directory, {"m.py": source})

    assert told("m", "teacher") == []


def test_a_submodule_is_a_name_of_its_package(directory: Path):
    write(directory, {"pack/__init__.py": "", "pack/models.py": "def build(): ..."})

    assert told("pack", "models.build") == []


def test_source_that_is_no_python_is_told_with_its_line(directory: Path):
    write(directory, {"m.py": "def teacher(:\n"})

    (problem,) = told("m", "teacher")

    assert problem.startswith(f"{directory / 'm.py'} must be Python, but: ")
    assert "line 1" in problem
