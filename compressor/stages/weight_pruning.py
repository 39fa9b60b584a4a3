"""Single weights of small magnitude become zero: the file compresses better, but is not faster by itself."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.distillation.distillation_settings import DistillationSettings
from compressor.distillation.recovery import check_recovery, recover
from compressor.errors import StageError
from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import KeptZeros, zeros_of
from compressor.models.layers import is_within, paths_matching, shared_parameters
from compressor.models.weights import count_zeros
from compressor.pruning.conv1d import with_linears
from compressor.pruning.schedule import Schedule, division, ramp
from compressor.pruning.zeros import Allocation, pattern_mask, zero_masks
from compressor.records.findings import Reached
from compressor.stage import Stage, StageContext
from compressor.task import Inputs, Task

_CONVOLUTIONS = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


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
    """With `sparsity`, how it is shared out among the layers; `lamp` unless given."""
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
        if self.schedule is not None:
            if self.recovery is None:
                msg = "schedule needs a recovery, which trains between its steps"
                raise ValueError(msg)
            division(self.recovery.epochs, self.schedule.steps)
        return self

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:
        """Prune the model at once, and compare what it is with what recovery asks."""
        model = with_linears(model)
        weights = prunable_weights(model.module, task.example_inputs, protect=self.protect)
        pruned = self._pruned(model, weights, self.sparsity, log=lambda _line: None)
        check_recovery(pruned, reference, self.recovery, task)
        return pruned

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return a model with zeros. Raises StageError if weights cannot be pruned, or more are zero than asked."""
        model = with_linears(model)
        layers = prunable_weights(model.module, task.example_inputs, protect=self.protect)
        done = 0
        for sparsity, epochs in self._steps(model.module, layers):
            model = self._pruned(model, layers, sparsity, log=context.log)
            if self.recovery is not None:
                model = recover(model, self.recovery, task, context, epochs=epochs, first_epoch=done)
                done += epochs
        if self.sparsity is not None:
            achieved = _sparsity([model.module.get_parameter(name) for name in layers])
            context.report(Reached(setting="sparsity", asked=self.sparsity, achieved=achieved))
        return model

    def _steps(self, module: nn.Module, layers: Mapping[str, int]) -> list[tuple[float | None, int]]:
        """Sparsity that each step asks for, None for a pattern, and the epochs of recovery after it."""
        epochs = 0 if self.recovery is None else self.recovery.epochs
        if self.schedule is None or self.sparsity is None:
            return [(self.sparsity, epochs)]
        steps, start = self.schedule.steps, _sparsity([module.get_parameter(name) for name in layers])
        return list(
            zip(ramp(self.sparsity, steps, self.schedule.shape, start=start), division(epochs, steps), strict=True)
        )

    def _pruned(
        self, model: TorchModel, layers: Mapping[str, int], sparsity: float | None, *, log: Callable[[str], None]
    ) -> TorchModel:
        pruned = copy.deepcopy(model.module)
        weights = {name: pruned.get_parameter(name).detach() for name in layers}
        masks = (
            self._patterns(weights, layers, log)
            if sparsity is None
            else zero_masks(weights, sparsity, self.allocation or "lamp")
        )
        for name, mask in masks.items():
            weights[name].masked_fill_(mask, 0)
        shares = {name: _sparsity([weights[name]]) for name in masks}
        fewest, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
        asked = self.pattern if sparsity is None else f"{sparsity:.2%}"
        pruned_weights = [weights[name] for name in masks]
        log(
            f"{_sparsity(pruned_weights):.2%} of {sum(weight.numel() for weight in pruned_weights)} weights in "
            f"{len(masks)} tensors are zero, asked {asked}; from {shares[fewest]:.2%} ({fewest}) to "
            f"{shares[most]:.2%} ({most})"
        )
        zeros = {name: count_zeros(weights[name]) for name in masks}
        smaller = model.with_module(pruned)
        return smaller.with_attachment(KeptZeros.of(pruned, {**zeros_of(smaller), **zeros}))

    def _patterns(
        self, weights: Mapping[str, Tensor], layers: Mapping[str, int], log: Callable[[str], None]
    ) -> dict[str, Tensor]:
        n, m = map(int, str(self.pattern).split(":"))
        fitting = {name: weight for name, weight in weights.items() if weight.shape[layers[name]] % m == 0}
        others = [f"{name} ({weights[name].shape[layers[name]]})" for name in weights if name not in fitting]
        if not fitting:
            listed = ", ".join(others)
            msg = f"pattern {self.pattern} needs a layer whose input channels are a multiple of {m}, got {listed}"
            raise StageError(msg)
        if others:
            log(f"these stay dense, for their input channels are no multiple of {m}: {', '.join(others)}")
        return {name: pattern_mask(weight, n, m, input_dimension=layers[name]) for name, weight in fitting.items()}


def prunable_weights(module: nn.Module, example_inputs: Inputs, *, protect: tuple[str, ...] = ()) -> dict[str, int]:
    """Names of the weights that can become zero, each with its dimension of input channels.

    Raises InputError if a path of `protect` matches no layer; StageError if a weight that is not protected is frozen,
    computed from others, shared between modules, not finite or takes no part in the outputs, or if none is left.
    """
    protected = {path for pattern in protect for path in paths_matching(module, pattern)}
    found: dict[str, int] = {}
    for path, layer in module.named_modules():
        if not is_within(path, protected):
            prefix = f"{path}." if path else ""
            found |= {f"{prefix}{name}": dimension for name, dimension in _matrices(layer).items()}
    if not found:
        msg = f"{type(module).__name__} must have a convolution or linear layer that is not protected, got none"
        raise StageError(msg)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    _refuse("be parameters", "computed from others", [name for name in found if name not in parameters])
    weights = {name: parameters[name] for name in found}
    shared = shared_parameters(module)
    _refuse("have requires_grad", "frozen", [name for name, weight in weights.items() if not weight.requires_grad])
    several = dict.fromkeys(" = ".join(shared[name]) for name in weights if name in shared)
    _refuse("belong to one module", "shared", list(several))
    _refuse("be finite", "not", [name for name, weight in weights.items() if not weight.isfinite().all()])
    _refuse("take part in the outputs", "unused", _unused(module, weights, example_inputs))
    return found


def _matrices(layer: nn.Module) -> dict[str, int]:
    """Names of the weights of one layer, each with its dimension of input channels."""
    if isinstance(layer, _CONVOLUTIONS):
        return {"weight": 0 if isinstance(layer, _TRANSPOSED) else 1}
    if isinstance(layer, nn.Linear):
        return {"weight": 1}
    if isinstance(layer, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return {name: 1 for name in names if getattr(layer, name) is not None}
    return {}


def _unused(module: nn.Module, names: Iterable[str], example_inputs: Inputs) -> list[str]:
    # gradients, not hooks: attention reads the weight of its output layer without calling it
    trial = copy.deepcopy(module).eval()
    outputs: Tensor = trial(*example_inputs)
    if not outputs.requires_grad:
        return list(names)
    gradients = torch.autograd.grad(outputs.sum(), list(map(trial.get_parameter, names)), allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


def _refuse(rule: str, found: str, names: list[str]) -> None:
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        msg = f"weights must {rule} to be pruned, but these are {found}: {listed}; name their layers in protect"
        raise StageError(msg)


def _sparsity(weights: list[Tensor]) -> float:
    return sum(map(count_zeros, weights)) / sum(weight.numel() for weight in weights)
