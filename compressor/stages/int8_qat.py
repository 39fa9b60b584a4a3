"""Int8 after training with rounded weights and activations: for accuracy that calibration alone does not reach."""

from collections.abc import Mapping
from math import ceil
from typing import Self, final

from pydantic import Field, model_validator
from torch.fx import GraphModule

from compressor.distillation.distil import Student, distil
from compressor.distillation.distillation_settings import DistillationFields
from compressor.distillation.losses import Hard, Kd, Losses
from compressor.distillation.setup import check_fit
from compressor.models.artifact import OnnxModel, TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.quantization.calibration import LEAST_SAMPLES, calibrate, calibration_samples
from compressor.quantization.codes import Range
from compressor.quantization.conversion import affine_of, round_weights
from compressor.quantization.deployment import deploy
from compressor.quantization.float_graph import copy_graph, float_graph, fold_batch_norms
from compressor.quantization.int8_model import Int8Model
from compressor.quantization.int8_plan import Int8Plan
from compressor.quantization.preparation import choose_samples, prepare_plan
from compressor.quantization.ranges import RangeMethod
from compressor.quantization.simulation import read_ranges, simulate
from compressor.quantization.targets import TARGETS, TargetName
from compressor.records.int8 import Quantization
from compressor.report.int8_summary import describe_deployment
from compressor.stage import Stage, StageContext
from compressor.system.processes import broadcast, processes
from compressor.task import Task, evenly_spaced
from compressor.training.settings import Optimizer


@final
class Int8Qat(DistillationFields, Stage[TorchModel, OnnxModel]):
    """Train with weights and activations rounded as int8 rounds them, then quantize: same operators as `int8_ptq`.

    It distils from the baseline unless `losses` names `hard` alone. Dropout takes no part.
    """

    version = 4
    target: TargetName = "portable"
    """As in `int8_ptq`."""
    calibration_samples: int = Field(default=512, ge=LEAST_SAMPLES)
    """Samples of the calibration split that set the ranges of activations from which training starts."""
    ranges: RangeMethod = "percentile"
    """As in `int8_ptq`; from there on ranges follow the smallest and largest values of batches, until the freeze."""
    validation_samples: int = Field(default=1000, gt=0)
    """As in `int8_ptq`."""
    freeze: float = Field(default=1.0, ge=0, le=1)
    """Share of the epochs, the last, rounded up, in which BatchNorm's statistics and the ranges stand still, so that
    weights settle to the numbers that the int8 model has. At 1 they stay what they were at the start, which is best for
    a few epochs; less lets them follow the weights at first."""
    losses: Losses = Losses(kd=Kd(), hard=Hard())
    """Of outputs alone: the layers of a graph that is traced have no names."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-4)
    """Its schedule begins where the freeze does: until then the step size stays at `learning_rate`."""

    @model_validator(mode="after")
    def _looks_at_outputs(self) -> Self:
        if self.losses.of_features:
            names = ", ".join(self.losses.of_features)
            msg = (
                f"losses must compare outputs, got {names}, which look into layers: int8 is trained on a traced graph, "
                "which has none; give kd, hard or another loss of outputs"
            )
            raise ValueError(msg)
        return self

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> None:
        """Plan what becomes int8, and compare the model with what training asks."""
        calibration_samples(task.calibration, self.calibration_samples)
        prepare_plan(float_graph(model.module, task), lambda _line: None)
        check_fit(model, reference, task, self)

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> OnnxModel:
        """Return the int8 model in ONNX; `log` is told how far its outputs are from the float model's.

        Under torchrun the main process calibrates. Raises what `Int8Ptq.apply` and `distil` raise.
        """
        decides = processes(context.device).is_main_process
        samples = choose_samples(task.calibration, self.calibration_samples, context.log)
        graph, plan = prepare_plan(float_graph(model.module, task), context.log)
        ranges = broadcast(calibrate(graph, plan, task.calibration, samples, self.ranges) if decides else None)
        graph, ranges = self._train(graph, plan, ranges, model=model, task=task, context=context)
        graph, plan = prepare_plan(fold_batch_norms(graph), lambda _line: None)
        affines = affine_of(plan, ranges)
        weights = round_weights(graph, plan, affines, TARGETS[self.target].weight_limit)
        int8, rows = Int8Model(graph, plan, affines, weights), evenly_spaced(task.validation, self.validation_samples)
        exported, deployment = deploy(int8, model.predict, task, context.work_dir / "model.onnx", rows)
        context.log(describe_deployment(deployment))
        context.report(Quantization(deployment=deployment))
        return exported

    def _train(
        self,
        graph: GraphModule,
        plan: Int8Plan,
        ranges: Mapping[str, Range],
        *,
        model: TorchModel,
        task: Task,
        context: StageContext,
    ) -> tuple[GraphModule, Mapping[str, Range]]:
        """Return `graph` on trained tensors, and the ranges of its activations.

        The loop knows no freeze, so it runs twice: first on a graph that follows the batches, then on one that does
        not. One course of the step size spans both: its height is kept in the first and comes down in the second.
        """
        frozen = ceil(self.epochs * self.freeze)
        steady = self.optimizer.model_copy(update={"schedule": "constant"}) if frozen else self.optimizer
        for live, epochs, optimizer in ((True, self.epochs - frozen, steady), (False, frozen, self.optimizer)):
            if not epochs:
                continue
            simulation = simulate(graph, plan, ranges, TARGETS[self.target].weight_limit, live=live)
            settings = self.model_copy(update={"epochs": epochs, "optimizer": optimizer})
            student, first = Student(simulation, _zeros(graph, model)), 0 if live else self.epochs - frozen
            trained = distil(student, context.reference, task, settings, context, first_epoch=first)
            assert isinstance(trained, GraphModule)
            graph, ranges = copy_graph(graph, trained), read_ranges(trained) if live else ranges
        return graph, ranges


def _zeros(graph: GraphModule, model: TorchModel) -> list[str]:
    """Names of the parameters of `graph` whose zeros are promised, or that are computed from such parameters."""
    own, zeros = dict(model.module.named_parameters()), zeros_of(model)
    return [name for name, _ in graph.named_parameters() if zeros and (name in zeros or name not in own)]
