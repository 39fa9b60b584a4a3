"""What int8 did to a model, in words and as a table: for a log and for Markdown; knows no torch."""

from collections.abc import Sequence

from compressor.records.int8 import Deployment, Distribution, Fallback, LayerNoise, Quantization
from compressor.text.figures import change, share, times, value

MOST_LAYERS = 20
"""A table shows so many, those that make most noise; JSON has all."""


def describe_deployment(found: Deployment) -> str:
    """The metric of the float model, of int8 in PyTorch and of int8 under ONNX Runtime, in one line."""
    before, simulated, deployed = (
        value(found.metric, one) for one in (found.float_value, found.simulated_value, found.deployed_value)
    )
    same = "" if found.agreement is None else f", and both name the same class for {share(found.agreement)}"
    return (
        f"{found.metric.name} on {found.samples:,} validation samples: float {before}, int8 {simulated} in PyTorch and "
        f"{deployed} under ONNX Runtime; outputs of the two differ by {found.difference:.2g} of at most "
        f"{found.tolerance:.2g} (RMS){same}; SQNR {decibels(found.sqnr_db)}"
    )


def describe_fallback(fallback: Fallback, found: Deployment) -> str:
    """What putting layers back to float came to, what it cost and what ended it, in one line."""
    kept = ", ".join(f"{step.layer} ({step.weights} weights)" for step in fallback.steps[: fallback.kept])
    ended = {
        "reached": "the limit holds",
        "time": "max_minutes are over",
        "nothing left": "no layer is left to put back",
    }[fallback.stopped]
    gained = change(found.metric, fallback.before.deployed_value, found.deployed_value)
    return (
        f"max_drop {fallback.max_drop:g}: {ended}; back in float: {kept or 'nothing'}; {found.metric.name} "
        f"{value(found.metric, found.deployed_value)} ({gained}) with {fallback.added_bytes:+,} bytes, "
        f"{times(fallback.latency_ratio, 'faster', 'slower')} than all in int8"
    )


def worst_first(layers: Sequence[LayerNoise]) -> list[LayerNoise]:
    """Order layers by what each alone does to the model's outputs, the most noise first."""
    return sorted(layers, key=lambda found: float("inf") if found.alone_sqnr_db is None else found.alone_sqnr_db)


def layer_cells(found: Quantization) -> list[list[str]]:
    """One row per layer, the one that makes most noise in the outputs first, headings first; empty without layers."""
    if not found.layers:
        return []
    metric = found.deployment.metric
    head = ["layer", "SQNR of its outputs", "SQNR of the model's outputs, it alone in int8", f"{metric.name}, so"]
    head += ["range", "clipped"]
    return [
        head,
        *(
            [
                one.layer,
                decibels(one.sqnr_db),
                decibels(one.alone_sqnr_db),
                value(metric, one.alone_value),
                *_range(one.histogram),
            ]
            for one in worst_first(found.layers)[:MOST_LAYERS]
        ),
    ]


def shown_layers(found: Quantization) -> str:
    """Which layers `layer_cells` has, and what they were measured on."""
    shown = min(len(found.layers), MOST_LAYERS)
    return (
        f"the {shown} of {len(found.layers)} layers that make most noise, on {found.layer_samples} validation samples"
    )


def decibels(found: float | None) -> str:
    """A ratio of powers in dB, to one decimal."""
    return "no noise" if found is None else f"{found:.1f} dB"


def _range(histogram: Distribution | None) -> list[str]:
    if histogram is None:
        return ["float", ""]
    return [f"{histogram.low:.3g} to {histogram.high:.3g}", share(histogram.below + histogram.above)]
