"""`fit`, the one training loop: training, distillation, recovery and quantization-aware training run through it."""

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compressor.records.findings import EpochLosses, Finding
from compressor.system.processes import processes
from compressor.system.progress import progress_bar
from compressor.training.descent import Descent, begin_descent
from compressor.training.objective import Objective
from compressor.training.sampling import TrainingBatch, TrainingData, divide_batch, training_batches
from compressor.training.settings import TrainingFields

if TYPE_CHECKING:
    from tqdm import tqdm


class TrainingContext(Protocol):
    """What a training cannot know by itself, and whom it tells; the `StageContext` of a stage is one."""

    @property
    def device(self) -> torch.device:
        """Where the module is trained."""

    @property
    def seed(self) -> int:
        """Decides the order of samples and all that layers draw, such as dropout."""

    @property
    def log(self) -> Callable[[str], None]:
        """Takes one line for people after each epoch, unless a terminal shows a bar."""

    @property
    def report(self) -> Callable[[Finding], None]:
        """Takes the losses of each epoch."""


def fit(
    module: nn.Module,
    objective: Objective,
    data: TrainingData,
    settings: TrainingFields,
    context: TrainingContext,
    *,
    zeros: Collection[str] = (),
) -> nn.Module:
    """Train a copy of `module` to lower `objective`; return it on the CPU, in eval mode.

    Order, augmentation and dropout follow from `data` and the seed alone. Samples or tokens whose target is -100 do
    not count, as in torch. `zeros` names parameters of `module` whose zeros stay. With a GPU the forward pass runs in
    mixed precision.

    Under torchrun `batch_size` is the global batch, and the processes share each batch. Any number of them gives the
    same weights, except for BatchNorm, dropout and losses between samples: these see the share of one process.
    BatchNorm's statistics are then the mean over processes.

    Raises InputError if the data is empty or a batch does not divide as asked. Raises StageError if no parameter may
    move, or if a loss or, in the end, a weight is not finite; the message has the step and the learning rate.
    """
    accelerator = _accelerator(context.device)
    process, count, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    drawn = divide_batch(data, settings.batch_size, count)
    steps = settings.epochs * drawn.steps
    batches = training_batches(data, drawn, epochs=settings.epochs, seed=context.seed, process=process, processes=count)
    numbered = enumerate(batches)
    with torch.random.fork_rng(), progress_bar(total=steps, unit="step", hidden=not main) as bar:
        torch.manual_seed(context.seed + process)
        descent = begin_descent(
            module, objective, settings.optimizer, zeros=zeros, steps=steps, accelerator=accelerator
        )
        for epoch in range(settings.epochs):
            sums = _run_epoch(descent, islice(numbered, drawn.steps), bar)
            means = _means(sums, drawn.steps, accelerator)
            context.report(EpochLosses(means=means))
            line = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
            bar.set_postfix_str(line)
            if bar.disable and main:
                context.log(f"epoch {epoch + 1}/{settings.epochs}: {line}")
    return descent.finish()


def _accelerator(device: torch.device) -> Accelerator:
    processes(device)
    mixed_precision = "no" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)


def _run_epoch(descent: Descent, batches: Iterable[tuple[int, TrainingBatch]], bar: "tqdm[Any]") -> dict[str, Tensor]:
    """Take a step for each of the numbered `batches`; return the sum of each loss over them, by name."""
    sums: dict[str, Tensor] = {}
    for number, batch in batches:
        means = descent.step(number, batch)
        sums = {name: sums.get(name, 0.0) + mean for name, mean in means.items()}
        bar.update()
    return sums


def _means(sums: Mapping[str, Tensor], steps: int, accelerator: Accelerator) -> dict[str, float]:
    """Mean of each loss over `steps` steps and over the processes."""
    if accelerator.num_processes > 1:
        sums = {name: accelerator.reduce(value, "mean") for name, value in sums.items()}
    return {name: value.item() / steps for name, value in sums.items()}
