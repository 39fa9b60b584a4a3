"""The figures that the page has of an int8 model: the noise of its layers, and what they give."""

import math

from compressor.records.int8 import Distribution, Quantization, worst_first
from compressor.report.int8_summary import MOST_LAYERS, decibels, describe_layers, layer_cells
from compressor.report.page import charts
from compressor.report.page.drawings import Bar, Bars, Columns, Picture
from compressor.report.page.pictures import left_out
from compressor.text.figures import share


def noise_picture(name: str, quantization: Quantization) -> Picture:
    """How little each layer alone in int8 changes the outputs of a row's model, whose layers were analysed."""
    layers = worst_first(quantization.layers)[:MOST_LAYERS]
    largest = max([one.alone_sqnr_db for one in layers if one.alone_sqnr_db is not None], default=0.0)
    scale = charts.Scale(0, max(largest, 1.0))
    bars = tuple(
        Bar(
            one.layer,
            decibels(one.alone_sqnr_db),
            100.0 if one.alone_sqnr_db is None else scale.at(one.alone_sqnr_db),
        )
        for one in layers
    )
    described = (
        "SQNR of the model's outputs with one layer alone in int8: the shorter the bar, the more it changes them; "
        f"{describe_layers(quantization)}."
    )
    more = left_out(len(quantization.layers) - len(layers), "layers")
    return Picture(f"{name}: noise of each layer", described, Bars(bars), layer_cells(quantization), more, printed=True)


def range_pictures(quantization: Quantization) -> tuple[Picture, ...]:
    """What the layers of `noise_picture` give in the float model, within the range of their codes."""
    return tuple(
        _range_picture(one.layer, one.histogram)
        for one in worst_first(quantization.layers)[:MOST_LAYERS]
        if one.histogram and one.histogram.counts
    )


def _range_picture(layer: str, histogram: Distribution) -> Picture:
    tallest, total = max(histogram.counts), sum(histogram.counts)
    heights = charts.Scale(0, math.sqrt(tallest or 1))
    width = (histogram.high - histogram.low) / len(histogram.counts)
    low, high = f"{histogram.low:.3g}", f"{histogram.high:.3g}"
    table = [
        ["from", "to", "share of the values"],
        *(
            [
                f"{histogram.low + number * width:.3g}",
                f"{histogram.low + (number + 1) * width:.3g}",
                share(found / (total or 1) * (1 - histogram.below - histogram.above)),
            ]
            for number, found in enumerate(histogram.counts)
        ),
    ]
    described = f"Clipped: {share(histogram.below)} below {low}, {share(histogram.above)} above {high}."
    columns = Columns(tuple(heights.at(math.sqrt(found)) for found in histogram.counts), low, high)
    return Picture(layer, described, columns, table)
