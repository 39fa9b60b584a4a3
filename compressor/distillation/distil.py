"""`distil`: train a student to agree with a teacher; the distillation stage and every recovery call it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from compressor.distillation.answering import origin_of
from compressor.distillation.learner import Pairs, layer_pairs, learner
from compressor.distillation.losses import Kd, Losses
from compressor.distillation.panel import Combine, Panel, combine_of, logit_losses
from compressor.distillation.setup import training_data
from compressor.distillation.teachers import LiveTeacher, StoredTeacher, Teacher, absent_teacher
from compressor.models.artifact import TorchModel
from compressor.models.ensemble import members_of
from compressor.models.soft_label_file import SoftLabelFile
from compressor.records.findings import EpochLosses
from compressor.stage import StageContext
from compressor.task import Task
from compressor.training.fit import Optimizer, fit
from compressor.training.sampling import TrainingBatch


def distil(
    student: nn.Module,
    teacher: TorchModel,
    task: Task,
    context: StageContext,
    *,
    losses: Losses,
    combine: Combine | None,
    unlabeled_share: float | None,
    epochs: int,
    batch_size: int,
    optimizer: Optimizer,
    zeros: Collection[str] = (),
    first_epoch: int = 0,
) -> nn.Module:
    """Return a copy of `student` trained to lower `losses` against `teacher`.

    The teacher's soft labels are read if it has them and no loss looks into the models; else it runs on the student's
    own view of each batch. `combine` is that of the ensemble unless given. `unlabeled_share` is the part of each batch
    that `task.unlabeled` fills, a half unless given; those samples take part in the losses that need no label. `zeros`
    names parameters of the student whose zeros stay; `first_epoch` epochs of samples count as seen.

    Raises InputError, before any training, if a layer is not there, features cannot be compared, or the soft labels
    are those of another teacher or other data; and what `fit` raises.
    """
    pairs = layer_pairs(losses, student, teacher.module)
    combine = combine or combine_of(teacher.module)
    source = _teacher(teacher, task, context, losses, pairs, combine=combine)
    views = source.labels.origin.views if isinstance(source, StoredTeacher) else None
    trained = fit(
        learner(student, teacher.module, losses, pairs, task.example_inputs, seed=context.seed),
        DistillationObjective(
            losses, pairs, source, Panel(tuple(weight for _, weight in members_of(teacher.module)), combine), task
        ),
        training_data(task, losses, seed=context.seed, unlabeled_share=unlabeled_share, views=views),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        seed=context.seed,
        device=context.device,
        log=context.log,
        record=lambda means: context.report(EpochLosses(means=means)),
        zeros=[f"student.{name}" for name in zeros],
        first_epoch=first_epoch,
    )
    return trained.get_submodule("student")


@final
@dataclass(frozen=True)
class DistillationObjective:
    """The objective of a `Learner`: what each loss makes of the student's outputs and the teacher's."""

    settings: Losses
    pairs: Pairs
    teacher: Teacher
    panel: Panel
    task: Task

    def weights(self, progress: float) -> Mapping[str, float]:
        """Weight by name of each loss."""
        return self.settings.weights(progress)

    def losses(self, module: nn.Module, batch: TrainingBatch, progress: float) -> Mapping[str, Tensor]:
        """Values by name of each loss, per sample that it applies to."""
        answers = self.teacher(batch)
        logits, features = module(batch.inputs, answers.features)
        values = logit_losses(
            self.settings,
            logits,
            answers.responses,
            self.panel,
            batch.targets,
            task_loss=self.task.loss,
            progress=progress,
        )
        with torch.autocast(logits.device.type, enabled=False):  # half precision is for layers, not for losses
            for name, loss in self.settings.of_features.items():
                theirs = [answers.features[path] for _, path in self.pairs[name]]
                compared = [loss.compare(one, other) for one, other in zip(features[name], theirs, strict=True)]
                values[name] = torch.stack(compared).sum(dim=0)
        return values


def _teacher(
    model: TorchModel, task: Task, context: StageContext, losses: Losses, pairs: Pairs, *, combine: Combine
) -> Teacher:
    if not pairs and not losses.of_responses:
        return absent_teacher
    labels = model.attachment(SoftLabelFile)
    reason = "" if labels is None else _why_not_stored(labels, losses, pairs, combine)
    if labels is None or reason:
        if reason:
            context.log(f"the teacher runs live, not from its soft labels: {reason}")
        return LiveTeacher.of(model, [path for of_loss in pairs.values() for _, path in of_loss], context.device)
    labels.check(origin_of(model, task, seed=context.seed, views=labels.origin.views, top_k=None))
    context.log(f"the teacher's answers are read from soft labels, views per sample: {labels.origin.views}")
    return StoredTeacher(labels)


def _why_not_stored(labels: SoftLabelFile, losses: Losses, pairs: Pairs, combine: Combine) -> str:
    """Why the teacher must run although it has soft labels; empty if it need not."""
    if pairs:
        return f"losses that look into it: {', '.join(pairs)}"
    if labels.origin.top_k is None:
        return ""
    inexact = [
        name
        for name, loss in losses.of_responses.items()
        if not (isinstance(loss, Kd) and loss.temperature == 1 and not loss.standardize)
    ]
    if inexact or (labels.origin.members > 1 and combine != "separate"):
        return (
            f"they hold the {labels.origin.top_k} most likely classes, exact for kd with temperature 1 alone, of each "
            "teacher on its own"
        )
    return ""
