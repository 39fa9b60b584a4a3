"""Compress PyTorch models: distillation, pruning, int8 quantization, ONNX export, honest measurement.

The public names load on first use, so that `import compressor` costs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.distillation.distil import Student as Student
    from compressor.distillation.distil import distil as distil
    from compressor.distillation.distillation_settings import DistillationSettings as DistillationSettings
    from compressor.distillation.losses import Losses as Losses
    from compressor.distillation.response import distillation_loss as distillation_loss
    from compressor.errors import InputError as InputError
    from compressor.errors import StageError as StageError
    from compressor.models.artifact import Artifact as Artifact
    from compressor.models.artifact import OnnxModel as OnnxModel
    from compressor.models.artifact import TorchModel as TorchModel
    from compressor.models.attachment import Attachment as Attachment
    from compressor.models.edits import Edit as Edit
    from compressor.models.edits import structural_edits as structural_edits
    from compressor.models.ensemble import ensemble as ensemble
    from compressor.models.kept_zeros import zeros_of as zeros_of
    from compressor.records.findings import Document as Document
    from compressor.records.findings import EpochLosses as EpochLosses
    from compressor.records.findings import Finding as Finding
    from compressor.records.findings import Reached as Reached
    from compressor.references.reference import Reference as Reference
    from compressor.stage import Stage as Stage
    from compressor.stage import StageContext as StageContext
    from compressor.task import Augmentation as Augmentation
    from compressor.task import Batch as Batch
    from compressor.task import Inputs as Inputs
    from compressor.task import Metric as Metric
    from compressor.task import Samples as Samples
    from compressor.task import Task as Task
    from compressor.task import accuracy as accuracy
    from compressor.training.fit import fit as fit
    from compressor.training.objective import LabelLoss as LabelLoss
    from compressor.training.objective import Objective as Objective
    from compressor.training.sampling import TrainingBatch as TrainingBatch
    from compressor.training.sampling import TrainingData as TrainingData
    from compressor.training.settings import Optimizer as Optimizer
    from compressor.training.settings import TrainingSettings as TrainingSettings

_HOMES = {
    "Artifact": "models.artifact",
    "Attachment": "models.attachment",
    "Augmentation": "task",
    "Batch": "task",
    "DistillationSettings": "distillation.distillation_settings",
    "Document": "records.findings",
    "Edit": "models.edits",
    "EpochLosses": "records.findings",
    "Finding": "records.findings",
    "InputError": "errors",
    "Inputs": "task",
    "LabelLoss": "training.objective",
    "Losses": "distillation.losses",
    "Metric": "task",
    "Objective": "training.objective",
    "OnnxModel": "models.artifact",
    "Optimizer": "training.settings",
    "Reached": "records.findings",
    "Reference": "references.reference",
    "Samples": "task",
    "Stage": "stage",
    "StageContext": "stage",
    "StageError": "errors",
    "Student": "distillation.distil",
    "Task": "task",
    "TorchModel": "models.artifact",
    "TrainingBatch": "training.sampling",
    "TrainingData": "training.sampling",
    "TrainingSettings": "training.settings",
    "accuracy": "task",
    "distil": "distillation.distil",
    "distillation_loss": "distillation.response",
    "ensemble": "models.ensemble",
    "fit": "training.fit",
    "structural_edits": "models.edits",
    "zeros_of": "models.kept_zeros",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605  # one list, that of the homes


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module 'compressor' has no attribute {name!r}"
        raise AttributeError(msg)
    from compressor.references.reference import load  # noqa: PLC0415  # `reference` is the only use of importlib

    return load(f"compressor.{_HOMES[name]}:{name}")
