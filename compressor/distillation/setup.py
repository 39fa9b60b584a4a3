"""What a student needs before its first step, and what must hold by then."""

from compressor.distillation.distillation_settings import DistillationFields
from compressor.distillation.learner import build_learner, layer_pairs
from compressor.distillation.losses import Kd, Losses, ResponseLoss
from compressor.distillation.panel import compare, panel_of
from compressor.errors import InputError
from compressor.models.artifact import TorchModel
from compressor.models.output_kind import Outputs, outputs_of_model
from compressor.models.outputs import FORWARD_ERRORS
from compressor.system.processes import launched
from compressor.task import Task, batches
from compressor.training.sampling import TrainingData, divide_batch


def check_fit(student: TorchModel, teacher: TorchModel, task: Task, settings: DistillationFields) -> None:
    """Raise InputError for what would stop a student before its first step, or let it learn nothing."""
    losses = settings.losses
    check_outputs(student, teacher, task, losses)
    panel_of(teacher, task, losses, settings.combine)
    pairs = layer_pairs(losses, student.module, teacher.module)
    build_learner(student.module, teacher.module, losses, pairs, task.example_inputs, seed=0)
    drawn = divide_batch(training_data(task, settings, seed=0), settings.batch_size, launched)
    between = [name for name, loss in losses.terms.items() if loss.compares_samples]
    if between and (drawn.labeled + drawn.unlabeled) // launched < 2:
        names = ", ".join(between)
        msg = f"batch_size must give each process 2 samples, for {names} compare them, got {settings.batch_size}"
        raise InputError(msg)


def check_outputs(student: TorchModel, teacher: TorchModel, task: Task, losses: Losses) -> None:
    """Raise InputError unless both models give outputs of one shape and kind that every loss of responses can compare.

    Raises InputError for an ensemble whose mean is not one of such outputs, too.
    """
    batch = next(batches(task.train, 2))
    ours, theirs = (model.predict(batch.inputs) for model in (student, teacher))
    found, wanted = tuple(ours.shape), tuple(theirs.shape)
    if found != wanted:
        msg = f"student and teacher must give outputs of one shape, got {found} and {wanted}"
        raise InputError(msg)
    if not losses.of_responses:
        return
    outputs, asked = outputs_of_model(student, task), outputs_of_model(teacher, task)
    if outputs != asked:
        msg = f"student and teacher must give outputs of one kind, got {outputs} and {asked}"
        raise InputError(msg)
    for name, loss in losses.of_responses.items():
        check_kind(name, loss, outputs)
    if outputs.kind == "classes" and (ours.ndim < 2 or ours.shape[outputs.dimension] < 2):
        msg = (
            f"{', '.join(losses.of_responses)} must compare outputs (N, classes, …) of at least 2 classes, got "
            f"{found}: one class always has probability 1; say in the task that they are outputs='labels' or 'values'"
        )
        raise InputError(msg)
    ours, theirs = (outputs.as_logits(one) for one in (ours, theirs))
    for name, loss in losses.of_responses.items():
        try:
            compare(loss, ours, theirs, batch.targets, temperature=1.0, outputs=outputs)
        except FORWARD_ERRORS as error:
            given = f"outputs {found}, targets {batch.targets.dtype} {tuple(batch.targets.shape)}"
            msg = f"{name} must be able to compare {given} of the train split, but: {error}"
            raise InputError(msg) from error


def check_kind(name: str, loss: ResponseLoss, outputs: Outputs) -> None:
    """Raise InputError if `loss` cannot compare such outputs; the message says what can."""
    standardizes = isinstance(loss, Kd) and loss.standardize
    if outputs.kind in loss.kinds and (outputs.kind == "classes" or not standardizes):
        return
    what = f"{name} with standardize" if standardizes else name
    msg = (
        f"{what} compares classes, but by their loss, metrics and targets the outputs are {outputs}; write "
        "`losses: {kd: {}, hard: {}}`, or say in the task what they are: Task(outputs='classes', …)"
    )
    raise InputError(msg)


def training_data(
    task: Task, settings: DistillationFields, *, seed: int, views: int | None = None, first_epoch: int = 0
) -> TrainingData:
    """What a student learns from: `task.train` and, if a loss needs no label, `task.unlabeled`.

    Raises InputError for a share of unlabeled samples where the task has none or every loss needs labels.
    """
    terms, asked = settings.losses.terms, settings.unlabeled_share
    needing = [name for name, loss in terms.items() if loss.needs_targets]
    learns = len(needing) < len(terms)
    if asked and task.unlabeled is None:
        msg = f"unlabeled_share is {asked}, so the task must have an unlabeled split, but it has none"
        raise InputError(msg)
    if asked and not learns:
        msg = f"unlabeled_share is {asked}, but {', '.join(needing)} need labels; add a loss such as kd"
        raise InputError(msg)
    share = 0.0 if task.unlabeled is None or not learns else 0.5 if asked is None else asked
    return TrainingData(
        task.train,
        task.unlabeled if share else None,
        unlabeled_share=share,
        augmentation=task.augmentation,
        seed=seed,
        views=views,
        first_epoch=first_epoch,
    )
