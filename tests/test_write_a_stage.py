import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from processes import run_python

ROOT = Path(__file__).parents[1]


def block_of(page: str, language: str, marker: str) -> str:
    """The one code block of a page that has `marker`."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [text for name, text in fences if name == language and marker in text]
    return block


def python(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_python(*arguments, cwd=directory, PYTHONPATH=str(directory))


def run(directory: Path, *options: str) -> dict:
    found = python(directory, "-m", "compressor", "run", "low_rank.yaml", "--max-seconds", "0.1", "--json", *options)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where a user puts what the page shows: the stage and the pipeline file, beside the model and data of the demo."""
    place = tmp_path_factory.mktemp("user")
    (place / "low_rank.py").write_text(block_of("docs/write_a_stage.md", "python", "class LowRank"))
    (place / "low_rank.yaml").write_text(block_of("docs/write_a_stage.md", "yaml", "low_rank:LowRank"))
    shutil.copyfile(ROOT / "pipelines/digits.py", place / "digits.py")
    return place


@pytest.fixture(scope="module")
def report(directory) -> dict:
    return run(directory)


def test_the_stage_of_the_page_has_at_most_30_lines():
    stage = block_of("docs/write_a_stage.md", "python", "class LowRank")
    assert len(stage.splitlines()) <= 30


def test_the_stage_of_the_page_makes_a_model_smaller_between_two_others(report):
    names = [row["stage"] for row in report["rows"]]
    assert names == ["training", "low_rank:LowRank", "magnitude_pruning", "onnx_export"]
    before, split, pruned, delivered = [row["measurement"]["parameters"] for row in report["rows"]]
    assert delivered == pruned < split < before


def test_a_new_process_loads_what_the_stage_of_the_page_has_stored(directory, report):
    again = run(directory, "--set", "stages.2.recovery.epochs=2")
    assert [row["reused"] for row in again["rows"]] == [True, True, False, False]
    assert again["rows"][1]["key"] == report["rows"][1]["key"]


def test_the_stages_of_the_page_keep_the_contract(directory):
    (directory / "recover.py").write_text(block_of("docs/write_a_stage.md", "python", "class Recover"))
    check = """
from compressor import Reference, TorchModel
from compressor.testing import check_stage
import digits
from low_rank import LowRank
from recover import Recover
model, task = TorchModel.build(Reference(factory="digits:student"), seed=0), digits.task()
check_stage(LowRank(rank=4), model, task)
check_stage(Recover(epochs=1), model, task)
"""
    checked = python(directory, "-c", check)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.usefixtures("report")
def test_the_device_of_the_page_for_engineers_runs_the_delivered_file(directory):
    shutil.copyfile(directory / "runs/low_rank/model.onnx", directory / "model.onnx")
    classify = block_of("docs/for_engineers.md", "python", "InferenceSession")
    images = "import digits\nimages = digits.task().test.inputs[0][:5].numpy()\n"
    used = python(directory, "-c", f"{images}{classify}print(logits.shape, labels[:3], described['name'])")
    assert used.returncode == 0, used.stderr
    assert used.stdout.split("\n")[0] == "(5, 10) ['0', '1', '2'] model"
