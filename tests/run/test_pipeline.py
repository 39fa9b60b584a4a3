import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score

from compressor.config.pipeline_file import load
from compressor.errors import InputError, LockedError
from compressor.report.json import read_report
from compressor.report.page.html import to_html
from compressor.run.pipeline import run
from compressor.run.store import Store
from processes import Child, start_python

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


def seven_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


def task(samples=900):
    digits = load_digits()
    images = (torch.from_numpy(digits.images).float() / 16).unsqueeze(1)
    targets = torch.from_numpy(digits.target).long()

    def split(start, stop):
        return Samples((images[start:stop],), targets[start:stop])

    return Task(
        train=split(0, samples), validation=split(900, 1200), test=split(1200, 1797), calibration=split(0, 128),
        example_inputs=(images[:2],), labels=("zero", *"123456789"),
    )
"""

PIPELINE = """
name: small
model: {factory: digits_code:network, width: 32}
task: {factory: digits_code:task}
stages:
  - {stage: training, epochs: 4, batch_size: 32, optimizer: {learning_rate: 5.0e-3}}
  - stage: distillation
    student: {factory: digits_code:network}
    epochs: 4
    batch_size: 32
    optimizer: {learning_rate: 5.0e-3}
  - stage: magnitude_pruning
    pruning_ratio: 0.5
    recovery: {epochs: 3, batch_size: 32, optimizer: {learning_rate: 5.0e-3}}
  - {stage: int8_ptq, calibration_samples: 64}
  - {stage: onnx_export}
gate: {size_ratio: {min: 3}}
"""
STAGES = ["training", "distillation", "magnitude_pruning", "int8_ptq", "onnx_export"]
CPU = torch.device("cpu")


def write_pipeline(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "digits_code.py").write_text(CODE)
    (directory / "small.yaml").write_text(PIPELINE)
    return directory / "small.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A pipeline that ran to its end: its file and its run directory."""
    directory = tmp_path_factory.mktemp("finished")
    file = write_pipeline(directory)
    run(load(file), directory / "runs/small", device=CPU, max_seconds=0)
    return file, directory / "runs/small"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run that a test may damage."""
    _file, run_directory = finished
    shutil.copytree(run_directory.parent, tmp_path / "runs")
    return write_pipeline(tmp_path), tmp_path / "runs/small"


def compress(*arguments: str | Path, cwd: Path) -> Child:
    return start_python("-m", "compressor", *arguments, cwd=cwd)


def reused(report) -> dict[str, bool]:
    return {row.stage: row.reused for row in report.rows}


def test_chain_ends_in_a_small_int8_file_that_runs(finished):
    _, directory = finished
    report = read_report(directory / "report.json")
    assert [row.stage for row in report.rows] == STAGES
    first, last = report.rows[0].measurement, report.rows[-1].measurement
    assert first.size_bytes / last.size_bytes > 3
    assert (directory / "model.onnx").stat().st_size == last.size_bytes
    assert last.metrics["accuracy"] > 0.5
    assert [verdict.status for verdict in report.verdicts] == ["met"]
    assert json.loads((directory / "outcome.json").read_text())["exit_code"] == 0


def test_report_tells_how_true_each_model_stays_to_the_baseline(finished):
    _, directory = finished
    report = read_report(directory / "report.json")
    rows = report.rows
    assert report.labels == ("zero", *"123456789")
    digits = load_digits()
    images, targets = (digits.images[1200:] / 16).astype(np.float32)[:, None], digits.target[1200:]
    answers = []
    for row in rows:
        session = InferenceSession(directory / row.model_file, providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {session.get_inputs()[0].name: images})[0].argmax(axis=1))
    for row, answer in zip(rows, answers, strict=True):
        assert row.quality.top_k[1] == row.measurement.metrics["accuracy"] == (answer == targets).mean()
        assert row.quality.macro_f1 == pytest.approx(f1_score(targets, answer, average="macro"))
    assert rows[0].fidelity is None
    assert [row.fidelity.agreement for row in rows[1:]] == [(answer == answers[0]).mean() for answer in answers[1:]]
    assert rows[-1].fidelity.kl_divergence > 0
    assert rows[-1].fidelity == rows[-2].fidelity  # the export delivers the quantized model
    assert "## What compression changed" in (directory / "report.md").read_text()


def test_report_has_the_channels_that_each_layer_keeps(finished):
    _, directory = finished
    _, distilled, pruned, int8, _ = read_report(directory / "report.json").rows
    assert distilled.channels == {"0": 16, "3": 16, "8": 10}
    assert pruned.channels == {"0": 8, "3": 8, "8": 10}
    assert int8.channels == {}  # an ONNX file


def test_page_is_that_of_the_report(finished):
    _, directory = finished
    page = (directory / "report.html").read_text()
    assert page == to_html(read_report(directory / "report.json"))
    assert "magnitude_pruning: channels that each layer keeps" in page


def test_only_the_baseline_keeps_its_outputs(finished):
    _, directory = finished
    baseline, *_ = read_report(directory / "report.json").rows
    (kept,) = directory.glob("stages/*/test_outputs.npy")
    assert kept.parent.name == baseline.key
    assert np.load(kept, allow_pickle=False).shape == (597, 10)


def test_second_run_takes_every_stage_from_the_store_and_delivers_the_same_bytes(copy):
    file, directory = copy
    before = (directory / "model.onnx").read_bytes()
    (directory / "model.onnx").unlink()
    report = run(load(file), directory, device=CPU, max_seconds=0)
    assert all(row.reused for row in report.rows)
    assert (directory / "model.onnx").read_bytes() == before


def test_changed_setting_runs_that_stage_and_those_after_it(copy):
    file, directory = copy
    report = run(load(file, ["stages.3.calibration_samples=32"]), directory, device=CPU, max_seconds=0)
    assert [name for name, was_reused in reused(report).items() if not was_reused] == ["int8_ptq", "onnx_export"]
    assert report.overrides == ("stages.3.calibration_samples=32",)


def test_flipped_bit_rebuilds_that_stage_alone_with_the_same_bytes(copy):
    file, directory = copy
    before = (directory / "model.onnx").read_bytes()
    pruned = read_report(directory / "report.json").rows[2]
    weights = directory / "stages" / pruned.key / "artifact/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    report = run(load(file), directory, device=CPU, max_seconds=0)
    assert [name for name, was_reused in reused(report).items() if not was_reused] == ["magnitude_pruning"]
    assert bytearray(weights.read_bytes()) != content
    assert (directory / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("nn.ReLU(),\n        nn.MaxPool2d", "nn.Tanh(),\n        nn.MaxPool2d", id="model-code"),
        pytest.param("split(0, samples)", "split(1, samples)", id="data"),
    ],
)
def test_changed_code_or_data_leaves_nothing_to_reuse(copy, old, new):
    file, directory = copy
    code = file.with_name("digits_code.py")
    assert old in CODE
    code.write_text(CODE.replace(old, new))
    checked = compress("check", file, "--runs", directory.parent, cwd=file.parent)
    plan = checked.finish().stdout
    assert "stored" not in plan
    assert "changed" in plan


def test_check_says_what_is_stored_and_why_the_rest_runs(copy):
    file, directory = copy
    checked = compress(
        "check", file, "--runs", directory.parent, "--set", "stages.2.pruning_ratio=0.25", cwd=file.parent
    )
    ended = checked.finish()
    assert ended.returncode == 0, ended.stderr
    lines = [line.split(maxsplit=1) for line in ended.stdout.splitlines()]
    assert [name for name, _ in lines] == STAGES
    assert lines[0][1] == lines[1][1] == "stored"
    assert "settings changed: pruning_ratio" in lines[2][1]
    assert "an earlier stage runs" in lines[3][1]


def test_killed_run_goes_on_and_ends_with_the_same_bytes(finished, tmp_path):
    file = write_pipeline(tmp_path)
    killed_in = []
    for stage in ("training: epoch 2", "distillation: running", "int8_ptq: running"):
        process = compress("run", "--max-seconds", "0", file, cwd=tmp_path)
        for line in process.stderr:
            if line.startswith(stage):
                break
        process.send_signal(signal.SIGKILL)
        assert process.finish().returncode == -signal.SIGKILL
        killed_in.append(stage)
    resumed = compress("run", "--max-seconds", "0", file, cwd=tmp_path).finish()
    assert resumed.returncode == 0, resumed.stderr
    assert "training: taken from the store" in resumed.stderr
    assert "magnitude_pruning: taken from the store" in resumed.stderr
    expected = finished[1] / "model.onnx"
    assert (tmp_path / "runs/small/model.onnx").read_bytes() == expected.read_bytes()
    assert list((tmp_path / "runs/small/drafts").iterdir()) == []


def test_termination_ends_with_143_and_can_be_resumed(tmp_path):
    file = write_pipeline(tmp_path)
    process = compress("run", "--max-seconds", "0", file, "--set", "stages.0.epochs=500", cwd=tmp_path)
    for line in process.stderr:
        if line.startswith("training: epoch 1"):
            break
    process.send_signal(signal.SIGTERM)
    ended = process.finish()
    assert ended.returncode == 143
    assert "the same command goes on" in ended.stderr
    outcome = json.loads((tmp_path / "runs/small/outcome.json").read_text())
    assert (outcome["status"], outcome["exit_code"]) == ("failed", 143)
    assert list((tmp_path / "runs/small/drafts").iterdir()) == []


def test_second_run_in_a_directory_in_use_exits_8_naming_the_holder(copy):
    file, directory = copy
    with Store(directory).lock():
        ended = compress("run", "--max-seconds", "0", file, "--runs", directory.parent, cwd=file.parent).finish()
    assert ended.returncode == 8
    assert f"process {os.getpid()}" in ended.stderr
    assert json.loads((directory / "outcome.json").read_text())["exit_code"] == 0  # still that of the finished run


def test_unmet_gate_exits_3_and_says_by_how_much(copy):
    file, directory = copy
    process = compress(
        "run",
        "--max-seconds",
        "0",
        file,
        "--runs",
        directory.parent,
        "--set",
        "gate.size_ratio.min=1000",
        cwd=file.parent,
    )
    ended = process.finish()
    assert ended.returncode == 3, ended.stderr
    assert "short" in ended.stdout
    assert ended.stdout.splitlines()[-1].endswith("report.json")


def test_run_in_github_actions_fills_the_summary_and_annotates_an_unmet_gate(copy, monkeypatch):
    file, directory = copy
    summary, junit = directory / "summary.md", directory / "run.xml"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    arguments = ("--runs", directory.parent, "--set", "gate.size_ratio.min=1000", "--junit", junit)
    ended = compress("run", "--max-seconds", "0", file, *arguments, cwd=file.parent).finish()
    assert ended.returncode == 3, ended.stderr
    assert summary.read_text() == (directory / "report.md").read_text()
    assert ended.stderr.splitlines()[-1].startswith("::error title=size_ratio::unmet: size_ratio must be >= 1000, got ")
    (suite,) = ElementTree.parse(junit).getroot()
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("small", "1", "1")


def test_json_report_is_all_of_standard_output(copy):
    file, directory = copy
    ended = compress("run", "--max-seconds", "0", file, "--runs", directory.parent, "--json", cwd=file.parent).finish()
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["pipeline"] == "small"


def test_student_of_other_classes_is_refused_before_any_training(tmp_path):
    file = write_pipeline(tmp_path)
    pipeline = load(file, ["stages.1.student.factory=digits_code:seven_classes"])
    started = time.monotonic()
    with pytest.raises(InputError, match=r"digits_code:seven_classes must give outputs .* \(2, 10\), got \(2, 7\)"):
        run(pipeline, tmp_path / "runs", device=CPU, max_seconds=0)
    assert not list((tmp_path / "runs").glob("stages/*")), time.monotonic() - started


def test_model_of_complex_outputs_is_refused(tmp_path):
    file = write_pipeline(tmp_path)
    code = CODE.replace(
        "def network(width=16):\n    return nn.Sequential(", "def network(width=16):\n    return Turned("
    )
    file.with_name("digits_code.py").write_text(
        code + "\n\nclass Turned(nn.Sequential):\n    def forward(self, x):\n        return super().forward(x) * 1j\n"
    )
    with pytest.raises(InputError, match=r"network must return real numbers, got torch\.complex64"):
        run(load(file), tmp_path / "runs", device=CPU, max_seconds=0)


def test_error_in_user_code_is_an_input_error_that_names_the_line(tmp_path):
    file = write_pipeline(tmp_path)
    file.with_name("digits_code.py").write_text(CODE.replace("digits = load_digits()", "digits = load_digits(0)"))
    with pytest.raises(InputError, match=r"digits_code\.py:\d+"):
        run(load(file), tmp_path / "runs", device=CPU, max_seconds=0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("nn.MaxPool2d(2), nn.Flatten()", "nn.MaxPool2d(2), Broken(), nn.Flatten()", id="forward"),
        pytest.param("Samples((images[start:stop],), targets[start:stop])", "OneByOne()", id="data-set"),
    ],
)
def test_error_in_user_code_during_a_run_names_the_line(tmp_path, old, new):
    file = write_pipeline(tmp_path)
    code = (
        CODE.replace(old, new)
        + """

class Broken(nn.Module):
    def forward(self, x):
        if self.training:
            raise KeyError("broken")
        return x


class OneByOne(torch.utils.data.Dataset):
    def __len__(self):
        return 900

    def __getitem__(self, index):
        return torch.zeros(1, 8, 8), [1, 2][index]
"""
    )
    file.with_name("digits_code.py").write_text(code)
    ended = compress("run", "--max-seconds", "0", file, cwd=tmp_path).finish()
    assert ended.returncode == 5, ended.stderr
    assert re.search(r"digits_code\.py:\d+ raised (KeyError|IndexError)", ended.stderr)
    assert "Traceback" not in ended.stderr


def test_calibration_on_test_samples_is_refused(tmp_path):
    file = write_pipeline(tmp_path)
    file.with_name("digits_code.py").write_text(
        CODE.replace("calibration=split(0, 128)", "calibration=split(1200, 1300)")
    )
    with pytest.raises(InputError, match="calibration must share no sample with test, got 100 in both"):
        run(load(file), tmp_path / "runs", device=CPU, max_seconds=0)


def test_lock_is_free_again_after_an_error(tmp_path):
    file = write_pipeline(tmp_path)
    file.with_name("digits_code.py").write_text(CODE.replace("train=split(0, samples)", "train=split(0, 0)"))
    for _ in range(2):
        with pytest.raises(InputError, match="train split must have samples"):
            run(load(file), tmp_path / "runs", device=CPU, max_seconds=0)


def test_lock_of_this_process_is_respected_too(copy):
    file, directory = copy
    with Store(directory).lock(), pytest.raises(LockedError):
        run(load(file), directory, device=CPU, max_seconds=0)
