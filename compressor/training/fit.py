"""`fit`, the one training loop: training, distillation, recovery and quantization-aware training run through it."""

import copy
import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from compressor.errors import StageError
from compressor.system.processes import processes
from compressor.training.sampling import TrainingBatch, TrainingData, draws, training_batches


class Objective(Protocol):
    """What `fit` lowers: the weighted sum of the means of some losses."""

    def weights(self, progress: float) -> Mapping[str, float]:
        """Weight by name of each loss; `progress` goes from 0 at the first step to 1 at the last."""

    def losses(self, module: nn.Module, batch: TrainingBatch, progress: float) -> Mapping[str, Tensor]:
        """Values by name of each loss, one per sample that it applies to, (N,), or per token, (N, L).

        A loss that needs labels gives values of the labeled samples alone.
        """


@final
@dataclass(frozen=True)
class LabelLoss:
    """The task's own loss against the labels, as an objective."""

    loss: Callable[[Tensor, Tensor], Tensor]

    def weights(self, progress: float) -> Mapping[str, float]:  # noqa: ARG002  # the weight is the same all along
        """One loss, in full."""
        return {"hard": 1.0}

    def losses(self, module: nn.Module, batch: TrainingBatch, progress: float) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Its value for each sample."""
        return {"hard": self.loss(module(*batch.inputs), batch.targets)}


class Optimizer(BaseModel):
    """How weights move: the algorithm, its step size, and the course of the step size over the whole fit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    """The largest step size, reached after `warmup`."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Applied to matrices and kernels, not to biases and normalization."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd (Nesterov); beta 1 of adamw."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From `learning_rate` down to zero, or not at all."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps during which the step size grows linearly from zero."""


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """Step size of `step` in [0, `steps`)."""
    warmup_steps = optimizer.warmup * steps
    if step < warmup_steps:
        return optimizer.learning_rate * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
    remaining = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return optimizer.learning_rate * remaining[optimizer.schedule]


def fit(
    module: nn.Module,
    objective: Objective,
    data: TrainingData,
    *,
    epochs: int,
    batch_size: int,
    optimizer: Optimizer,
    seed: int,
    device: torch.device,
    log: Callable[[str], None],
    record: Callable[[Mapping[str, float]], None] = lambda _means: None,
    zeros: Collection[str] = (),
    first_epoch: int = 0,
) -> nn.Module:
    """Train a copy of `module` to lower `objective`; return it on the CPU, in eval mode.

    Order, augmentation and dropout follow from `seed` and `data` alone. Samples or tokens whose target is -100 do not
    count, as in torch. Under torchrun `batch_size` is the global batch: the processes share each batch, and any number
    of them gives the same weights, except for BatchNorm, dropout and losses between samples, which see one process's
    share; BatchNorm's statistics are then the mean over processes. With a GPU the forward pass runs in mixed precision.
    `record` is given the mean of each loss over each epoch. `zeros` names parameters of `module` whose zeros stay.
    `first_epoch` epochs of samples count as seen: order and augmentation go on from there.

    Raises InputError if the data is empty or a batch does not divide as asked, StageError if no parameter may move or
    a loss or, in the end, a weight is not finite; the message has the step and the learning rate.
    """
    accelerator = _accelerator(device)
    drawn = draws(data, batch_size, accelerator.num_processes)
    steps = epochs * drawn.steps
    batches = training_batches(
        data,
        drawn,
        epochs=epochs,
        seed=seed,
        first_epoch=first_epoch,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    hidden = None if accelerator.is_main_process else True  # None: shown on a terminal only
    with torch.random.fork_rng(), tqdm(total=steps, disable=hidden, leave=False, unit="step") as bar:
        torch.manual_seed(seed + accelerator.process_index)
        trained = copy.deepcopy(module).train().to(accelerator.device)
        moving = _torch_optimizer(trained, optimizer)
        masks = [(weight.detach(), weight == 0) for weight in map(trained.get_parameter, zeros)]
        backward: Callable[[Tensor], None] = Tensor.backward
        if accelerator.scaler is not None:
            # Only float16 needs these; elsewhere they cost 0.2 ms a step, since each searches the import path.
            moving, backward = accelerator.prepare_optimizer(moving), accelerator.backward
        sums: dict[str, Tensor] = {}
        for step, batch in enumerate(batches):
            rate, progress = learning_rate(optimizer, step, steps), step / max(1, steps - 1)
            for group in moving.param_groups:
                group["lr"] = rate
            means = _mean_losses(trained, objective, _on_device(batch, accelerator.device), progress, accelerator)
            weights = objective.weights(progress)
            total = functools.reduce(operator.add, (weight * means[name] for name, weight in weights.items()))
            _check_finite(total, means, f"step {step + 1}/{steps}, learning rate {rate:.3g}")
            backward(total)
            if accelerator.num_processes > 1:
                _average([p.grad for p in trained.parameters() if p.grad is not None], accelerator)
            moving.step()
            for weight, mask in masks:  # momentum and weight decay move zeros as well
                weight.masked_fill_(mask, 0)
            moving.zero_grad()
            sums = {name: sums.get(name, 0.0) + mean.detach() for name, mean in means.items()}
            bar.update()
            if (step + 1) % drawn.steps == 0:
                if accelerator.num_processes > 1:
                    sums = {name: accelerator.reduce(value, "mean") for name, value in sums.items()}
                averages = {name: value.item() / drawn.steps for name, value in sums.items()}
                sums = {}
                record(averages)
                line = ", ".join(f"{name} {value:.4f}" for name, value in averages.items())
                bar.set_postfix_str(line)
                if bar.disable and accelerator.is_main_process:
                    log(f"epoch {(step + 1) // drawn.steps}/{epochs}: {line}")
    if accelerator.num_processes > 1:
        _average([buffer for buffer in trained.buffers() if buffer.is_floating_point()], accelerator)
    _check_weights(trained, f"step {steps}/{steps}, learning rate {rate:.3g}")
    return trained.cpu().eval()


def _accelerator(device: torch.device) -> Accelerator:
    processes(device)
    mixed_precision = "no" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)


def _on_device(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
    return batch._replace(
        inputs=tuple(tensor.to(device) for tensor in batch.inputs),
        targets=batch.targets.to(device),
        counted=None if batch.counted is None else batch.counted.to(device),
    )


def _average(tensors: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Replace each tensor, in place, by its mean over the processes.

    torch's DistributedDataParallel would do it while gradients still flow, but it fails where a loss leaves part of a
    model out, as a hint from a middle layer does.
    """
    if not tensors:
        return
    together = accelerator.reduce(torch.cat([tensor.detach().flatten() for tensor in tensors]), "mean")
    for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(mean.view_as(tensor))


def _mean_losses(
    module: nn.Module, objective: Objective, batch: TrainingBatch, progress: float, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Mean of each loss over what counts, so that the mean over processes is the mean over the global batch."""
    with accelerator.autocast():
        losses = objective.losses(module, batch, progress)
    counts: dict[int, Tensor] = {}
    means = {}
    for name, values in losses.items():
        if batch.counted is None or values.shape[1:] != batch.counted.shape[1:]:
            means[name] = values.float().mean()
            continue
        counted = batch.counted[: len(values)]
        if len(values) not in counts:
            count = counted.sum().float()
            counts[len(values)] = accelerator.reduce(count, "mean") if accelerator.num_processes > 1 else count
        # A share of a process may be less than one sample; where nothing counts anywhere, the sum is 0.
        means[name] = (values.float() * counted).sum() / counts[len(values)].clamp(min=1 / accelerator.num_processes)
    return means


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


def _check_finite(total: Tensor, means: Mapping[str, Tensor], place: str) -> None:
    if not math.isfinite(total.item()):
        losses = ", ".join(f"{name} {value.item():.3g}" for name, value in means.items())
        msg = f"losses must be finite, got {losses} at {place}; lower the learning rate or look at the data"
        raise StageError(msg)


def _check_weights(module: nn.Module, place: str) -> None:
    """What the last step did, no loss has seen."""
    for name, weight in module.named_parameters():
        if weight.requires_grad and not weight.isfinite().all():
            msg = f"weights must be finite, got NaN or infinity in {name!r} after {place}; lower the learning rate"
            raise StageError(msg)
