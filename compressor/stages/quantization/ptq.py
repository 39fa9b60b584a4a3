"""Int8 by calibration alone: a few hundred samples, no training."""

from typing import Literal, final

from pydantic import Field

from compressor.artifact import OnnxModel, TorchModel
from compressor.errors import InputError
from compressor.export import quiet_torch, to_onnx
from compressor.parity import output_error, spread
from compressor.stage import Stage, StageContext
from compressor.task import Task


@final
class Int8Ptq(Stage[TorchModel, OnnxModel]):
    """Quantize to int8 by calibration alone: uint8 activations per tensor, int8 weights per output channel."""

    target: Literal["portable", "x86-vnni"] = "portable"
    """Where the model will run. `portable` has 7-bit weights and gives the same outputs on every CPU; `x86-vnni` has
    8-bit weights, whose sums overflow on x86 CPUs without VNNI."""
    calibration_samples: int = Field(default=512, gt=0)
    """Samples of the calibration split that set the ranges of activations; all of them if there are fewer."""

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> OnnxModel:
        """Return the int8 model in ONNX; `log` is told how far its outputs are from the float model's.

        Raises InputError if there is no calibration sample or an activation is not finite, StageError if no layer can
        be int8 or the export fails.
        """
        samples = spread(task.calibration, self.calibration_samples)
        if not samples:
            msg = "the calibration split must have samples, got 0"
            raise InputError(msg)
        with quiet_torch():  # torchao takes seconds, and a run that finds this stage in the store needs none of it
            from compressor.stages.quantization.calibration import quantize  # noqa: PLC0415
            from compressor.stages.quantization.quantizer import WEIGHT_LIMITS, OnnxRuntimeQuantizer  # noqa: PLC0415

        quantizer = OnnxRuntimeQuantizer(WEIGHT_LIMITS[self.target])
        quantized = quantize(model.module, task, quantizer, samples=samples, log=context.log)
        exported = to_onnx(quantized, task, context.work_dir / "model.onnx")
        error = output_error(exported, model.predict, task.validation)
        context.log(f"calibrated on {len(samples)} samples; outputs differ from the float model's by {error:.1%} (RMS)")
        return exported
