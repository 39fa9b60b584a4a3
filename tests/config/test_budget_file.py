from pathlib import Path

import pytest

from compressor.config.budget_file import load_budget
from compressor.errors import ConfigError
from compressor.verdicts.budget import Budget, MaxWorsening

BUDGET = """\
size_bytes: {max_increase: 0.05}
transfer_bytes: {level: off}
latency_ratio: {level: warn}
agreement: {}
metrics:
  accuracy: {max_drop: 0.005}
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "budget.yaml"


def problems(file, text: str) -> list[str]:
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_budget(file)
    return [str(problem).removeprefix(f"{file}:") for problem in error.value.problems]


def test_what_is_named_is_at_level_error_and_what_is_not_named_keeps_its_default(file):
    file.write_text(BUDGET)
    budget = load_budget(file)
    assert (budget.size_bytes.level, budget.size_bytes.max_increase) == ("error", 0.05)
    assert (budget.transfer_bytes.level, budget.latency_ratio.level, budget.agreement.level) == ("off", "warn", "error")
    assert budget.latency_ratio.max_decrease == Budget().latency_ratio.max_decrease
    assert budget.latency_ms == Budget().latency_ms
    assert budget.metrics == {"accuracy": MaxWorsening(max_drop=0.005)}


def test_the_budget_in_the_documents_says_what_holds_without_a_file(file):
    page = (Path(__file__).parents[2] / "docs/for_ci.md").read_text()
    (block,) = [part for part in page.split("```yaml\n")[1:] if part.startswith("size_bytes: ")]
    file.write_text(block.partition("```")[0])
    budget = load_budget(file)
    assert budget.metrics == {"accuracy": MaxWorsening()}
    assert budget.model_copy(update={"metrics": {}}) == Budget()


def test_every_fault_is_told_with_its_place_in_the_order_of_the_file(file):
    text = BUDGET.replace("size_bytes: {max_increase", "size_byte: {max_increase", 1)
    text = text.replace("warn", "wran").replace("0.005", "-1")
    assert problems(file, text + "f1: {}\n") == [
        "1:1: unknown key 'size_byte'; did you mean 'size_bytes'?",
        "3:24: latency_ratio.level must be 'off', 'warn' or 'error', got 'wran'; did you mean 'warn'?",
        "6:24: metrics.accuracy.max_drop must be greater than or equal to 0, got -1",
        "7:1: unknown key 'f1'; known are agreement, latency_ms, latency_ratio, metrics, size_bytes, transfer_bytes",
    ]


def test_what_is_no_value_of_yaml_is_told_once(file):
    assert problems(file, "latency_ms: {max_increase: .nan}\nsize_bytes: {level: of}\n") == [
        "1:28: a number must be finite, got .nan",
        "2:21: size_bytes.level must be 'off', 'warn' or 'error', got 'of'; did you mean 'off'?",
    ]


@pytest.mark.parametrize("text", ["[]", "5", "", "a: [", "a: 1\na: 2", "!!python/object:os.system {}"])
def test_what_is_no_mapping_is_refused(file, text):
    assert problems(file, text)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_budget(tmp_path / "budget.yaml")
