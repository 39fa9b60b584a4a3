import logging
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from compressor.config.pipeline_file import load
from compressor.models.soft_label_file import SoftLabelFile
from compressor.report.json import read_report
from compressor.run.pipeline import run
from compressor.run.store import Store
from processes import run_python

CODE = """
import os
import signal
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from compressor import Augmentation, Samples, Task


def network(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )


def mirrored(inputs, uniform):
    if len(list(Path("runs/small/work").glob("*/shards/*/*.logits"))) >= float(os.environ.get("FATAL_SHARDS", "inf")):
        os.kill(os.getpid(), signal.SIGKILL)
    return (torch.where(uniform[:, :, None, None] < 0.5, inputs[0], inputs[0].flip(-1)),)


def task():
    digits = load_digits()
    images = (torch.from_numpy(digits.images).float() / 16).unsqueeze(1)
    targets = torch.from_numpy(digits.target).long()

    def split(start, stop):
        return Samples((images[start:stop],), targets[start:stop])

    return Task(
        train=split(0, 700), validation=split(900, 1200), test=split(1200, 1797), calibration=split(0, 128),
        unlabeled=split(700, 900), example_inputs=(images[:2],), augmentation=Augmentation(1, mirrored),
    )
"""

PIPELINE = """
name: small
model: {factory: digits_code:network, width: 32}
task: {factory: digits_code:task}
stages:
  - {stage: training, epochs: 2, batch_size: 32}
  - {stage: soft_labels, views: 8}
  - stage: distillation
    student: {factory: digits_code:network}
    losses: {kd: {}, hard: {}}
    epochs: 2
    batch_size: 32
  - stage: magnitude_pruning
    pruning_ratio: 0.5
    recovery: {epochs: 1, batch_size: 32}
"""
CPU = torch.device("cpu")
KEY = "ab" * 32
"""Of a step that no pipeline has."""


def write_pipeline(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "digits_code.py").write_text(CODE)
    (directory / "small.yaml").write_text(PIPELINE)
    return directory / "small.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A pipeline that ran to its end: its report, its run directory and what it logged."""
    directory = tmp_path_factory.mktemp("finished")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("compressor")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        report = run(load(write_pipeline(directory)), directory / "runs/small", device=CPU, max_seconds=0)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return report, directory / "runs/small", lines


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished[1].parent, tmp_path / "runs")
    return write_pipeline(tmp_path), tmp_path / "runs/small"


def compress(file: Path, **environment: str) -> subprocess.CompletedProcess:
    return run_python("-m", "compressor", "run", "--max-seconds", "0", file, cwd=file.parent, **environment)


def labels_file(report, directory: Path) -> Path:
    (preparation,) = report.preparations
    return directory / "stages" / preparation.key / "artifact/soft_labels.safetensors"


def test_student_and_recovery_both_learn_from_the_soft_labels_and_say_so(finished):
    _, _, lines = finished
    read = "the teacher's answers are read from soft labels, views per sample: 8"
    assert f"distillation: {read}" in lines
    assert f"magnitude_pruning: {read}" in lines
    assert not any("runs live" in line for line in lines)
    (size,) = (line for line in lines if "samples in" in line)
    assert size == "soft_labels: 900 samples in 8 views: 0.1 MB"  # 900 * 8 * 10 * 2 B


def test_soft_labels_have_no_row_in_the_report_but_a_preparation(finished):
    report, directory, _ = finished
    assert [row.stage for row in report.rows] == ["training", "distillation", "magnitude_pruning"]
    (preparation,) = report.preparations
    assert (preparation.stage, preparation.reused) == ("soft_labels", False)
    assert preparation.settings == {"stage": "soft_labels", "views": 8, "top_k": 64}
    assert SoftLabelFile.open(labels_file(report, directory)).origin.samples == 900
    assert "- soft_labels took" in (directory / "report.md").read_text()


def test_report_keeps_each_loss_of_each_epoch_and_comes_back_from_json(finished):
    report, directory, _ = finished
    assert [[list(epoch) for epoch in row.losses] for row in report.rows] == [
        [["hard"]] * 2,
        [["kd", "hard"]] * 2,
        [["kd", "hard"]],
    ]
    first, last = report.rows[0].losses
    assert 0 < last["hard"] < first["hard"]
    assert read_report(directory / "report.json") == report


def test_work_directory_is_empty_after_a_finished_run(finished):
    _, directory, _ = finished
    assert list((directory / "work").iterdir()) == []


def test_second_run_takes_the_soft_labels_from_the_store(copy):
    file, directory = copy
    report = run(load(file), directory, device=CPU, max_seconds=0)
    assert all(row.reused for row in report.rows)
    assert report.preparations[0].reused
    assert "- soft_labels was taken from the store" in (directory / "report.md").read_text()


def test_losses_that_look_into_the_teacher_run_it_live_and_say_so(copy, caplog):
    file, directory = copy
    caplog.set_level(logging.INFO, logger="compressor")
    report = run(
        load(file, ["stages.2.losses={kd: {}, hint: {layers: {'2': '2'}}}"]), directory, device=CPU, max_seconds=0
    )
    lines = [record.getMessage() for record in caplog.records]
    assert "distillation: the teacher runs live, not from its soft labels: losses that look into it: hint" in lines
    assert list(report.rows[1].losses[0]) == ["kd", "hint"]


def test_work_that_other_settings_left_is_removed(copy):
    file, directory = copy
    left = Store(directory).workspace(KEY)
    (left / "shard").write_bytes(b"left by a killed run")
    run(load(file), directory, device=CPU, max_seconds=0)
    assert not left.exists()


def test_soft_labels_that_were_killed_go_on_at_the_shard_and_end_with_equal_bytes(finished, tmp_path):
    file = write_pipeline(tmp_path)
    expected_report, expected, _ = finished
    killed = compress(file, FATAL_SHARDS="2")
    assert killed.returncode == -signal.SIGKILL
    work = tmp_path / "runs/small/work"
    assert len(list(work.glob("*/shards/*/*.logits"))) == 2
    (directory,) = work.iterdir()
    assert directory.name == expected_report.preparations[0].key
    resumed = compress(file)
    assert resumed.returncode == 0, resumed.stderr
    assert "training: taken from the store" in resumed.stderr
    assert "soft_labels: 2 of 8 shards are there from an interrupted run" in resumed.stderr
    report = read_report(tmp_path / "runs/small/report.json")
    assert (
        labels_file(report, tmp_path / "runs/small").read_bytes() == labels_file(expected_report, expected).read_bytes()
    )
    assert (tmp_path / "runs/small/model.onnx").read_bytes() == (expected / "model.onnx").read_bytes()
    assert [row.losses for row in report.rows] == [row.losses for row in expected_report.rows]
    assert list(work.iterdir()) == []
