import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch

from compressor.models.artifact import TorchModel
from compressor.models.soft_label_file import SoftLabelFile
from compressor.references.reference import Reference, prefer_modules_in
from compressor.report.json import read_report
from compressor.training.sampling import TrainingData
from distillation.test_answering import SHIFTED, CountingNetwork, answered
from processes import run_two

TESTS = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
"""Where a process finds what tests import."""

CODE = """
import time
from typing import ClassVar, final

import torch
from sklearn.datasets import load_digits
from torch import nn

from compressor import Augmentation, Samples, Task
from compressor.models.artifact import TorchModel
from compressor.system.processes import broadcast, processes
from compressor.stage import Stage, StageContext


def network(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )


def mirrored(inputs, uniform):
    return (torch.where(uniform[:, :, None, None] < 0.5, inputs[0], inputs[0].flip(-1)),)


def task():
    digits = load_digits()
    images = (torch.from_numpy(digits.images).float() / 16).unsqueeze(1)
    targets = torch.from_numpy(digits.target).long()

    def split(start, stop):
        return Samples((images[start:stop],), targets[start:stop])

    return Task(
        train=split(0, 901), validation=split(901, 1200), test=split(1200, 1797), calibration=split(0, 128),
        example_inputs=(images[:2],), augmentation=Augmentation(1, mirrored),
    )


@final
class SlowReader(Stage[TorchModel, TorchModel]):
    '''The second process is late to read what the main one wrote.'''

    keeps_model: ClassVar[bool] = True

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        group = processes(context.device)
        file = context.work_dir / "note"
        if group.is_main_process:
            file.write_text("read me")
        file = broadcast(file)
        time.sleep(group.process_index)
        file.read_text()
        return model
"""

PIPELINE = """
name: small
model: {factory: digits_code:network, width: 32}
task: {factory: digits_code:task}
stages:
  - {stage: training, epochs: 2, batch_size: 32}
  - {stage: "digits_code:SlowReader"}
  - {stage: soft_labels, views: 2}
  - {stage: distillation, student: {factory: digits_code:network}, epochs: 2, batch_size: 32}
  - {stage: magnitude_pruning, pruning_ratio: 0.5, recovery: {epochs: 1, batch_size: 32}}
  - {stage: int8_ptq, calibration_samples: 64}
  - {stage: onnx_export}
gate: {size_ratio: {min: 3}}
"""

ANSWERS = """
import json
import os
import sys
from pathlib import Path

from conftest import digits_task
from distillation.test_answering import CountingNetwork
from system.test_processes import labels_of

labels = labels_of(digits_task.__wrapped__(), Path(sys.argv[1]), bias=float(sys.argv[2]))
found = {"calls": CountingNetwork.calls, "labels": str(labels.path)}
(Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


def labels_of(digits_task, directory: Path, *, bias: float = 0.0) -> SoftLabelFile:
    """What a network that counts its calls says to two views of the digits."""
    torch.manual_seed(0)
    model = TorchModel(CountingNetwork().eval(), Reference(factory="networks:counting"))
    with torch.no_grad():
        model.module.head.bias.add_(bias)
    return answered(model, replace(digits_task, augmentation=SHIFTED), directory, views=2).attachment(SoftLabelFile)


def torchrun(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run two processes of one program to their end, under torch's launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": TESTS, "OMP_NUM_THREADS": "1"}
    command = [*launcher, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=PIPE, stderr=PIPE, text=True)
    try:
        output, errors = process.communicate()
    finally:
        process.terminate()  # if pytest ends a test that hangs: the launcher ends the processes that it started
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def write_pipeline(directory: Path) -> Path:
    (directory / "digits_code.py").write_text(CODE)
    (directory / "small.yaml").write_text(PIPELINE)
    return directory / "small.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A pipeline that two processes carried out: how each ended, and its directory."""
    directory = tmp_path_factory.mktemp("two")
    file = write_pipeline(directory)
    return run_two("-m", "compressor", "run", "--max-seconds", "0", file, cwd=directory), directory


def test_two_processes_run_a_pipeline_to_its_end_and_print_one_table(finished):
    (main, other), directory = finished
    assert main.returncode == 0, main.stderr
    assert other.returncode == 0, other.stderr
    table, _, _ = main.stdout.partition("\n\n")
    head, _rule, *rows = table.splitlines()
    stages = ["training", "distillation", "magnitude_pruning", "int8_ptq", "onnx_export"]
    assert [row.split()[0] for row in rows] == stages
    assert main.stdout.count(head) == 1
    assert main.stdout.splitlines()[-1] == "runs/small/report.json"
    assert other.stdout == ""
    (report_file,) = directory.rglob("report.json")
    assert [row.stage for row in read_report(report_file).rows] == stages
    assert list((directory / "runs/small/work").iterdir()) == []


def test_one_of_two_processes_speaks_and_none_warns(finished):
    (main, other), _ = finished
    errors = main.stderr + other.stderr
    lines = errors.splitlines()
    assert sum(line.startswith("training: epoch 2/2") for line in lines) == 1
    assert lines.count("distillation: the teacher's answers are read from soft labels, views per sample: 2") == 1
    assert "magnitude_pruning: the teacher's answers are read from soft labels, views per sample: 2" in lines
    assert "Warning" not in errors
    assert "Traceback" not in errors


def test_soft_labels_of_two_processes_are_what_the_teacher_says_in_one(finished):
    _, directory = finished
    *_, preparation = read_report(directory / "runs/small/report.json").preparations
    assert preparation.stage == "soft_labels"
    with prefer_modules_in(directory):
        from digits_code import task as make_task  # noqa: PLC0415  # written by this test

        task = make_task()
        model = TorchModel.load(directory / "runs/small/stages" / preparation.key / "artifact")
    rows = np.arange(901)  # odd, so that one process has a sample more
    data = TrainingData(task.train, augmentation=task.augmentation, seed=0)
    for view in (0, 1):
        live = model.predict(data.view(task.train.inputs, rows, view))
        stored = model.attachment(SoftLabelFile).read(rows, view)["logits"][:, 0]
        # float16's rounding, and float32's in batches of another size
        torch.testing.assert_close(stored, live, rtol=2**-11, atol=1e-5)


def test_processes_share_each_shard_and_open_one_file(digits_task, tmp_path):
    (tmp_path / "answers.py").write_text(ANSWERS)
    for ended in run_two(tmp_path / "answers.py", tmp_path, "0", cwd=tmp_path, PYTHONPATH=TESTS):
        assert ended.returncode == 0, ended.stderr
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert main["calls"] == [256, 256, 117] * 2  # half of 1257 samples, in each of two views
    assert other["calls"] == [256, 256, 116] * 2
    assert main["labels"] == other["labels"]
    alone = labels_of(digits_task, tmp_path / "alone")
    CountingNetwork.calls.clear()
    together = SoftLabelFile.open(Path(main["labels"]))
    assert together.origin == alone.origin
    rows = np.arange(1257)
    for view in (0, 1):
        # a last place of float32 in batches of another size, which may round to the next float16
        torch.testing.assert_close(
            together.read(rows, view)["logits"], alone.read(rows, view)["logits"], rtol=2**-10, atol=1e-5
        )


def test_failure_of_the_main_process_alone_ends_both(tmp_path):
    (tmp_path / "answers.py").write_text(ANSWERS)
    ended = torchrun(tmp_path / "answers.py", tmp_path, "1e6", cwd=tmp_path)
    assert ended.returncode == 1
    assert "logits of the teacher must lie within ±65504" in ended.stderr
    assert not list(tmp_path.glob("*.json"))


def test_unmet_gate_is_told_by_the_main_process(finished):
    _, directory = finished
    arguments = ("run", "--max-seconds", "0", "small.yaml", "--set", "gate.size_ratio.min=1000")
    ended = run_two("-m", "compressor", *arguments, cwd=directory)
    assert [one.returncode for one in ended] == [3, 0]
    assert sum(one.stdout.count("size_ratio must be >= 1000") for one in ended) == 1
    assert json.loads((directory / "runs/small/outcome.json").read_text())["exit_code"] == 3


def test_fault_of_the_pipeline_file_ends_both_processes(tmp_path):
    ended = torchrun(
        "-m",
        "compressor",
        "run",
        "--max-seconds",
        "0",
        write_pipeline(tmp_path),
        "--set",
        "stages.0.epochs=many",
        cwd=tmp_path,
    )
    assert ended.returncode == 1
    assert "exitcode  : 2" in ended.stderr
    assert "stages.0.epochs must be an integer, got 'many'" in ended.stderr
    assert not (tmp_path / "runs").exists()
