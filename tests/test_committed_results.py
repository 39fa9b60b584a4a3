import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from compressor.report.json import read_report

ROOT = Path(__file__).parents[1]
TABLES = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py") if "\ndef table(" in file.read_text())
"""Benchmarks that make a table of what they found."""


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


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_table_of_the_committed_results(script, name):
    page = (ROOT / "docs/results.md").read_text()
    assert script("publish").splice(page, name, script(name).table(result_of(name))) == page


def test_the_page_has_no_other_tables():
    page = (ROOT / "docs/results.md").read_text()
    assert sorted(re.findall("<!-- (.*):begin -->", page)) == TABLES


def test_the_readme_sums_up_the_committed_results(script):
    readme = (ROOT / "README.md").read_text()
    assert script("publish").splice(readme, "summary", script("headline").summary(result_of("headline"))) == readme


@pytest.fixture
def publishing(script, monkeypatch, tmp_path):
    """`benchmarks/publish.py`, writing to `tmp_path`, where the page has a table of `fit`."""
    module = script("publish")
    monkeypatch.setattr(module, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    module.PAGE.write_text("above\n\n<!-- fit:begin -->\nolder\n<!-- fit:end -->\n\nbelow\n")
    return module


def test_a_table_replaces_the_older_one_and_keeps_the_text_around_it(publishing):
    assert publishing.splice(publishing.PAGE.read_text(), "fit", "newer\n| 1 |") == (
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
    assert publishing.PAGE.read_text().count("\n{'2': [1.5]}\n") == 1
    assert capsys.readouterr().out == "{'2': [1.5]}\n"


def test_figures_are_written_even_where_the_page_has_no_marks(publishing):
    publishing.PAGE.write_text("above\n")
    with pytest.raises(ValueError, match="found neither"):
        publishing.publish("fit", "python fit.py", {"seconds": 1.5}, lambda _result: "newer")
    assert json.loads((publishing.RESULTS / "fit.json").read_text())["seconds"] == 1.5
    assert publishing.PAGE.read_text() == "above\n"


def test_a_row_states_its_seeds_with_mean_and_standard_deviation(script):
    def run(size_ratio: float, ratio: float, accuracy: float) -> dict:
        return {
            "size_ratio": size_ratio,
            "latency": {"ratio": ratio},
            "baseline_accuracy": 0.99,
            "accuracy": accuracy,
        }

    networks = {
        "mnist": {"runs": [run(120.0, 5.0, 0.98), run(100.0, 4.999, 0.99)]},
        "mnist_300_100": {
            "runs": [run(50.0, 2.0, 0.97)],
            "bounds": {"one_layer": latency(3.0), "copy": latency(4.0), "batch_32": latency(7.0)},
        },
    }
    lines = script("headline").of_mnist({"networks": networks}).splitlines()
    assert lines[2:4] == [
        "| LeNet-5, 2 seeds | 100x to 120x | 5.00x | 99.00 ± 0.00 % | 98.50 ± 0.71 % | 39x, 99.20 to 99.26 % |",
        "| LeNet-300-100, 1 seed | 50.0x | 2.00x | 99.00 % | 97.00 % | 40x, 98.36 to 98.42 % |",
    ]
    for bound in ("10 outputs, 3.00x faster", "copies its input, 4.00x faster", "Ours at a batch of 32: 7.00x faster"):
        assert bound in lines[-1]


def test_the_whole_chain_states_all_its_seeds_and_the_parts_one(script):
    def row(ratio: float) -> dict:
        return {"size_bytes": 1000, "parameters": 10, "accuracy": 0.9, "latency": latency(ratio)}

    headline = script("headline")
    runs = [{"accuracy": accuracy, "latency": {"ratio": ratio}} for accuracy, ratio in ((0.8, 6.0), (0.9, 7.0))]
    parts = {
        "rows": {"float32": row(1.0), "pruning": row(2.0), headline.WHOLE: row(6.5)},
        "session": {"noise": latency(1.01)},
    }
    written = headline.of_cifar10({"networks": {"cifar10": {"runs": runs}, "cifar10_parts": parts}})
    assert "| pruning | 1.00 kB | no difference | 2.00x faster [1.99, 2.01] | 90.00 % |" in written
    assert f"| {headline.WHOLE} | 1.00 kB | no difference | 6.50x faster [6.47, 6.53] | 85.00 ± 7.07 % |" in written
    assert "against itself differs by up to 1.5 %" in written
    assert "the 2 seeds of the whole are 6.00x to 7.00x faster" in written


def test_networks_of_several_days_are_dated_each(script):
    headline = script("headline")
    networks = {name: {"date": "2026-01-02"} for name in headline.NETWORKS}
    assert headline.dates(networks) == "2026-01-02"
    networks["mnist"] = {"date": "2026-01-01"}
    assert headline.dates(networks) == (
        "LeNet-5 on 2026-01-01; digits, LeNet-300-100, ResNet-56, ResNet-56 in parts on 2026-01-02"
    )


def test_parts_are_each_technique_every_pair_and_the_whole(script):
    suite = script("suite")
    distillation, pruning, int8 = ["soft_labels", "distillation"], ["magnitude_pruning"], ["int8_qat", "onnx_export"]
    found = {label: [stage["stage"] for stage in settings["stages"]] for label, settings in suite.parts().items()}
    assert found == {
        "ResNet-20 as it came": ["onnx_export"],
        "distillation": distillation,
        "pruning": pruning,
        "int8 (PTQ)": ["int8_ptq", "onnx_export"],
        "int8 (QAT)": int8,
        "distillation → pruning": distillation + pruning,
        "distillation → int8 (QAT)": distillation + int8,
        "pruning → int8 (QAT)": pruning + int8,
        "distillation → pruning → int8 (QAT)": distillation + pruning + int8,
    }
    assert not any("gate" in settings for settings in suite.parts().values())


def test_pruning_first_ends_with_as_many_parameters_as_the_whole():
    settings = YAML(typ="safe").load(ROOT / "pipelines/cifar10_pruned_first.yaml")
    rows = read_report(ROOT / "benchmarks/results/pipeline_cifar10.json").rows
    (pruned,) = (row.measurement.parameters for row in rows if row.stage == "magnitude_pruning")
    assert settings["stages"][0]["parameters"] == pruned


@pytest.fixture
def committed(script, monkeypatch, tmp_path):
    """The suite, and the facts of the machine whose figures are committed."""
    suite = script("suite")
    facts = dict.fromkeys(suite.SAME_MACHINE, "equal")
    networks = {name: {"date": "2026-01-01"} for name in suite.NETWORKS}
    (tmp_path / "headline.json").write_text(json.dumps({"seeds": [0], "environment": facts, "networks": networks}))
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    return suite, facts


def test_networks_that_are_not_run_keep_their_figures(committed):
    suite, facts = committed
    assert suite.kept([0], ["cifar10"], facts).keys() == suite.NETWORKS.keys() - {"cifar10"}
    assert suite.kept([1], suite.NETWORKS, {}) == {}


def test_figures_of_another_machine_or_seed_are_not_kept(committed):
    suite, facts = committed
    with pytest.raises(RuntimeError, match=r"got another cpu; run without --only"):
        suite.kept([0], ["cifar10"], {**facts, "cpu": "another"})
    with pytest.raises(RuntimeError, match=r"got another seed; run without --only"):
        suite.kept([1], ["cifar10"], facts)


def result_of(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def latency(ratio: float) -> dict:
    return {"p50_ms": 0.02, "ratio": ratio, "ratio_low": 0.995 * ratio, "ratio_high": 1.005 * ratio}
