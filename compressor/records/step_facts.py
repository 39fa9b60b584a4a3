"""What the store keeps of a computed step: typed from the computation to the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from compressor.errors import StageError
from compressor.records.findings import Document, EpochLosses, Finding, Reached
from compressor.records.int8 import Quantization
from compressor.records.measurements import Fidelity, Measurement, Quality, Record


class Findings(Record):
    """All that a stage told the report."""

    losses: tuple[Mapping[str, float], ...] = ()
    """Mean of each loss by name, epoch by epoch."""
    reached: tuple[Reached, ...] = ()
    """The last of each setting."""
    quantization: Quantization | None = None
    documents: tuple[Document, ...] = ()


class ModelFacts(Record):
    """What was measured of the model that left a step."""

    file: str
    """Its ONNX file, relative to the entry."""
    measurement: Measurement
    channels: Mapping[str, PositiveInt]
    """Output channels of each layer with weights, by path; none for a model that is an ONNX file."""
    quality: Quality | None = None
    fidelity: Fidelity | None = None


class StepFacts(Record):
    """Everything that is known of a computed step."""

    stage: str
    parts: Mapping[str, Any]
    """What the key of the entry is a hash of."""
    artifact: str
    """Class of the model that left."""
    zeros: NonNegativeInt
    """Zeros that the model promises to keep."""
    seconds: float
    """What the stage took."""
    findings: Findings
    model: ModelFacts | None
    """None for a stage that kept its model."""


def collect_findings(told: Sequence[Finding]) -> Findings:
    """Sort what a stage told, in order, by kind. Raises StageError for a kind that no report shows."""
    losses: list[Mapping[str, float]] = []
    reached: dict[str, Reached] = {}
    quantization: Quantization | None = None
    documents: dict[str, Document] = {}
    for finding in told:
        match finding:
            case EpochLosses(means=means):
                losses.append(means)
            case Reached(setting=setting):
                reached[setting] = finding
            case Quantization():
                quantization = finding
            case Document(name=name):
                documents[name] = finding
            case _:
                msg = (
                    "context.report must be given EpochLosses, Reached, Quantization or Document, got "
                    f"{type(finding).__name__}"
                )
                raise StageError(msg)
    return Findings(
        losses=tuple(losses),
        reached=tuple(reached.values()),
        quantization=quantization,
        documents=tuple(documents.values()),
    )
