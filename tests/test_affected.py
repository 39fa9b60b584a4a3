"""Which tests `make check` runs."""

import subprocess
from pathlib import Path

import pytest

from affected import affected_tests, changed_files, main

SOURCES = {
    "tests/networks.py": "from compressor.models.layers import layers",
    "tests/models/test_layers.py": "from compressor.models.layers import layers\nfrom networks import PlainNetwork",
    "tests/models/test_edits.py": "from compressor.models.edits import edit",
    "tests/pruning/test_groups.py": "import compressor.models.layers\nfrom tests.networks import PlainNetwork",
    "tests/pruning/test_goals.py": "from compressor.pruning import goals\nfrom test_groups import cut",
    "tests/test_documents.py": "README = Path('README.md'), Path('docs/settings.py')\nfrom compressor.task import Task",
    "tests/report/test_page.py": "from compressor.report.page.html import page",
}


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        pytest.param("tests/test_documents.py", ["test_documents"], id="a test itself"),
        pytest.param(
            "tests/pruning/test_groups.py", ["pruning/test_goals", "pruning/test_groups"], id="what a test has"
        ),
        pytest.param("tests/networks.py", ["models/test_layers", "pruning/test_groups"], id="what tests share"),
        pytest.param(
            "tests/models/example.py", ["models/test_edits", "models/test_layers"], id="what a room's tests share"
        ),
        pytest.param("compressor/models/edits.py", ["models/test_edits", "models/test_layers"], id="a room"),
        pytest.param(
            "compressor/models/layers.py",
            ["models/test_edits", "models/test_layers", "pruning/test_groups"],
            id="a room and who imports the file",
        ),
        pytest.param("compressor/pruning/goals.py", ["pruning/test_goals", "pruning/test_groups"], id="a submodule"),
        pytest.param("compressor/task.py", ["test_documents"], id="the root of the package"),
        pytest.param(
            "compressor/models/layers.html", ["models/test_edits", "models/test_layers"], id="a room's file of any kind"
        ),
        pytest.param("compressor/report/page/templates/page.css", ["report/test_page"], id="a folder of a room"),
        pytest.param("README.md", ["test_documents"], id="a document"),
        pytest.param("docs/settings.py", ["test_documents"], id="a script that a test names"),
        pytest.param("my_README.md", [], id="a longer name"),
        pytest.param("tests/models/conftest.py", ["models/test_edits", "models/test_layers"], id="a room's fixtures"),
        pytest.param(
            "tests/conftest.py",
            [path.removeprefix("tests/").removesuffix(".py") for path in sorted(SOURCES) if "/test_" in path],
            id="fixtures of all",
        ),
        pytest.param("LICENSE", [], id="what no test names"),
    ],
)
def test_change_needs_the_tests_of_its_room_and_those_that_import_it(changed: str, tests: list[str]) -> None:
    assert affected_tests([changed], SOURCES) == [f"tests/{name}.py" for name in tests]


def test_each_room_of_the_package_has_tests_of_its_own() -> None:
    root = Path(__file__).parents[1]
    rooms = {file.parent.name for file in root.glob("compressor/*/__init__.py")}
    without = {room for room in rooms if not list((root / "tests" / room).glob("test_*.py"))}
    assert without == set()


def test_room_without_tests_is_refused_with_those_that_have_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prunning"]) == 2
    assert "no tests/prunning; the rooms with tests are cli, config, " in capsys.readouterr().err


def git(directory: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


def test_changed_is_what_differs_from_main_committed_or_not(tmp_path: Path) -> None:
    for name in ("old", "committed", "edited", "ignored"):
        (tmp_path / name).write_text("before")
    (tmp_path / ".gitignore").write_text("ignored")
    git(tmp_path, "init", "--initial-branch=main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message=first")
    assert changed_files(tmp_path) == []
    git(tmp_path, "switch", "--create", "work")
    (tmp_path / "committed").write_text("after")
    git(tmp_path, "commit", "--all", "--message=second")
    (tmp_path / "edited").write_text("after")
    (tmp_path / "new").write_text("after")
    assert changed_files(tmp_path) == ["committed", "edited", "new"]
    git(tmp_path, "switch", "--detach")
    git(tmp_path, "branch", "--delete", "--force", "main")
    git(tmp_path, "branch", "--delete", "--force", "work")
    assert changed_files(tmp_path) == ["edited", "new"]  # a clone without main: what is not committed
