"""The file to deliver: ONNX that says what it is, checked against the model it came from."""

from typing import final

import onnx
from pydantic import Field

from compressor.export.parity import SAME_GRAPH_TOLERANCE, check_parity
from compressor.export.to_onnx import task_metadata, to_onnx
from compressor.models.artifact import OnnxModel, TorchModel
from compressor.onnx_files.writing import with_metadata, write
from compressor.stage import Stage, StageContext
from compressor.task import Task


@final
class OnnxExport(Stage[TorchModel | OnnxModel, OnnxModel]):
    """Write the model as ONNX with its name, version, labels and preprocessing among the file's metadata."""

    model_name: str = Field(default="model", min_length=1)
    """Stored in the file as `name`."""
    model_version: str = Field(default="1", min_length=1)
    """Stored in the file as `version`."""

    def apply(self, model: TorchModel | OnnxModel, task: Task, context: StageContext) -> OnnxModel:
        """Return the described model.

        Raises StageError if it cannot be exported or gives other outputs than before, InputError if ONNX Runtime cannot
        run it at every batch size.
        """
        described = {"name": self.model_name, "version": self.model_version}
        path = context.work_dir / "model.onnx"
        if isinstance(model, TorchModel):
            return to_onnx(model.module, task, path, metadata=described)
        write(with_metadata(onnx.load(model.path), {**task_metadata(task), **described}), path)
        exported = OnnxModel(path)
        check_parity(exported, model.predict, task.validation, tolerance=SAME_GRAPH_TOLERANCE)
        return exported
