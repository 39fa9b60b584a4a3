"""`fit`, the one training loop: training, distillation, recovery and quantization-aware training run through it."""

import copy
import functools
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeAlias

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from compressor.errors import HostError, InputError, StageError
from compressor.task import Augmentation, Batch, Split, gather, uniform_numbers

Objective: TypeAlias = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
"""From a module and a batch to its losses by name, each one value per sample, (N,), or per token, (N, L)."""


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
    split: Split,
    *,
    weights: Mapping[str, float],
    epochs: int,
    batch_size: int,
    optimizer: Optimizer,
    seed: int,
    device: torch.device,
    log: Callable[[str], None],
    augmentation: Augmentation | None = None,
) -> nn.Module:
    """Train a copy of `module` to lower the weighted sum of its mean losses; return it on the CPU, in eval mode.

    Every epoch sees the samples in another order, without the last incomplete batch. Order, augmentation and dropout
    follow from `seed` alone. Under torchrun `batch_size` is the global batch: the processes share each batch, and any
    number of them gives the same weights, except for BatchNorm and dropout, which see one process's share.
    With a GPU the forward pass runs in mixed precision.

    Raises InputError if the split is empty or a batch does not divide among the processes, StageError if no parameter
    may move or a loss is not finite; the message has the step and the learning rate.
    """
    accelerator = _accelerator(device)
    batch_size = _checked_batch_size(batch_size, len(split), accelerator.num_processes)
    steps_per_epoch = len(split) // batch_size
    steps = epochs * steps_per_epoch
    batches = _shuffled_batches(
        split, augmentation, epochs=epochs, batch_size=batch_size, seed=seed, accelerator=accelerator
    )
    hidden = None if accelerator.is_main_process else True  # None: shown on a terminal only
    with torch.random.fork_rng(), tqdm(total=steps, disable=hidden, leave=False, unit="step") as bar:
        torch.manual_seed(seed + accelerator.process_index)
        trained = copy.deepcopy(module).train()
        moving = _torch_optimizer(trained, optimizer)
        backward: Callable[[Tensor], None] = Tensor.backward
        trained = accelerator.prepare_model(trained)
        if accelerator.scaler is not None:
            # Only float16 needs these; elsewhere they cost 0.2 ms a step, since each searches the import path.
            moving, backward = accelerator.prepare_optimizer(moving), accelerator.backward
        sums = {name: torch.zeros((), device=accelerator.device) for name in weights}
        for step, batch in enumerate(batches):
            rate = learning_rate(optimizer, step, steps)
            for group in moving.param_groups:
                group["lr"] = rate
            with accelerator.autocast():
                losses = objective(trained, batch)
            means = {name: losses[name].float().mean() for name in weights}
            total = functools.reduce(operator.add, (weight * means[name] for name, weight in weights.items()))
            _check_finite(total, means, f"step {step + 1}/{steps}, learning rate {rate:.3g}")
            backward(total)
            moving.step()
            moving.zero_grad()
            sums = {name: value + means[name].detach() for name, value in sums.items()}
            bar.update()
            if (step + 1) % steps_per_epoch == 0:
                averages = ", ".join(f"{name} {value.item() / steps_per_epoch:.4f}" for name, value in sums.items())
                sums = {name: torch.zeros_like(value) for name, value in sums.items()}
                bar.set_postfix_str(averages)
                if bar.disable and accelerator.is_main_process:
                    log(f"epoch {(step + 1) // steps_per_epoch}/{epochs}: {averages}")
    unwrapped: nn.Module = accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
    return unwrapped.cpu().eval()


def _accelerator(device: torch.device) -> Accelerator:
    mixed_precision = "no" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        # https://github.com/huggingface/accelerate/issues/2741: some launchers start one process and say nothing
        msg = f"{launched} processes must take part, got {accelerator.num_processes}; start them with torchrun"
        raise HostError(msg)
    return accelerator


def _checked_batch_size(batch_size: int, samples: int, processes: int) -> int:
    size = min(batch_size, samples)
    if size == 0:
        msg = "the split to train on must have samples, got 0"
        raise InputError(msg)
    if size % processes:
        msg = f"a batch must divide among {processes} processes, got {size} samples; choose another batch_size"
        raise InputError(msg)
    return size


def _shuffled_batches(
    split: Split,
    augmentation: Augmentation | None,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    accelerator: Accelerator,
) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(split), generator=generator).numpy()
        starts = range(0, len(order) - batch_size + 1, batch_size)
        shares = [order[i : i + batch_size][accelerator.process_index :: accelerator.num_processes] for i in starts]
        for indices in shares:
            batch = gather(split, indices)
            if augmentation is None:
                yield batch.to(accelerator.device)
            else:
                uniform = uniform_numbers(seed, epoch, indices, augmentation.numbers)
                yield batch._replace(inputs=augmentation.apply(batch.inputs, uniform)).to(accelerator.device)


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
