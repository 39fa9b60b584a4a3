import logging
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from compressor.cli.sensitivity_command import up_to_sensitivity
from compressor.config.pipeline_file import Pipeline, load
from compressor.errors import ConfigError
from compressor.records.sensitivity_curves import FILE_NAME, SensitivityCurves, read_sensitivity
from compressor.references.reference import prefer_modules_in
from compressor.run.keys import forecast
from compressor.run.pipeline import prepare, run
from compressor.run.store import Store
from processes import run_python

CODE = """
import torch
from sklearn.datasets import load_digits
from torch import nn

from compressor import Samples, Task


def network(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )


def task():
    digits = load_digits()
    images = (torch.from_numpy(digits.images).float() / 16).unsqueeze(1)
    targets = torch.from_numpy(digits.target).long()

    def split(start, stop):
        return Samples((images[start:stop],), targets[start:stop])

    return Task(
        train=split(0, 700), validation=split(900, 1200), test=split(1200, 1797), calibration=split(0, 128),
        example_inputs=(images[:2],),
    )
"""
STAGE = "compressor.stages.sensitivity:Sensitivity"
SENSITIVITY = f"  - {{stage: '{STAGE}', grid: [0.25, 0.75], samples: 100}}\n"
TRAINING = "  - {stage: training, epochs: 2, batch_size: 32}\n"
PRUNING = "  - {stage: magnitude_pruning, pruning_ratio: 0.5}\n"
HEAD = "name: small\nmodel: {factory: digits_code:network}\ntask: {factory: digits_code:task}\nstages:\n"
CPU = torch.device("cpu")


def write_pipeline(directory: Path, *stages: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "digits_code.py").write_text(CODE)
    (directory / "small.yaml").write_text(HEAD + "".join(stages))
    return directory / "small.yaml"


def logged(caplog) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def measure(pipeline: Pipeline, directory: Path) -> SensitivityCurves:
    return read_sensitivity(prepare(pipeline, directory, device=CPU) / FILE_NAME)


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="compressor")
    return caplog


def compress(file: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_python("-m", "compressor", *arguments, cwd=file.parent)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, SensitivityCurves]:
    """A pipeline with the stage, of which nothing but the sensitivity was asked."""
    directory = tmp_path_factory.mktemp("measured")
    file = write_pipeline(directory, TRAINING, SENSITIVITY, PRUNING)
    return directory, measure(up_to_sensitivity(load(file)), directory / "runs/small")


@pytest.fixture
def copy(measured, tmp_path) -> tuple[Path, Path]:
    """A pipeline file and a run directory that a test may change."""
    shutil.copytree(measured[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "small.yaml", tmp_path / "runs/small"


def test_only_what_the_sensitivity_needs_is_computed(measured):
    directory, found = measured
    assert list(found.groups) == ["0", "3"]
    assert (found.ratios, found.samples) == ((0.25, 0.75), 100)
    files = {file.name for file in (directory / "runs/small").iterdir() if not file.name.startswith(".")}
    assert files == {"sensitivity.md", "sensitivity.svg", "stages", "drafts", "work"}
    assert len(list((directory / "runs/small/stages").iterdir())) == 2


def test_run_reuses_what_was_measured_and_shows_it(measured, copy, told):
    file, directory = copy
    for name in ("sensitivity.md", "sensitivity.svg"):
        (directory / name).unlink()
    with prefer_modules_in(file.parent):
        foreseen = forecast(load(file), Store(directory), device="cpu")
    assert [step.reused for step in foreseen] == [True, True, False]
    report = run(load(file), directory, device=CPU, max_seconds=0)
    assert [line for line in logged(told) if line.endswith("running")] == ["magnitude_pruning: running"]
    assert [row.stage for row in report.rows] == ["training", "magnitude_pruning"]
    (preparation,) = report.preparations
    assert (preparation.stage, preparation.reused) == (STAGE, True)
    stored = directory / "stages" / preparation.key / "artifact/sensitivity.json"
    assert read_sensitivity(stored) == measured[1]
    assert "| group | channels | 25 % | 75 % |" in (directory / "sensitivity.md").read_text()
    ET.fromstring((directory / "sensitivity.svg").read_text())


def test_sensitivity_is_not_measured_twice(measured, copy, told):
    file, directory = copy
    assert measure(up_to_sensitivity(load(file)), directory) == measured[1]
    assert logged(told) == ["training: taken from the store", f"{STAGE}: taken from the store"]


def test_damaged_sensitivity_in_the_store_is_measured_again(measured, copy, told):
    file, directory = copy
    (stored,) = directory.glob("stages/*/artifact/sensitivity.json")
    stored.write_text("{}")
    assert measure(up_to_sensitivity(load(file)), directory) == measured[1]
    assert any("artifact/sensitivity.json has changed; moved to" in line for line in logged(told))


def test_command_measures_the_model_that_is_pruned_and_the_stage_takes_it_from_the_store(tmp_path):
    file = write_pipeline(tmp_path, TRAINING, PRUNING)
    first = compress(file, "sensitivity", str(file))
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[1].split()[:4] == ["group", "channels", "10", "%"]
    assert [line.split()[:2] for line in lines[3:5]] == [["0", "16"], ["3", "16"]]
    assert lines[-2:] == ["runs/small/sensitivity.md", "runs/small/sensitivity.svg"]
    assert "sensitivity: running" in first.stderr
    write_pipeline(tmp_path, TRAINING, "  - stage: sensitivity\n", PRUNING)
    second = compress(file, "run", "--max-seconds", "0", str(file))
    assert second.returncode == 0, second.stderr
    assert "training: taken from the store" in second.stderr
    assert "sensitivity: taken from the store" in second.stderr
    assert "magnitude_pruning: running" in second.stderr


def test_pipeline_that_prunes_nothing_exits_2(tmp_path):
    file = write_pipeline(tmp_path, TRAINING)
    finished = compress(file, "sensitivity", str(file))
    assert finished.returncode == 2
    assert "sensitivity is measured at a stage sensitivity or magnitude_pruning, of which there are: none" in (
        finished.stderr
    )
    assert not (tmp_path / "runs").exists()


def names(file: Path, stage: int | None = None) -> list[str]:
    return [planned.name for planned in up_to_sensitivity(load(file), stage=stage).stages]


def test_chosen_stage_is_the_one_measured(tmp_path):
    file = write_pipeline(tmp_path, PRUNING, TRAINING, "  - {stage: soft_labels}\n", PRUNING, SENSITIVITY)
    assert names(file) == ["magnitude_pruning", "training", "soft_labels", "magnitude_pruning", STAGE]
    assert names(file, 0) == ["sensitivity"]
    assert names(file, 3) == ["magnitude_pruning", "training", "soft_labels", "sensitivity"]
    with pytest.raises(ConfigError, match=r"are: 0 \(magnitude_pruning\), 3 \(.*\), 4 \(.*\); asked for 1"):
        names(file, 1)


def test_pruning_is_measured_by_the_stage_before_it_also_where_another_keeps_the_model_between(tmp_path):
    file = write_pipeline(tmp_path, TRAINING, SENSITIVITY, "  - {stage: soft_labels}\n", PRUNING)
    assert names(file, 3) == names(file) == ["training", STAGE]
