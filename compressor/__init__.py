"""Compress PyTorch models: distillation, pruning, int8 quantization, ONNX export, honest measurement.

The public names load on first use, so that `import compressor` costs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.artifact import Artifact as Artifact
    from compressor.artifact import OnnxModel as OnnxModel
    from compressor.artifact import TorchModel as TorchModel
    from compressor.knowledge.distil import distil as distil
    from compressor.knowledge.losses import Losses as Losses
    from compressor.knowledge.response import distillation_loss as distillation_loss
    from compressor.sampling import TrainingData as TrainingData
    from compressor.stage import Stage as Stage
    from compressor.stage import StageContext as StageContext
    from compressor.task import Augmentation as Augmentation
    from compressor.task import Batch as Batch
    from compressor.task import Inputs as Inputs
    from compressor.task import Metric as Metric
    from compressor.task import Samples as Samples
    from compressor.task import Task as Task
    from compressor.task import accuracy as accuracy
    from compressor.training import LabelLoss as LabelLoss
    from compressor.training import fit as fit

_HOMES = {
    "Artifact": "artifact",
    "Augmentation": "task",
    "Batch": "task",
    "Inputs": "task",
    "LabelLoss": "training",
    "Losses": "knowledge.losses",
    "Metric": "task",
    "OnnxModel": "artifact",
    "Samples": "task",
    "Stage": "stage",
    "StageContext": "stage",
    "Task": "task",
    "TorchModel": "artifact",
    "TrainingData": "sampling",
    "accuracy": "task",
    "distil": "knowledge.distil",
    "distillation_loss": "knowledge.response",
    "fit": "training",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605  # one list, that of the homes


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module 'compressor' has no attribute {name!r}"
        raise AttributeError(msg)
    from compressor.plugins import load  # noqa: PLC0415  # plugins is the only use of importlib

    return load(f"compressor.{_HOMES[name]}:{name}")
