"""What int8 did to a model, in words and as a table: for a log and for Markdown; knows no torch."""

from compressor.records.int8 import Deployment, Distribution, Fallback, Quantization, worst_first
from compressor.text.figures import change, share, times, value

MOST_LAYERS = 20
"""A table shows so many, those that make most noise; JSON has all."""


def describe_deployment(deployment: Deployment) -> str:
    """The metric of the float model, of int8 in PyTorch and of int8 under ONNX Runtime, in one line."""
    before, simulated, deployed = (
        value(deployment.metric, number)
        for number in (deployment.float_value, deployment.simulated_value, deployment.deployed_value)
    )
    rounding = deployment.rounding_difference
    reason = "" if rounding is None else f", as sums in another order alone make {rounding:.2g}"
    same = "" if deployment.agreement is None else f", and both name the same class for {share(deployment.agreement)}"
    return (
        f"{deployment.metric.name} on {deployment.samples:,} validation samples: float {before}, int8 {simulated} in "
        f"PyTorch and {deployed} under ONNX Runtime; outputs of the two differ by {deployment.difference:.2g} of "
        f"at most {deployment.tolerance:.2g} (RMS){reason}{same}; SQNR {decibels(deployment.sqnr_db)}"
    )


def describe_fallback(fallback: Fallback, deployment: Deployment) -> str:
    """What putting layers back to float came to, what it cost and what ended it, in one line."""
    kept = ", ".join(f"{step.layer} ({step.weights} weights)" for step in fallback.steps[: fallback.kept])
    ended = {
        "reached": "the limit holds",
        "time": "max_minutes are over",
        "nothing left": "no layer is left to put back",
    }[fallback.stopped]
    gained = change(deployment.metric, fallback.before.deployed_value, deployment.deployed_value)
    return (
        f"max_drop {fallback.max_drop:g}: {ended}; back in float: {kept or 'nothing'}; {deployment.metric.name} "
        f"{value(deployment.metric, deployment.deployed_value)} ({gained}) with {fallback.added_bytes:+,} bytes, "
        f"{times(fallback.latency_ratio, 'faster', 'slower')} than all in int8"
    )


def layer_cells(quantization: Quantization) -> list[list[str]]:
    """One row per layer, the one that makes most noise in the outputs first, headings first; empty without layers."""
    if not quantization.layers:
        return []
    metric = quantization.deployment.metric
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
            for one in worst_first(quantization.layers)[:MOST_LAYERS]
        ),
    ]


def describe_layers(quantization: Quantization) -> str:
    """Which layers `layer_cells` has, and what they were measured on."""
    shown = min(len(quantization.layers), MOST_LAYERS)
    return (
        f"the {shown} of {len(quantization.layers)} layers that make most noise, on {quantization.layer_samples} "
        "validation samples"
    )


def decibels(ratio: float | None) -> str:
    """A ratio of powers in dB, to one decimal."""
    return "no noise" if ratio is None else f"{ratio:.1f} dB"


def _range(histogram: Distribution | None) -> list[str]:
    if histogram is None:
        return ["float", ""]
    return [f"{histogram.low:.3g} to {histogram.high:.3g}", share(histogram.below + histogram.above)]
