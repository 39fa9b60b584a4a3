"""Weights alone in 4 or 8 bits: for language models, whose files are nearly all weights."""

from typing import Literal, final

from torch.fx import GraphModule

from compressor.errors import StageError
from compressor.export.parity import check_parity, output_error
from compressor.export.to_onnx import to_unchecked_onnx
from compressor.models.artifact import OnnxModel, TorchModel
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.int8_model import predict
from compressor.quantization.weight_blocks import WeightPlan, plan_weights, with_weights
from compressor.stage import Stage, StageContext
from compressor.task import Task
from compressor.text.figures import list_names

_TOLERANCE = 0.1
"""Largest relative error between PyTorch and ONNX Runtime, which may round the inputs of layers to int8: 0.013 for two
blocks of GPT-2, while a wrong operator makes about 1."""


@final
class WeightOnly(Stage[TorchModel, OnnxModel]):
    """Quantize the weights of linear layers to 4 or 8 bits, a scale per block of inputs; nothing is calibrated.

    ONNX Runtime multiplies them as they are (MatMulNBits). Other weights are stored as int8, a scale per channel.
    """

    bits: Literal[4, 8] = 8
    """Of each weight. 4 for large language models, which bear it: small ones lose much."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Inputs of an output channel that share a scale: fewer are more exact, and take 4 bytes more each. Layers whose
    inputs do not fill the last block are stored as int8."""

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> None:  # noqa: ARG002
        """Find the layers whose weights fit."""
        self._plan(fold_batch_norms(float_graph(model.module, task)))

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> OnnxModel:
        """Return the model in ONNX; `log` is told how far its outputs are from the float model's.

        Raises StageError if no layer fits, the model is quantized already, the export fails, or ONNX Runtime departs
        from PyTorch.
        """
        graph = fold_batch_norms(float_graph(model.module, task))
        plan = self._plan(graph)
        quantized = with_weights(graph, plan, self.bits, self.block_size)
        exported = to_unchecked_onnx(quantized, task, context.work_dir / "model.onnx")
        check_parity(exported, lambda inputs: predict(quantized, inputs), task.validation, tolerance=_TOLERANCE)
        context.log(f"{len(plan.blocks)} linear layers have weights of {self.bits} bits")
        if plan.stored:
            context.log(f"weights stored as int8: {list_names([unit.layer for unit in plan.stored])}")
        error = output_error(exported, model.predict, task.validation)
        context.log(f"outputs differ from the float model's by {error:.1%} (RMS)")
        return exported

    def _plan(self, graph: GraphModule) -> WeightPlan:
        plan = plan_weights(graph, self.block_size)
        if not plan.blocks:
            found = f", but got {list_names([unit.layer for unit in plan.stored])}" if plan.stored else ", but got none"
            msg = f"weight_only needs a linear layer whose inputs are a multiple of block_size={self.block_size}{found}"
            raise StageError(msg)
        return plan
