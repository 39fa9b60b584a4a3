import re
import shlex
import tomllib
from pathlib import Path

import pytest

from compressor.config.budget_file import load_budget
from compressor.config.yaml_source import read
from compressor.report.json import read_report

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github/workflows/ci.yml"


@pytest.fixture(scope="module")
def workflow() -> dict:
    root, problems = read(WORKFLOW)
    assert root is not None
    assert problems == ()
    return root.plain()


def commands(workflow: dict) -> list[list[str]]:
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [shlex.split(line, comments=True) for step in steps for line in step.get("run", "").splitlines() if line]


def test_the_workflow_may_read_the_repository_and_nothing_else(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in workflow["jobs"].values())
    assert "pull_request" in workflow["on"]
    assert "pull_request_target" not in workflow["on"]


def test_every_job_has_a_machine_and_a_time_limit(workflow):
    assert list(workflow["jobs"]) == ["lint", "test", "benchmark"]
    assert all({"runs-on", "timeout-minutes", "steps"} <= job.keys() for job in workflow["jobs"].values())


def test_every_action_has_a_version(workflow):
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in used)


def test_every_make_target_exists(workflow):
    targets = [command[1] for command in commands(workflow) if command[0] == "make"]
    assert targets == ["lint", "test", "demo"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_what_the_jobs_install_has_one_pinned_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["examples"], *extras["dev"]]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    names = {canonical(re.split(r"[<>=\[]", requirement)[0]) for requirement in asked} - {"compressor"}
    assert names - {canonical(name) for name in pinned} == set()


def canonical(name: str) -> str:
    """As an index of packages writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_benchmark_is_gated_by_files_that_are_there(workflow):
    (gate,) = [command for command in commands(workflow) if command[1] == "gate"]
    options = dict(zip(gate[3::2], gate[4::2], strict=True))
    assert options.keys() == {"--baseline", "--budget", "--junit"}
    baseline = read_report(ROOT / options["--baseline"])
    assert gate[2] == f"runs/{baseline.pipeline}/report.json"
    budget = load_budget(ROOT / options["--budget"])
    assert budget.metrics.keys() == {metric.name for metric in baseline.metrics}
    assert budget.latency_ms.level == "off"
