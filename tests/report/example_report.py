"""Reports to judge and to show: a chain of four rows, whose figures a test changes one at a time."""

from compressor.report.records import Latency, LatencySession, Measurement, MetricInfo, Report, Row, Verdict

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
