"""One step of training after another: from a batch to weights that have moved, in one process or in several."""

import functools
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compressor.errors import StageError
from compressor.system.copying import copy_module
from compressor.training.objective import Objective
from compressor.training.sampling import TrainingBatch
from compressor.training.settings import Optimizer, learning_rate


@final
@dataclass(frozen=True)
class Descent:
    """A module of its own that each step moves towards a lower objective; made by `begin_descent`.

    `steps` is how many there will be. `masks` are the weights whose zeros stay, each with the places of its zeros.
    """

    module: nn.Module
    objective: Objective
    optimizer: Optimizer
    moving: torch.optim.Optimizer
    masks: Sequence[tuple[Tensor, Tensor]]
    steps: int
    accelerator: Accelerator

    def step(self, number: int, batch: TrainingBatch) -> dict[str, Tensor]:
        """Move the weights by the step `number` in [0, `steps`); return the mean of each loss before it, by name.

        Raises StageError if a loss is not finite.
        """
        rate, progress = learning_rate(self.optimizer, number, self.steps), number / max(1, self.steps - 1)
        for group in self.moving.param_groups:
            group["lr"] = rate
        means = _mean_losses(self.module, self.objective, batch, progress, self.accelerator)
        weights = self.objective.weights(progress)
        total = functools.reduce(operator.add, (weight * means[name] for name, weight in weights.items()))
        _check_finite(total, means, self._place(number))
        # Only float16 needs Accelerate here. Elsewhere it costs 0.2 ms a step, for it searches the import path.
        if self.accelerator.scaler is None:
            torch.autograd.backward(total)
        else:
            self.accelerator.backward(total)
        if self.accelerator.num_processes > 1:
            _average([p.grad for p in self.module.parameters() if p.grad is not None], self.accelerator)
        self.moving.step()
        for weight, mask in self.masks:  # momentum and weight decay move zeros as well
            weight.masked_fill_(mask, 0)
        self.moving.zero_grad()
        return {name: mean.detach() for name, mean in means.items()}

    def finish(self) -> nn.Module:
        """Return the module on the CPU, in eval mode, after its last step.

        Raises StageError if a weight is not finite.
        """
        if self.accelerator.num_processes > 1:
            _average([buffer for buffer in self.module.buffers() if buffer.is_floating_point()], self.accelerator)
        _check_weights(self.module, self._place(self.steps - 1))
        return self.module.cpu().eval()

    def _place(self, number: int) -> str:
        rate = learning_rate(self.optimizer, number, self.steps)
        return f"step {number + 1}/{self.steps}, learning rate {rate:.3g}"


def begin_descent(
    module: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    *,
    zeros: Collection[str],
    steps: int,
    accelerator: Accelerator,
) -> Descent:
    """Copy `module` to the device of `accelerator`, in training mode, and make the optimizer of its weights.

    Raises StageError if no parameter may move.
    """
    trained = copy_module(module).train().to(accelerator.device)
    moving = _torch_optimizer(trained, optimizer)
    masks = [(weight.detach(), weight == 0) for weight in map(trained.get_parameter, zeros)]
    if accelerator.scaler is not None:  # for the same reason as in `Descent.step`
        moving = accelerator.prepare_optimizer(moving)
    return Descent(trained, objective, optimizer, moving, masks, steps, accelerator)


def _torch_optimizer(module: nn.Module, optimizer: Optimizer) -> torch.optim.Optimizer:
    free = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not free:
        msg = "a model to train must have a parameter with requires_grad, got none"
        raise StageError(msg)
    groups = [
        {"params": [parameter for parameter in free if parameter.ndim > 1], "weight_decay": optimizer.weight_decay},
        {"params": [parameter for parameter in free if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if optimizer.name == "sgd":
        nesterov = optimizer.momentum > 0
        return torch.optim.SGD(groups, lr=optimizer.learning_rate, momentum=optimizer.momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=(optimizer.momentum, 0.999))


def _mean_losses(
    module: nn.Module, objective: Objective, batch: TrainingBatch, progress: float, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Mean of each loss over what counts. The mean of it over processes is the mean over the global batch."""
    there = _on_device(batch, accelerator.device)
    with accelerator.autocast():
        losses = objective.losses(module, there, progress)
    counts: dict[int, Tensor] = {}
    means = {}
    for name, values in losses.items():
        if there.counted is None or values.shape[1:] != there.counted.shape[1:]:
            means[name] = values.float().mean()
            continue
        counted = there.counted[: len(values)]
        if len(values) not in counts:
            count = counted.sum().float()
            counts[len(values)] = accelerator.reduce(count, "mean") if accelerator.num_processes > 1 else count
        # A share of a process may be less than one sample; where nothing counts anywhere, the sum is 0.
        means[name] = (values.float() * counted).sum() / counts[len(values)].clamp(min=1 / accelerator.num_processes)
    return means


def _on_device(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
    return batch._replace(
        inputs=tuple(tensor.to(device) for tensor in batch.inputs),
        targets=batch.targets.to(device),
        counted=None if batch.counted is None else batch.counted.to(device),
    )


def _average(tensors: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Replace each tensor, in place, by its mean over the processes.

    torch's DistributedDataParallel would do it while gradients still flow. But it fails where a loss leaves part of a
    model out, as a hint from a middle layer does.
    """
    if not tensors:
        return
    together = accelerator.reduce(torch.cat([tensor.detach().flatten() for tensor in tensors]), "mean")
    for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(mean.view_as(tensor))


def _check_finite(total: Tensor, means: Mapping[str, Tensor], place: str) -> None:
    if not math.isfinite(total.item()):
        losses = ", ".join(f"{name} {value.item():.3g}" for name, value in means.items())
        msg = f"losses must be finite, got {losses} at {place}; lower the learning rate or look at the data"
        raise StageError(msg)


def _check_weights(module: nn.Module, place: str) -> None:
    """Look at what the last step did, which no loss has seen."""
    for name, weight in module.named_parameters():
        if weight.requires_grad and not weight.isfinite().all():
            msg = f"weights must be finite, got NaN or infinity in {name!r} after {place}; lower the learning rate"
            raise StageError(msg)
