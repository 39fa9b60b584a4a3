"""Run the tests that a change needs: `python tests/affected.py`, or with the names of rooms to run theirs.

Nothing is listed by hand. The folders of the tests mirror those of the package, and the files say what they import:

- a test file that changed runs;
- for any file, the tests that import it or name it run;
- for a file in `compressor/ROOM/`, or one in `tests/ROOM/` that tests share, those in `tests/ROOM/` run too;
- for a `conftest.py`, all tests in its folder run, and below.

What changed is what differs from the point where the branch left `main`, committed or not. A test may also depend on a
file by way of another, so `make test`, which runs all, has the last word.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]


def affected_tests(changed: Iterable[str], sources: Mapping[str, str]) -> list[str]:
    """Paths of the test files that need to run; `sources` has the text of each Python file in `tests/`, by path."""
    tests = {path: text for path, text in sources.items() if PurePosixPath(path).name.startswith("test_")}
    imports = {path: imported_modules(text) for path, text in tests.items()}
    return sorted(
        path
        for path in tests
        if any(_concerns(PurePosixPath(file), path, tests[path], imports[path]) for file in changed)
    )


def _concerns(file: PurePosixPath, test: str, text: str, imports: frozenset[str]) -> bool:
    """Whether a change of `file` needs the test file `test`, with this text and these imports, to run."""
    if str(file) == test or not imports.isdisjoint(module_names(file)) or _names(text, file.name):
        return True
    if file.name == "conftest.py":
        return PurePosixPath(test).is_relative_to(file.parent)
    in_a_room = file.parts[0] in {"compressor", "tests"} and len(file.parts) > 2 and not file.name.startswith("test_")
    return in_a_room and PurePosixPath(test).parts[:2] == ("tests", file.parts[1])


def _names(text: str, name: str) -> bool:
    """Whether a text has the name of a file, not as the end of a longer name."""
    return re.search(rf"(?<![\w.-]){re.escape(name)}", text) is not None


def module_names(file: PurePosixPath) -> frozenset[str]:
    """What a Python file can be imported as: `tests/report/page.py` is also `report.page` and `page`."""
    if file.suffix != ".py":
        return frozenset()
    parts = file.with_suffix("").parts
    whole = parts[:-1] if parts[-1] == "__init__" else parts
    starts = range(1 if parts[0] == "compressor" else len(whole))
    return frozenset(".".join(whole[start:]) for start in starts)


def imported_modules(text: str) -> frozenset[str]:
    """Names of modules that a source may import: `from a import b` may mean `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def changed_files(root: Path) -> list[str]:
    """Files, relative to `root`, that differ from where HEAD left `main` or that git does not know yet."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.split("\n")[:-1] if done.returncode == 0 else []

    (base, *_) = [*git("merge-base", "HEAD", "main"), *git("merge-base", "HEAD", "origin/main"), "HEAD"]
    return sorted({*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")})


def main(rooms: list[str]) -> int:
    """Run the tests of `rooms`, or those that what changed needs."""
    with_tests = sorted({file.parent.name for file in (ROOT / "tests").glob("*/test_*.py")})
    if unknown := set(rooms).difference(with_tests):
        sys.stderr.write(f"no tests/{min(unknown)}; the rooms with tests are {', '.join(with_tests)}\n")
        return 2
    sources = {file.relative_to(ROOT).as_posix(): file.read_text() for file in (ROOT / "tests").rglob("*.py")}
    chosen = [f"tests/{room}" for room in rooms] or affected_tests(changed_files(ROOT), sources)
    if not chosen:
        sys.stdout.write("no test names what changed\n")
        return 0
    sys.stdout.write("\n".join(["what changed needs", *chosen, ""]))
    return pytest.main(["--numprocesses=auto", "--dist=loadfile", "-q", *(str(ROOT / path) for path in chosen)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
