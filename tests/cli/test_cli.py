import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from processes import run_python

ROOT = Path(__file__).parents[2]
PROBE = """
import atexit, sys
from compressor.cli.main import main
atexit.register(lambda: print(sorted({"torch", "sklearn"} & set(sys.modules)), file=sys.stderr))
main()
"""


def compress(*arguments: str, torch: bool = False) -> subprocess.CompletedProcess:
    return run_python("-c", PROBE, *arguments, cwd=ROOT, torch=torch)


def compress_from_the_start(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command in an interpreter of its own, which has imported nothing."""
    command = [sys.executable, "-c", PROBE, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("stages",), ("--version",)])
def test_command_answers_without_torch_in_half_a_second_of_cpu(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = compress_from_the_start(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.splitlines()[-1] == "[]"
    # twice the promised 0.5 s: this machine may be busy; benchmarks/startup.py has the figure
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize(("in_actions", "written"), [("true", ": :error::b"), ("", "::error::b")])
def test_log_lines_are_no_commands_in_github_actions(in_actions, written):
    probe = "import atexit, logging; from compressor.cli.main import main; "
    probe += "atexit.register(lambda: logging.getLogger('compressor').info('layer a\\n::error::b')); main()"
    finished = run_python("-c", probe, "--version", torch=False, GITHUB_ACTIONS=in_actions)
    assert finished.returncode == 0
    assert finished.stderr.splitlines() == ["layer a", written]


def test_stages_are_listed_with_what_they_do():
    lines = compress("stages").stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == [
        "distillation",
        "int8_ptq",
        "int8_qat",
        "magnitude_pruning",
        "mutual_learning",
        "onnx_export",
        "sensitivity",
        "soft_labels",
        "training",
        "weight_only",
        "weight_pruning",
    ]
    assert all(len(line.split()) > 5 for line in lines)


def test_example_pipelines_are_valid(tmp_path):
    finished = compress_from_the_start("check", "pipelines/digits.yaml", "--runs", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert "sklearn" not in finished.stderr  # the user's code is not imported
    assert next(line.split()[0] for line in finished.stdout.splitlines()) == "training"


def test_misspelt_key_exits_2_with_its_place(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text((ROOT / "pipelines/digits.yaml").read_text().replace("epochs: 15", "epoch: 15"))
    (tmp_path / "digits.py").write_text((ROOT / "pipelines/digits.py").read_text())
    finished = compress("check", str(file), torch=True)
    assert finished.returncode == 2
    assert "typo.yaml:8:5: unknown key 'epoch' in stages.0; did you mean 'epochs'?" in finished.stderr


def test_schema_is_json_that_knows_every_stage():
    schema = json.loads(compress("schema", torch=True).stdout)
    assert "pruning_ratio" in json.dumps(schema)


def test_report_of_a_directory_without_one_exits_5(tmp_path):
    finished = compress("report", str(tmp_path))
    assert finished.returncode == 5
    assert "report.json" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_unknown_command_exits_2():
    assert compress("rnu").returncode == 2


def test_committed_schema_is_what_the_command_prints():
    assert compress("schema", torch=True).stdout == (ROOT / "pipelines/pipeline.schema.json").read_text()


def test_layers_of_every_model_of_a_pipeline_are_listed():
    finished = compress("layers", "pipelines/digits.yaml", torch=True)
    assert finished.returncode == 0, finished.stderr
    teacher, student = finished.stdout.split("\n\n")
    assert teacher.splitlines()[0] == "digits:teacher: 251,098 parameters"
    assert student.splitlines()[0] == "digits:student: 28,410 parameters"
    (line,) = [line for line in student.splitlines() if line.startswith("8.conv1 ")]
    assert line.split(maxsplit=2) == ["8.conv1", "Conv2d", "(N, 32, 4, 4)       9,216"]


def test_layers_of_a_model_that_does_not_run_exit_5(tmp_path):
    code = (ROOT / "pipelines/digits.py").read_text().replace("nn.Conv2d(1, width", "nn.Conv2d(3, width")
    (tmp_path / "digits.py").write_text(code)
    (tmp_path / "digits.yaml").write_text((ROOT / "pipelines/digits.yaml").read_text())
    finished = compress("layers", str(tmp_path / "digits.yaml"), torch=True)
    assert finished.returncode == 5
    assert "error: Sequential must run on example_inputs, but: RuntimeError" in finished.stderr
    assert "Traceback" not in finished.stderr
