"""Single weights of small magnitude become zero: the file compresses better, but is not faster by itself."""

from collections.abc import Callable, Collection, Mapping
from typing import Literal, Self, final

from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.distillation.distillation_settings import DistillationSettings
from compressor.distillation.recovery import check_recovery, recover
from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import KeptZeros, zeros_of
from compressor.models.layers import layer_paths
from compressor.models.weights import count_zeros
from compressor.pruning.conv1d import with_linears
from compressor.pruning.kept import list_reasons
from compressor.pruning.prunable_weights import prunable_weights
from compressor.pruning.schedule import Schedule, check_schedule, divide_epochs, list_levels
from compressor.pruning.zeros import Allocation, pattern_masks, share_of_zeros, zero_masks
from compressor.records.findings import Reached
from compressor.stage import Stage, StageContext
from compressor.system.copying import copy_module
from compressor.task import Task
from compressor.text.figures import list_names


@final
class WeightPruning(Stage[TorchModel, TorchModel]):
    """Set the weights of smallest magnitude to zero, then recover; every later stage keeps these zeros.

    The weights are those of all convolutions, linear layers and attention projections, the output layer among them;
    biases, normalization and embeddings stay as they are.
    """

    attaches = (KeptZeros,)

    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """Share of the weights that are zero in the end, those that are zero already among them."""
    pattern: Literal["2:4", "4:8"] | None = None
    """Instead of `sparsity`: so many of each 4 or 8 consecutive input channels keep their weight. Comes after
    `magnitude_pruning`, which would break these groups up: their zeros stay, the pattern does not."""
    allocation: Allocation | None = None
    """With `sparsity`, how it is shared out among the layers; `lamp` unless given. `lamp`: the smallest of all become
    zero, where the square of a weight counts as a share of those in its layer that are not smaller (Lee et al. 2021);
    `erk`: the more weights a layer has for its dimensions, the larger the share that it loses (Evci et al. 2020);
    `global`: the smallest of all become zero; `uniform`: every layer loses the same share."""
    schedule: Schedule | None = None
    """With `sparsity` and `recovery`: prune in steps; all at once unless given."""
    protect: tuple[str, ...] = ()
    """Paths of layers that stay as they are with all below them; `*` and `**` as in `losses`."""
    recovery: DistillationSettings | None = None
    """Training after pruning, by distillation from the baseline unless `losses` names `hard` alone."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            msg = "give either sparsity or pattern, " + ("got neither" if self.pattern is None else "got both")
            raise ValueError(msg)
        if self.pattern is not None and (self.allocation is not None or self.schedule is not None):
            msg = "allocation and schedule go with sparsity: a pattern is the same in every layer, and set at once"
            raise ValueError(msg)
        check_schedule(self.schedule, None if self.recovery is None else self.recovery.epochs)
        return self

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:
        """Prune the model at once, and compare it with what recovery asks."""
        model = with_linears(model)
        dimensions = prunable_weights(model.module, task.example_inputs, protect=self.protect).dimensions
        pruned = self._prune(model, dimensions, self.sparsity, log=lambda _line: None)
        check_recovery(pruned, reference, self.recovery, task)
        return pruned

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return a model with zeros. Raises StageError if weights cannot be pruned, or more are zero than asked."""
        model = with_linears(model)
        prunable = prunable_weights(model.module, task.example_inputs, protect=self.protect)
        for line in list_reasons(prunable.dense, layer_paths(model.module)):
            context.log(f"stay dense: {line}")
        dimensions = prunable.dimensions
        done = 0
        for sparsity, epochs in self._steps(model.module, dimensions):
            model = self._prune(model, dimensions, sparsity, log=context.log)
            if self.recovery is not None:
                model = recover(model, self.recovery, task, context, epochs=epochs, first_epoch=done)
                done += epochs
        if self.sparsity is not None:
            achieved = _sparsity(model.module, dimensions)
            context.report(Reached(setting="sparsity", asked=self.sparsity, achieved=achieved))
        return model

    def _steps(self, module: nn.Module, names: Collection[str]) -> list[tuple[float | None, int]]:
        """Sparsity that each step asks for, None for a pattern, and the epochs of recovery after it."""
        epochs = 0 if self.recovery is None else self.recovery.epochs
        if self.schedule is None or self.sparsity is None:
            return [(self.sparsity, epochs)]
        steps, shape = self.schedule.steps, self.schedule.shape
        sparsities = list_levels(self.sparsity, steps, shape, start=_sparsity(module, names))
        return list(zip(sparsities, divide_epochs(epochs, steps), strict=True))

    def _prune(
        self, model: TorchModel, dimensions: Mapping[str, int], sparsity: float | None, *, log: Callable[[str], None]
    ) -> TorchModel:
        """Set weights of a copy to zero; `dimensions` are those of `prunable_weights`."""
        module = copy_module(model.module)
        weights = {name: module.get_parameter(name).detach() for name in dimensions}
        if sparsity is None:
            n, m = map(int, str(self.pattern).split(":"))
            masks = pattern_masks(weights, dimensions, n, m)
            dense = [f"{name} ({weights[name].shape[dimensions[name]]})" for name in weights if name not in masks]
            if dense:
                log(f"these stay dense, for their input channels are no multiple of {m}: {list_names(dense)}")
        else:
            masks = zero_masks(weights, sparsity, self.allocation or "lamp")
        for name, mask in masks.items():
            weights[name].masked_fill_(mask, 0)
        pruned = {name: weights[name] for name in masks}
        log(_describe(pruned, str(self.pattern) if sparsity is None else f"{sparsity:.2%}"))
        smaller = model.with_module(module)
        zeros = {name: count_zeros(weight) for name, weight in pruned.items()}
        return smaller.with_attachment(KeptZeros.of(module, {**zeros_of(smaller), **zeros}))


def _sparsity(module: nn.Module, names: Collection[str]) -> float:
    return share_of_zeros([module.get_parameter(name) for name in names])


def _describe(weights: Mapping[str, Tensor], asked: str) -> str:
    shares = {name: share_of_zeros([weight]) for name, weight in weights.items()}
    fewest, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    return (
        f"{share_of_zeros(weights.values()):.2%} of {sum(weight.numel() for weight in weights.values())} weights in "
        f"{len(weights)} tensors are zero, asked {asked}; from {shares[fewest]:.2%} ({fewest}) to "
        f"{shares[most]:.2%} ({most})"
    )
