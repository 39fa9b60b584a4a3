import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Import a script of benchmarks/ by its name; what it imports from there and from pipelines/ is forgotten later."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    before = set(sys.modules)

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"benchmarks/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent in (ROOT / "benchmarks", ROOT / "pipelines"):
            del sys.modules[name]


@pytest.mark.parametrize(("name", "table", "result"), [("suite", "tables", "headline.json")])
def test_the_readme_states_the_committed_results(script, name, table, result):
    module = script(name)
    _, _, rest = (ROOT / "README.md").read_text().partition(module.BEGIN)
    written, _, _ = rest.partition(module.END)
    found = json.loads((ROOT / "benchmarks/results" / result).read_text())
    assert written.strip() == getattr(module, table)(found)


@pytest.mark.parametrize(
    "name", ["cost", "distillation", "portability", "pruning", "quantization", "sparsity", "transformer_int8"]
)
def test_the_readme_has_the_table_of_the_committed_results(script, name):
    readme = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert script("publish").splice(readme, name, script(name).table(result)) == readme


@pytest.fixture
def publishing(script, monkeypatch, tmp_path):
    """`benchmarks/publish.py`, writing to `tmp_path`, where README.md has a table of `fit`."""
    module = script("publish")
    monkeypatch.setattr(module, "README", tmp_path / "README.md")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    module.README.write_text("above\n\n<!-- fit:begin -->\nolder\n<!-- fit:end -->\n\nbelow\n")
    return module


def test_a_table_replaces_the_older_one_and_keeps_the_text_around_it(publishing):
    assert publishing.splice(publishing.README.read_text(), "fit", "newer\n| 1 |") == (
        "above\n\n<!-- fit:begin -->\nnewer\n| 1 |\n<!-- fit:end -->\n\nbelow\n"
    )


@pytest.mark.parametrize(
    "found", [[], ["begin"], ["end"], ["end", "begin"], ["begin", "end", "end"], ["begin", "begin", "end"]]
)
def test_a_page_without_each_mark_once_and_in_order_is_refused(publishing, found):
    marks = [f"<!-- fit:{end} -->" for end in found]
    with pytest.raises(ValueError, match=f"each once, found {', '.join(marks) or 'neither'}$"):
        publishing.splice("\n".join(["<!-- cost:begin --><!-- cost:end -->", *marks, "below"]), "fit", "newer")


def test_what_is_published_is_dated_and_the_table_is_made_of_what_the_file_holds(publishing, capsys):
    before = publishing.today()
    publishing.publish("fit", "python fit.py", {"seconds": {2: (1.5,)}}, lambda result: str(result["seconds"]))
    written = json.loads((publishing.RESULTS / "fit.json").read_text())
    assert list(written) == ["command", "date", "seconds"]
    assert written["command"] == "python fit.py"
    assert before <= written["date"] <= publishing.today()
    assert publishing.README.read_text().count("\n{'2': [1.5]}\n") == 1
    assert capsys.readouterr().out == "{'2': [1.5]}\n"


def test_figures_are_written_even_where_the_readme_has_no_marks(publishing):
    publishing.README.write_text("above\n")
    with pytest.raises(ValueError, match="found neither"):
        publishing.publish("fit", "python fit.py", {"seconds": 1.5}, lambda _result: "newer")
    assert json.loads((publishing.RESULTS / "fit.json").read_text())["seconds"] == 1.5
    assert publishing.README.read_text() == "above\n"


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
