"""Int8 by calibration alone: a few hundred samples, no training."""

from collections.abc import Collection
from typing import Literal, Self, final

from pydantic import Field, model_validator
from torch.fx import GraphModule

from compressor.models.artifact import OnnxModel, TorchModel
from compressor.quantization.analysis import analyse
from compressor.quantization.calibration import LEAST_SAMPLES, calibration_samples
from compressor.quantization.deployment import deploy
from compressor.quantization.equalization import equalize
from compressor.quantization.fallback import Candidate, Limits, Quantize, put_back
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.int8_model import Int8Model
from compressor.quantization.int8_plan import plan_int8
from compressor.quantization.preparation import choose_samples, prepare_plan
from compressor.quantization.ranges import RangeMethod
from compressor.quantization.recipe import Recipe, Rounding, int8_model
from compressor.quantization.selection import select_layers
from compressor.quantization.speed import choose_fastest, islands
from compressor.quantization.targets import TARGETS, TargetName
from compressor.records.int8 import Quantization
from compressor.report.int8_summary import describe_deployment, describe_fallback
from compressor.stage import Stage, StageContext
from compressor.system.processes import broadcast, processes
from compressor.task import Task, evenly_spaced
from compressor.text.figures import list_names
from compressor.verdicts.limit import at_most


@final
class Int8Ptq(Stage[TorchModel, OnnxModel]):
    """Quantize to int8 by calibration alone: uint8 activations with one scale each, int8 weights with one or more."""

    version = 4
    target: TargetName = "portable"
    """Where the model will run. `portable` has 7-bit weights, whose sums fit on every CPU; the others have 8-bit
    weights, whose sums overflow on x86 CPUs without VNNI."""
    calibration_samples: int = Field(default=512, ge=LEAST_SAMPLES)
    """Samples of the calibration split that set the ranges of activations; all of them if there are fewer."""
    ranges: RangeMethod = "percentile"
    """How far the codes of an activation reach; what lies beyond is clipped. `percentile` clips a hundred-thousandth at
    each end, and is the one to start with. `mse` makes the rounding error least, clipping included: for networks of
    depthwise convolutions, Hardswish and the like. `minmax` clips nothing that was seen: where rare values decide.
    `moving_average` clips at what a batch of 64 reaches on average: for small sets with stray samples. `entropy` keeps
    the shape of the distribution and clips most: for wide tensors with long tails."""
    equalization: bool = False
    """Whether channels between two layers are scaled so that weights on both sides use their range."""
    bias_correction: bool = True
    """Whether biases take back the mean error of each channel."""
    rounding: Rounding = "nearest"
    """Whether weights go to the nearest integer, or up or down as their layer's outputs ask; that takes minutes."""
    keep_float: Literal["auto"] | tuple[str, ...] = ()
    """Paths of layers that stay in float, with all below them, or patterns: `*` and `**` as in `losses`. `auto`: layers
    that are slower in int8 than in float, measured under ONNX Runtime on this machine, compute in float; their weights
    are stored as int8 all the same."""
    validation_samples: int = Field(default=1000, gt=0)
    """Samples of the validation split on which the models in PyTorch and under ONNX Runtime are compared."""
    analysis: bool = False
    """Whether to measure what each layer does in int8, for the report: a run of the model per layer, which doubles the
    time of the stage. Where `max_drop` is exceeded it is done anyway."""
    max_drop: float | None = Field(default=None, ge=0)
    """Largest fall of the task's first metric on validation, in its own unit: 0.01 is one point of accuracy. Layers go
    back to float until it holds."""
    max_minutes: float | None = Field(default=None, gt=0)
    """With `max_drop`: stop putting layers back after this time, with the best model so far."""

    @model_validator(mode="after")
    def _has_a_drop_to_stop_at(self) -> Self:
        if self.max_minutes is not None and self.max_drop is None:
            msg = (
                "max_minutes limits the search for max_drop, but there is no max_drop; give it or leave out max_minutes"
            )
            raise ValueError(msg)
        return self

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> None:  # noqa: ARG002
        """Plan what becomes int8 and find the layers to keep in float."""
        calibration_samples(task.calibration, self.calibration_samples)
        graph = fold_batch_norms(float_graph(model.module, task))
        prepare_plan(graph, lambda _line: None, keep_float=self._select_floats(graph))

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> OnnxModel:
        """Return the int8 model in ONNX; `log` is told how far its outputs are from the float model's.

        Under torchrun the main process measures, as times differ between processes. Raises InputError if there is no
        calibration sample, an activation is not finite or `keep_float` names no layer, StageError if no layer can be
        int8, the model is quantized already, the export fails, or ONNX Runtime departs from PyTorch.
        """
        samples = choose_samples(task.calibration, self.calibration_samples, context.log)
        float_model = fold_batch_norms(float_graph(model.module, task))
        graph = equalize(float_model) if self.equalization else float_model
        kept, stored = self._choose_floats(graph, task, context)
        recipe = Recipe(self.target, self.ranges, self.rounding, self.bias_correction, context.seed)

        def quantize(keep_float: Collection[str], compute_float: Collection[str]) -> Int8Model:
            floats = {*kept, *keep_float}
            return int8_model(
                graph,
                task.calibration,
                samples,
                recipe,
                keep_float=floats,
                compute_float={*stored, *compute_float} - floats,
            )

        return self._deploy(quantize, model, task, context)

    def _select_floats(self, graph: GraphModule) -> tuple[str, ...]:
        return () if self.keep_float == "auto" else select_layers(plan_int8(graph)[1].layers, self.keep_float)

    def _choose_floats(
        self, graph: GraphModule, task: Task, context: StageContext
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Layers that stay as they are, and those of which the weights alone become int8."""
        kept = self._select_floats(graph)
        between = islands(*prepare_plan(graph, context.log, keep_float=kept))
        if between:
            context.log(
                f"computes in float between int8 layers: {list_names(between)}; what they give is rounded to uint8 "
                "where an int8 layer reads it"
            )
        if self.keep_float != "auto":
            return kept, ()
        limit = TARGETS[self.target].weight_limit
        decides = processes(context.device).is_main_process
        choice = broadcast(choose_fastest(graph, task, weight_limit=limit) if decides else None)
        context.log(str(choice))
        return (), choice.floats

    def _deploy(self, quantize: Quantize, model: TorchModel, task: Task, context: StageContext) -> OnnxModel:
        """Write the model, compare it with the float one, and put layers back if it is not good enough."""
        int8 = quantize((), ())
        rows = evenly_spaced(task.validation, self.validation_samples)
        candidate = Candidate(int8, *deploy(int8, model.predict, task, context.work_dir / "model.onnx", rows))
        context.log(describe_deployment(candidate.deployment))
        fell = self.max_drop is not None and not at_most(candidate.deployment.drop, self.max_drop)
        layers, layer_samples = analyse(int8, task) if self.analysis or fell else ((), 0)
        fallback = None
        if self.max_drop is not None and fell:
            candidate, fallback = put_back(
                candidate,
                layers,
                Limits(self.max_drop, self.max_minutes),
                quantize=quantize,
                model=model,
                task=task,
                rows=rows,
                work_dir=context.work_dir,
                log=context.log,
            )
            context.log(describe_fallback(fallback, candidate.deployment))
            context.log(describe_deployment(candidate.deployment))
        context.report(
            Quantization(deployment=candidate.deployment, layers=layers, layer_samples=layer_samples, fallback=fallback)
        )
        return candidate.onnx
