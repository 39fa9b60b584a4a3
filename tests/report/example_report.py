"""Reports to judge and to show: a chain of four rows, whose figures a test changes one at a time."""

from compressor.records.int8 import Deployment
from compressor.records.measurements import (
    ClassFall,
    Fidelity,
    Latency,
    LatencySession,
    Measurement,
    MetricInfo,
    Quality,
    SampleFall,
)
from compressor.records.report import Preparation, Report, Row, Verdict

ACCURACY = MetricInfo(name="accuracy", unit="%", higher_is_better=True)
LOSS = MetricInfo(name="loss", unit="nats", higher_is_better=False)


def latency(ratio: float, half_width: float = 0.01) -> Latency:
    return Latency(
        p50_ms=0.1 / ratio, ratio=ratio, ratio_low=ratio / (1 + half_width), ratio_high=ratio * (1 + half_width)
    )


BASELINE = Latency(p50_ms=0.1, ratio=1.0, ratio_low=1.0, ratio_high=1.0)


def row(
    stage: str,
    *,
    size_bytes: int = 100_000,
    transfer_bytes: int = 80_000,
    parameters: int = 25_000,
    nonzero: int = 25_000,
    metrics: dict[str, float] | None = None,
    timed: Latency | None = BASELINE,
) -> Row:
    measurement = Measurement(
        size_bytes=size_bytes,
        transfer_bytes=transfer_bytes,
        parameters=parameters,
        nonzero=nonzero,
        macs=1_000_000,
        metrics=metrics or {"accuracy": 0.99},
        samples=10_000,
    )
    return Row(
        stage=stage,
        settings={},
        key="0" * 64,
        model_file=f"{stage}/model.onnx",
        measurement=measurement,
        latency=timed,
        seconds=1.5,
        reused=False,
    )


def prepared(stage: str = "soft_labels", *, reused: bool = False) -> Preparation:
    return Preparation(stage=stage, settings={"views": 4}, key="1" * 64, seconds=12.34, reused=reused)


def report(
    *rows: Row,
    metrics: tuple[MetricInfo, ...] = (ACCURACY,),
    noise: Latency | None = None,
    overrides: tuple[str, ...] = (),
    verdicts: tuple[Verdict, ...] = (),
) -> Report:
    session = LatencySession(
        batch_size=1, threads=1, rounds=25, calls=1000, seconds=7.4, noise=noise or latency(1.0, 0.002)
    )
    return Report(
        pipeline="digits",
        settings={"name": "digits", "seed": 0},
        overrides=overrides,
        metrics=metrics,
        rows=rows,
        latency_session=session,
        environment={"cpu": "Example 9000", "cores": 2, "versions": {"onnxruntime": "1.22.0"}, "cpu_governor": None},
        verdicts=verdicts,
    )


def quality(accuracy: float) -> Quality:
    return Quality(
        samples=9_990,
        top_k={1: accuracy, 5: 0.9991},
        macro_f1=accuracy - 0.001,
        per_class_accuracy=(accuracy, None, 0.5, 0.25, 1.0, 0.0),
        expected_calibration_error=0.0123,
    )


def fidelity(agreement: float = 0.9832) -> Fidelity:
    return Fidelity(
        agreement=agreement,
        kl_divergence=0.04567,
        worst_classes=(
            ClassFall(target=1, samples=1_200, baseline_accuracy=0.95, accuracy=0.9),
            ClassFall(target=7, samples=3, baseline_accuracy=2 / 3, accuracy=1 / 3),
        ),
        worst_samples=(
            SampleFall(
                index=4_711, target=1, baseline_predicted=1, predicted=0, baseline_probability=0.97, probability=0.02
            ),
        ),
    )


def classifiers(labels: tuple[str, ...] = ("cat", "dog"), lost: Fidelity | None = None) -> Report:
    """A baseline classifier and the model that a run delivers in its place."""
    baseline, delivered = row("training"), row("int8_ptq", size_bytes=25_000, timed=latency(4.0))
    rows = (
        baseline.model_copy(update={"quality": quality(0.99)}),
        delivered.model_copy(update={"quality": quality(0.98), "fidelity": lost or fidelity()}),
    )
    return report(*rows).model_copy(update={"labels": labels})


def deployment(value: float) -> Deployment:
    return Deployment(
        samples=1000,
        metric=ACCURACY,
        float_value=0.92,
        simulated_value=value + 0.001,
        deployed_value=value,
        sqnr_db=21.44,
        difference=0.0123,
        tolerance=0.05,
        agreement=0.998,
        departures=0.001,
    )


def chain() -> Report:
    """Distilled, pruned to zeros without becoming smaller, quantized to something small, but slower than before."""
    return report(
        row("training", size_bytes=1_724_000, transfer_bytes=1_580_000, parameters=431_080, nonzero=431_080),
        row("distillation", size_bytes=58_000, transfer_bytes=52_000, timed=latency(4.1)),
        row(
            "zeroing",
            size_bytes=58_000,
            transfer_bytes=31_000,
            nonzero=12_500,
            metrics={"accuracy": 0.9902},
            timed=latency(4.12),
        ),
        row(
            "int8_ptq",
            size_bytes=14_200,
            transfer_bytes=11_000,
            nonzero=12_400,
            metrics={"accuracy": 0.9881},
            timed=latency(3.2),
        ),
    )
