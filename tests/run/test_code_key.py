"""What a run takes from the store if the user's code or data changes: whatever it reads as code counts."""

import importlib.machinery
import os
from pathlib import Path

import pytest
import torch

from compressor.config.pipeline_file import load
from compressor.references.reference import prefer_modules_in
from compressor.references.source_code import code_digest
from compressor.run.keys import forecast
from compressor.run.pipeline import prepare
from compressor.run.store import Store

CODE = """
import importlib
import importlib.util
import os
import runpy
from pathlib import Path

import torch
from torch import nn
from compressor import Samples, Stage, StageContext, Task, TorchModel

HERE = Path(__file__).parent


def by_import_module():
    return importlib.import_module("".join(["hel", "per"])).activation


def by_spec():
    spec = importlib.util.spec_from_file_location("another_name", HERE / "helper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.activation


def by_runpy():
    return runpy.run_path(str(HERE / "helper.py"))["activation"]


def by_exec():
    names = {}
    exec((HERE / "helper.py").read_text(), names)
    return names["activation"]


def network(how):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), globals()[how]()(), nn.Linear(8, 3))


def task():
    inputs = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    for file in sorted((HERE / "data").glob("*.txt")):
        inputs[0] += float(file.read_text())
    def split(start):
        return Samples((inputs[start:start + 15],), torch.arange(15) % 3)
    parts = dict(train=split(0), validation=split(15), test=split(30), calibration=split(45))
    return Task(example_inputs=(inputs[:2],), **parts)


class Late(Stage[TorchModel, TorchModel]):
    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        by_import_module()
        return model
"""
HELPER = "from torch import nn\n\nactivation = nn.ReLU\n"
CPU = torch.device("cpu")


class Project:
    """A pipeline that was run once."""

    def __init__(self, directory: Path, how: str, stages: str = "{stage: training, epochs: 1}") -> None:
        self.directory = directory
        (directory / "own_code.py").write_text(CODE)
        self.write_helper(HELPER)
        (directory / "data").mkdir()
        (directory / "data/one.txt").write_text("0.5")
        pipeline = f"name: p\nmodel: {{factory: own_code:network, how: {how}}}\ntask: {{factory: own_code:task}}\n"
        (directory / "p.yaml").write_text(f"{pipeline}stages: [{stages}]\n")
        self.run()

    def write_helper(self, text: str) -> None:
        file = self.directory / "helper.py"
        file.write_text(text)
        # compiled code of the same second and size would stand for the source that it was made from
        Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)

    def run(self) -> None:
        prepare(load(self.directory / "p.yaml"), self.directory / "runs", device=CPU)

    @property
    def reused(self) -> list[bool]:
        """What `check` says of each step."""
        with prefer_modules_in(self.directory):
            steps = forecast(load(self.directory / "p.yaml"), Store(self.directory / "runs"), device="cpu")
        return [step.reused for step in steps]


@pytest.mark.parametrize("how", ["by_import_module", "by_spec", "by_runpy", "by_exec"])
def test_helper_that_no_import_shows_counts(how, tmp_path):
    project = Project(tmp_path, how)
    assert project.reused == [True]
    project.write_helper(HELPER.replace("ReLU", "Tanh"))
    assert project.reused == [False]


def test_helper_that_a_stage_reads_late_counts_and_repeats_nothing_by_itself(tmp_path):
    project = Project(tmp_path, "by_exec", "{stage: 'own_code:Late'}")
    assert project.reused == [True, True]
    project.write_helper(HELPER.replace("ReLU", "Tanh"))
    assert project.reused == [False, False]
    project.run()
    assert project.reused == [True, True]
    project.write_helper(HELPER)
    assert project.reused == [True, True]  # the first results are still there


def test_comments_docstrings_and_layout_of_user_code_do_not_count(tmp_path):
    project = Project(tmp_path, "by_exec")
    project.write_helper('"""Doc."""\nfrom torch import (\n    nn,\n)\nactivation = nn.ReLU  # rectified\n')
    changed = CODE.replace("def network(how):", 'def network(how):\n    """A network."""\n')
    (tmp_path / "own_code.py").write_text(f"# a comment\n{changed}\n# another\n")
    assert project.reused == [True]
    (tmp_path / "own_code.py").write_text(CODE.replace("Linear(8, 3)", "Linear(8, 4)"))
    assert project.reused == [False]


def test_check_sees_a_data_file_that_changed_and_one_that_is_new(tmp_path):
    project = Project(tmp_path, "by_exec")
    file = tmp_path / "data/one.txt"
    os.utime(file, (0, 0))
    assert project.reused == [True]  # touched, but what it holds is the same
    file.write_text("0.6")
    assert project.reused == [False]
    file.write_text("0.5")
    assert project.reused == [True]
    (tmp_path / "p.yaml").write_text(f"# {(tmp_path / 'p.yaml').read_text()}".replace("# ", "# a pipeline\n", 1))
    assert project.reused == [True]  # the pipeline file is no data
    (tmp_path / "data/two.txt").write_text("1")
    assert project.reused == [False]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("x = 1", "x   =   1  # one\n", True),
        ("def f():\n    return 1", 'def f():\n    """One."""\n\n    return (1)', True),
        ('class A:\n    b: int = 1\n    """An attribute."""', "class A:\n    b: int = 1", True),
        ("x = 1", "x = 2", False),
        ("x = 'a'", "x = 'b'", False),
        ("x = 1", "x = 1.0", False),
        ("x = 1", "x = True", False),
        ("if a:\n    b\n    c", "if a:\n    b\nc", False),
        ("x = (", "x = ( ", False),  # no Python: every byte counts
    ],
)
def test_code_is_what_it_does(one, other, equal, tmp_path):
    digests = []
    for text in (one, other):
        (tmp_path / "code.py").write_text(text)
        digests.append(code_digest(tmp_path / "code.py"))
    assert (digests[0] == digests[1]) is equal
