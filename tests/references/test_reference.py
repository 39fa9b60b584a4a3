import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.config.installed_stages import describe_stages, stage_names
from compressor.errors import HostError, InputError
from compressor.references.reference import Reference, load, prefer_modules_in, source_files


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory


def install(site: Path, name: str, entry_points: str, files: dict[str, str]) -> None:
    """Write what `pip install` would leave of a package."""
    info = f"{name}-1.2.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n"
    write(site, {f"{info}/METADATA": metadata, f"{info}/entry_points.txt": f"[compressor.stages]\n{entry_points}"})
    write(site, files)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = set(sys.modules)
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_two_directories_with_equally_named_modules_do_not_mix(tmp_path: Path):
    one = write(tmp_path / "one", {"same.py": "import inner\nNAME = inner.NAME", "inner.py": "NAME = 'one'"})
    two = write(tmp_path / "two", {"same.py": "import inner\nNAME = inner.NAME", "inner.py": "NAME = 'two'"})
    path = list(sys.path)

    for directory in (one, two, one):
        with prefer_modules_in(directory):
            assert load("same:NAME") == directory.name

    assert sys.path == path
    assert not {"same", "inner"} & set(sys.modules)


def test_packages_beside_the_file_are_forgotten_with_their_submodules(tmp_path: Path):
    write(tmp_path, {"pack/__init__.py": "", "pack/a.py": "X = 1", "spaces/b.py": "import json.tool\nX = 2"})

    with prefer_modules_in(tmp_path):
        assert load("pack.a:X") == 1
        assert load("spaces.b:X") == 2

    assert not {"pack", "pack.a", "spaces", "spaces.b"} & set(sys.modules)
    assert "json" in sys.modules


def test_modules_of_an_environment_below_the_directory_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, {"venv/lib/installed_below.py": "", "main.py": "import installed_below\nX = 1"})
    monkeypatch.syspath_prepend(tmp_path / "venv/lib")

    with prefer_modules_in(tmp_path):
        load("main:X")

    assert "main" not in sys.modules
    assert sys.modules.pop("installed_below")


def test_modules_are_kept_until_the_outermost_block_for_a_directory_is_left(tmp_path: Path):
    write(tmp_path, {"counted.py": "X = object()"})

    with prefer_modules_in(tmp_path):
        with prefer_modules_in(tmp_path):
            first = load("counted:X")
        assert load("counted:X") is first

    assert "counted" not in sys.modules


def test_a_package_that_was_imported_before_is_kept_whole(site: Path):
    write(site, {"early/__init__.py": "", "early/late.py": "X = 1"})
    load("early:__name__")

    with prefer_modules_in(site):
        load("early.late:X")

    assert {"early", "early.late"} <= set(sys.modules)


def test_modules_are_forgotten_when_the_block_ends_in_an_error(tmp_path: Path):
    write(tmp_path, {"left.py": "import json\nX = 1\n1 / 0"})
    path = list(sys.path)

    with pytest.raises(InputError), prefer_modules_in(tmp_path):
        load("left:X")

    assert sys.path == path
    assert "left" not in sys.modules


def test_a_module_of_the_same_name_from_elsewhere_is_never_used_instead(tmp_path: Path):
    elsewhere = write(tmp_path / "elsewhere", {"shared.py": "X = 'elsewhere'"})
    here = write(tmp_path / "here", {"shared.py": "X = 'here'", "main.py": "import shared\nX = shared.X"})

    with prefer_modules_in(elsewhere):
        load("shared:X")
        with (
            prefer_modules_in(here),
            pytest.raises(InputError, match=r"is already imported from .*elsewhere/shared\.py; rename it"),
        ):
            load("main:X")


def test_a_module_that_is_not_there_is_told_with_the_closest_beside_the_file(tmp_path: Path):
    write(tmp_path, {"digits.py": ""})

    with prefer_modules_in(tmp_path), pytest.raises(InputError, match=r"no module 'digit' in .*did you mean 'digits'"):
        load("digit:teacher")


def test_an_attribute_that_is_not_there_is_told_with_the_closest(tmp_path: Path):
    write(tmp_path, {"digits.py": "class Net:\n    def build(): ..."})

    with prefer_modules_in(tmp_path):
        with pytest.raises(InputError, match=r"digits has no 'Nett'; did you mean 'Net'\?"):
            load("digits:Nett")
        with pytest.raises(InputError, match=r"has no 'biuld'; did you mean 'build'\?"):
            load("digits:Net.biuld")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("x = 1\nraise RuntimeError('operator nms does not exist')", "RuntimeError: operator nms does not exist"),
        ("x = 1\nimport sys; sys.exit(3)", "SystemExit: 3"),
        ("x = 1\nfrom json import nothing", "ImportError: cannot import name 'nothing'"),
        ("x = 1\nraise ModuleNotFoundError('by hand')", "ModuleNotFoundError: by hand"),
    ],
)
def test_an_error_at_import_is_told_with_its_last_line_and_place(tmp_path: Path, source: str, error: str):
    write(tmp_path, {"digits.py": source})

    with prefer_modules_in(tmp_path), pytest.raises(InputError) as raised:
        load("digits:teacher")

    assert str(raised.value).startswith(f"importing digits raised {error}")
    assert str(raised.value).endswith(f"({tmp_path / 'digits.py'}:2)")
    assert raised.value.__cause__ is not None


def test_a_syntax_error_is_told_with_its_file(tmp_path: Path):
    write(tmp_path, {"digits.py": "def teacher(:"})

    with (
        prefer_modules_in(tmp_path),
        pytest.raises(InputError, match=r"importing digits raised SyntaxError.*digits\.py"),
    ):
        load("digits:teacher")


@pytest.mark.parametrize(
    ("source", "what"),
    [("import no_such_package", "importing digits"), ("def task():\n    import no_such_package", "digits:task")],
)
def test_a_package_that_the_users_code_needs_and_is_not_installed_is_the_hosts_fault(
    tmp_path: Path, source: str, what: str
):
    write(tmp_path, {"digits.py": source})

    with (
        prefer_modules_in(tmp_path),
        pytest.raises(HostError, match=f"{what} needs the module 'no_such_package', which must be"),
    ):
        Reference(factory="digits:task").call()


def test_a_linked_module_beside_the_file_is_forgotten_too(tmp_path: Path):
    write(tmp_path / "elsewhere", {"original.py": "X = 1"})
    (tmp_path / "here").mkdir()
    (tmp_path / "here/linked.py").symlink_to(tmp_path / "elsewhere/original.py")

    with prefer_modules_in(tmp_path / "here"):
        assert load("linked:X") == 1

    assert "linked" not in sys.modules


def test_a_reference_is_called_with_its_arguments_and_paths(tmp_path: Path):
    write(tmp_path, {"digits.py": "def task(**arguments): return arguments"})
    reference = Reference(factory="digits:task", size=8, data_dir="/data", label_file=None)

    with prefer_modules_in(tmp_path):
        assert reference.call() == {"size": 8, "data_dir": Path("/data"), "label_file": None}
        assert reference.without("size").call() == {"data_dir": Path("/data"), "label_file": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_dri": 1}, r"digits:task\(data_dir, size=8\) does not fit the arguments .*missing .*'data_dir'"),
        ({"data_dir": "x", "siez": 1}, r"does not fit the arguments .*unexpected keyword argument 'siez'"),
    ],
)
def test_arguments_that_do_not_fit_are_told_with_the_signature(
    tmp_path: Path, arguments: dict[str, object], message: str
):
    write(tmp_path, {"digits.py": "import functools\n@functools.lru_cache\ndef task(data_dir, size=8): ..."})

    with prefer_modules_in(tmp_path), pytest.raises(InputError, match=message):
        Reference(factory="digits:task", **arguments).call()


def test_an_error_within_the_callable_is_told_with_its_type_and_the_users_line(tmp_path: Path):
    inner = "import json\ndef read():\n    return json.loads('{')"
    write(tmp_path, {"digits.py": "import inner\ndef task():\n    return inner.read()", "inner.py": inner})

    with prefer_modules_in(tmp_path), pytest.raises(InputError) as raised:
        Reference(factory="digits:task").call()

    assert str(raised.value).startswith("digits:task raised JSONDecodeError: Expecting property name")
    assert str(raised.value).endswith(f"({tmp_path / 'inner.py'}:3)")


def test_a_type_error_within_the_callable_is_not_taken_for_wrong_arguments(tmp_path: Path):
    write(tmp_path, {"digits.py": "def task():\n    return 1 + 'a'"})

    with (
        prefer_modules_in(tmp_path),
        pytest.raises(InputError, match="digits:task raised TypeError: unsupported operand"),
    ):
        Reference(factory="digits:task").call()


@pytest.mark.parametrize("error", ["MemoryError()", "KeyboardInterrupt()", "HostError('disk')"])
def test_what_is_not_the_users_fault_passes_unchanged(tmp_path: Path, error: str):
    write(tmp_path, {"digits.py": f"from compressor.errors import HostError\ndef task():\n    raise {error}"})

    with prefer_modules_in(tmp_path), pytest.raises((MemoryError, KeyboardInterrupt, HostError)):
        Reference(factory="digits:task").call()


def test_what_is_not_callable_is_told(tmp_path: Path):
    write(tmp_path, {"digits.py": "task = 3"})

    with prefer_modules_in(tmp_path), pytest.raises(InputError, match="digits:task must be callable, got int"):
        Reference(factory="digits:task").call()


@pytest.mark.parametrize(
    "name", ["digits", "digits:", ":task", "a.b", "digits:task:x", "../x:y", "digits:task\n", "é b:c"]
)
def test_a_factory_has_the_form_module_attribute(name: str):
    with pytest.raises(ValueError, match="must be module:attribute, such as digits:teacher"):
        Reference(factory=name)


def test_source_files_are_the_users_modules_and_all_files_of_an_installed_package(tmp_path: Path):
    write(tmp_path, {"digits.py": "import nets, numpy", "nets.py": "", "unused.py": "raise SystemExit"})

    with prefer_modules_in(tmp_path):
        assert source_files("digits:task") == (tmp_path / "digits.py", tmp_path / "nets.py")
        installed = {file.name for file in source_files("json.decoder:JSONDecoder")}
        assert {"__init__.py", "decoder.py", "encoder.py"} <= installed
        assert source_files("math:sqrt") == ()
        with pytest.raises(InputError, match="no module 'digit'"):
            source_files("digit:task")
    assert "digits" not in sys.modules


def test_an_installed_package_offers_stages_beside_the_built_in_ones(site: Path):
    source = 'raise SystemExit\nclass LowRank:\n    """Factor each matrix."""'
    install(site, "acme", "low_rank = acme.stages.low_rank:LowRank", {"acme/stages/low_rank.py": source})

    assert stage_names()["low_rank"] == "acme.stages.low_rank:LowRank"
    listed = {stage.name: stage for stage in describe_stages()}
    assert listed["low_rank"].origin == "acme 1.2"
    assert listed["low_rank"].summary == "Factor each matrix."
    assert listed["magnitude_pruning"].summary.startswith("Remove the channels")
    assert "acme" not in sys.modules


def test_two_packages_that_offer_a_stage_of_one_name_are_refused(site: Path):
    install(site, "acme", "low_rank = acme:LowRank", {})
    install(site, "emca", "low_rank = emca:LowRank", {})

    with pytest.raises(HostError, match=r"two packages offer a stage 'low_rank': .*uninstall one of them"):
        stage_names()


def test_listing_stages_imports_neither_torch_nor_any_stage():
    code = (
        "import sys, compressor.config.pipeline_file, compressor.config.installed_stages as installed\n"
        "assert installed.describe_stages()\n"
        "assert not {'torch', 'onnxruntime', 'compressor.stages'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
