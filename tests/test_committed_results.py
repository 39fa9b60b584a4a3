import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Import a script of benchmarks/ by its name."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"benchmarks/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize(
    ("name", "table", "result"), [("suite", "tables", "headline.json"), ("cost", "table", "cost.json")]
)
def test_the_readme_states_the_committed_results(script, name, table, result):
    module = script(name)
    _, _, rest = (ROOT / "README.md").read_text().partition(module.BEGIN)
    written, _, _ = rest.partition(module.END)
    found = json.loads((ROOT / "benchmarks/results" / result).read_text())
    assert written.strip() == getattr(module, table)(found)


def test_a_row_states_its_seeds_with_mean_and_standard_deviation(script):
    def run(size_ratio: float, ratio: float, accuracy: float) -> dict:
        return {
            "size_ratio": size_ratio,
            "latency": {"ratio": ratio},
            "baseline_accuracy": 0.99,
            "accuracy": accuracy,
        }

    latency = {"p50_ms": 0.02, "ratio": 4.0, "ratio_low": 3.99, "ratio_high": 4.01}
    runs = {"mnist": [run(120.0, 5.0, 0.98), run(100.0, 4.999, 0.99)], "mnist_300_100": [run(50.0, 2.0, 0.97)]}
    lines = script("suite").of_mnist({"pipelines": runs, "one_layer": latency}).splitlines()
    assert lines[2:] == [
        "| LeNet-5, 2 seeds | 100x to 120x | 5.00x | 99.00 ± 0.00 % | 98.50 ± 0.71 % | 39x at 99.20 % |",
        "| LeNet-300-100, 1 seed | 50.0x | 2.00x | 99.00 % | 97.00 % | 40x at 98.36 % |",
        "",
        "A file of one layer, 784 inputs and 10 outputs, is 4.00x faster [3.99, 4.01] than LeNet-300-100.",
    ]
