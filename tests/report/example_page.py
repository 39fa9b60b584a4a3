"""A report that fills every section of the page, of any size and with any names."""

import math
from collections.abc import Callable

from example_report import deployment, fidelity, latency, prepared, quality, report, row

from compressor.records.int8 import Distribution, Fallback, LayerNoise, PutBack, Quantization
from compressor.records.measurements import MetricInfo
from compressor.records.report import Reached, Report, Row, Verdict

VERDICTS = (
    Verdict(metric="size_ratio", limit=">= 2", status="met", message="size_ratio is 5"),
    Verdict(metric="latency_ratio", limit=">= 9", status="unmet", message="latency_ratio must be >= 9", level="warn"),
    Verdict(metric="agreement", limit=">= 0.9", status="undecidable", message="agreement is unknown"),
)


def everything(
    named: Callable[[str], str] = str, *, classes: int = 10, layers: int = 6, epochs: int = 30, prunings: int = 1
) -> Report:
    """A chain of trained, pruned and quantized rows, in which `named` makes every name that a user or a file gives."""
    metric = MetricInfo(name=named("accuracy"), unit="%", higher_is_better=True)
    paths = [named(f"blocks.{number}.conv") for number in range(layers)]

    def trained(stage: str, ratio: float, accuracy: float, *, channels: int) -> Row:
        return row(
            named(stage), size_bytes=int(1e6 / ratio), metrics={metric.name: accuracy}, timed=latency(ratio)
        ).model_copy(
            update={
                "losses": tuple(
                    {named("kd"): 5 * 0.9**epoch, named("hard"): 2 - epoch / 600} for epoch in range(epochs)
                ),
                "reached": (Reached(setting=named("pruning_ratio"), asked=0.5, achieved=0.49),),
                "channels": {path: channels - number % 7 for number, path in enumerate(paths)},
            }
        )

    baseline = trained("training", 1.0, 0.9912, channels=64)
    int8 = row(named("int8_ptq"), size_bytes=200_000, metrics={metric.name: 0.984}, timed=latency(6.6))
    kept = tuple(0.97 + 0.03 * math.sin(index) ** 2 for index in range(classes))
    lost = tuple(share - 0.02 * (index % 3) for index, share in enumerate(kept))
    rows = (
        baseline.model_copy(update={"quality": _quality(kept)}),
        trained("distillation", 3.1, 0.9861, channels=32),
        *(trained("pruning", 4 + number / 1000, 0.985, channels=32 - number) for number in range(1, prunings + 1)),
        int8.model_copy(
            update={
                "quality": _quality(lost),
                "fidelity": fidelity(),
                "quantization": _quantization(paths, metric),
            }
        ),
    )
    verdicts = tuple(one.model_copy(update={"message": named(one.message)}) for one in VERDICTS)
    return report(*rows, metrics=(metric,), overrides=(named("seed=1"),), verdicts=verdicts).model_copy(
        update={
            "pipeline": named("digits"),
            "settings": {named("name"): named("digits"), "stages": [{"stage": named("training")}]},
            "labels": tuple(named(f"class {index}") for index in range(classes)),
            "preparations": (prepared(named("soft_labels")),),
            "environment": {named("cpu"): named("Example 9000"), "cores": 2, "versions": {named("torch"): named("2")}},
        }
    )


def _quality(per_class_accuracy: tuple[float, ...]):
    return quality(0.99).model_copy(update={"per_class_accuracy": per_class_accuracy})


def _quantization(paths: list[str], metric: MetricInfo) -> Quantization:
    """Of layers of which the first makes no noise and the second gives float."""
    counts = tuple(int(1000 * math.exp(-((place - 8) ** 2) / 9)) for place in range(32))
    histogram = Distribution(low=-1.5, high=6.25, counts=counts, below=0.001, above=0.0125)
    layers = tuple(
        LayerNoise(
            layer=path,
            sqnr_db=30.0,
            alone_sqnr_db=20.0 + number if number else None,
            alone_value=0.98,
            histogram=None if number == 1 else histogram,
        )
        for number, path in enumerate(paths)
    )
    found = deployment(0.9).model_copy(update={"metric": metric})
    fallback = Fallback(
        max_drop=0.01,
        stopped="reached",
        steps=(PutBack(layer=paths[0], weights="int8", drop=0.05),),
        kept=1,
        before=found,
        added_bytes=1200,
        latency_ratio=0.8,
    )
    return Quantization(deployment=found, layers=layers, layer_samples=256, fallback=fallback)
