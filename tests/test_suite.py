import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("suite", ROOT / "benchmarks/suite.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_states_the_committed_results(suite):
    result = json.loads((ROOT / "benchmarks/results/headline.json").read_text())
    _, _, rest = (ROOT / "README.md").read_text().partition(suite.BEGIN)
    written, _, _ = rest.partition(suite.END)
    assert written.strip() == suite.tables(result)


def test_a_row_states_its_seeds_with_mean_and_standard_deviation(suite):
    def run(size_ratio: float, ratio: float, accuracy: float) -> dict:
        return {
            "size_ratio": size_ratio,
            "latency": {"ratio": ratio},
            "baseline_accuracy": 0.99,
            "accuracy": accuracy,
        }

    latency = {"p50_ms": 0.02, "ratio": 4.0, "ratio_low": 3.99, "ratio_high": 4.01}
    runs = {"mnist": [run(120.0, 5.0, 0.98), run(100.0, 4.999, 0.99)], "mnist_300_100": [run(50.0, 2.0, 0.97)]}
    lines = suite.of_mnist({"pipelines": runs, "one_layer": latency}).splitlines()
    assert lines[2:] == [
        "| LeNet-5, 2 seeds | 100x to 120x | 5.00x | 99.00 ± 0.00 % | 98.50 ± 0.71 % | 39x at 99.20 % |",
        "| LeNet-300-100, 1 seed | 50.0x | 2.00x | 99.00 % | 97.00 % | 40x at 98.36 % |",
        "",
        "A file of one layer, 784 inputs and 10 outputs, is 4.00x faster [3.99, 4.01] than LeNet-300-100.",
    ]
