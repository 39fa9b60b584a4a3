"""What int8 did to a model, in Markdown and JSON."""

from example_report import deployment, report, row

from compressor.records.int8 import Distribution, Fallback, LayerNoise, PutBack, Quantization
from compressor.records.report import Report
from compressor.report.int8_summary import MOST_LAYERS, describe_deployment, describe_fallback, layer_cells
from compressor.report.json import read_report, to_json
from compressor.report.markdown import to_markdown


def layer(number: int, alone_sqnr_db: float | None) -> LayerNoise:
    histogram = Distribution(low=-1.5, high=6, counts=(1, 2, 3), below=0.01, above=0.0025)
    return LayerNoise(
        layer=f"blocks.{number}",
        sqnr_db=20.0,
        alone_sqnr_db=alone_sqnr_db,
        alone_value=0.9,
        histogram=histogram if number else None,
    )


def int8_report(found: Quantization) -> Report:
    int8 = row("int8_ptq", size_bytes=25_000)
    return report(row("training"), int8.model_copy(update={"quantization": found}))


def test_layer_that_makes_most_noise_comes_first_and_only_the_worst_are_shown() -> None:
    layers = [layer(number, 50.0 - number) for number in range(MOST_LAYERS + 5)] + [layer(99, None)]
    found = Quantization(deployment=deployment(0.9), layers=tuple(layers), layer_samples=256)
    head, *body = layer_cells(found)
    assert head[0] == "layer"
    assert [cells[0] for cells in body] == [f"blocks.{number}" for number in range(24, 4, -1)]
    assert body[0] == ["blocks.24", "20.0 dB", "26.0 dB", "90.00 %", "-1.5 to 6", "1.25 %"]
    shown = to_markdown(int8_report(found))
    assert "## Int8" in shown
    assert "int8_ptq, the 20 of 26 layers that make most noise, on 256 validation samples:" in shown
    assert "blocks.4 " not in shown


def test_layer_without_noise_or_range_says_so() -> None:
    found = Quantization(deployment=deployment(0.9), layers=(layer(0, None),), layer_samples=256)
    assert layer_cells(found)[1][2:] == ["no noise", "90.00 %", "float", ""]


def test_metric_is_told_for_float_simulated_and_deployed() -> None:
    assert describe_deployment(deployment(0.9)) == (
        "accuracy on 1,000 validation samples: float 92.00 %, int8 90.10 % in PyTorch and 90.00 % under ONNX Runtime; "
        "outputs of the two differ by 0.012 of at most 0.05 (RMS), and both name the same class for 99.80 %; "
        "SQNR 21.4 dB"
    )


def test_fallback_tells_layers_price_and_what_ended_it() -> None:
    steps = (PutBack(layer="stem", weights="int8", drop=0.05), PutBack(layer="head", weights="float", drop=0.06))
    fallback = Fallback(
        max_drop=0.01,
        stopped="time",
        steps=steps,
        kept=1,
        before=deployment(0.5),
        added_bytes=1200,
        latency_ratio=0.8,
    )
    assert describe_fallback(fallback, deployment(0.87)) == (
        "max_drop 0.01: max_minutes are over; back in float: stem (int8 weights); accuracy 87.00 % (+37.00 points) "
        "with +1,200 bytes, 1.25x slower than all in int8"
    )
    assert "back in float: nothing" in describe_fallback(fallback.model_copy(update={"kept": 0}), deployment(0.5))


def test_json_gives_all_layers_back(tmp_path) -> None:
    layers = tuple(layer(number, 50.0 - number) for number in range(MOST_LAYERS + 5))
    written = int8_report(Quantization(deployment=deployment(0.9), layers=layers, layer_samples=256))
    (tmp_path / "report.json").write_text(to_json(written))
    assert read_report(tmp_path / "report.json") == written


def test_report_without_int8_has_no_such_section() -> None:
    assert "## Int8" not in to_markdown(report(row("training")))
