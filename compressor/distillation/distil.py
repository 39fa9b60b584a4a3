"""`distil`: train a student to agree with a teacher; the distillation stage and every recovery call it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from compressor.distillation.answering import origin_of
from compressor.distillation.distillation_settings import DistillationFields
from compressor.distillation.learner import Pairs, build_learner, layer_pairs
from compressor.distillation.losses import Kd, Losses
from compressor.distillation.panel import Combine, Panel, logit_losses, panel_of
from compressor.distillation.setup import training_data
from compressor.distillation.teachers import LiveTeacher, StoredTeacher, Teacher, absent_teacher
from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.models.soft_label_file import SoftLabelFile
from compressor.stage import StageContext
from compressor.task import Task
from compressor.training.fit import fit
from compressor.training.sampling import TrainingBatch


@final
@dataclass(frozen=True)
class Student:
    """What learns: a module, whose copy is trained, and the names of its parameters whose zeros stay."""

    module: nn.Module
    zeros: Collection[str] = ()

    @classmethod
    def of(cls, model: TorchModel) -> "Student":
        """Take a model, which promises its zeros."""
        return cls(model.module, tuple(zeros_of(model)))


def distil(
    student: Student,
    teacher: TorchModel,
    task: Task,
    settings: DistillationFields,
    context: StageContext,
    *,
    first_epoch: int = 0,
) -> nn.Module:
    """Return a copy of the student's module, trained to lower `settings.losses` against `teacher`.

    The teacher's soft labels are read if it has them and no loss looks into the models. Else the teacher runs on the
    student's own view of each batch. Unlabeled samples take part in the losses that need no label. `first_epoch` epochs
    of samples count as seen.

    Raises InputError, before any training, if a layer is not there, if features cannot be compared, or if the soft
    labels are those of another teacher or other data. Raises what `fit` raises.
    """
    losses = settings.losses
    pairs = layer_pairs(losses, student.module, teacher.module)
    panel = panel_of(teacher, task, losses, settings.combine)
    source = _teacher(teacher, task, context, losses, pairs, combine=panel.combine)
    views = source.labels.origin.views if isinstance(source, StoredTeacher) else None
    trained = fit(
        build_learner(student.module, teacher.module, losses, pairs, task.example_inputs, seed=context.seed),
        DistillationObjective(losses, pairs, source, panel, task),
        training_data(task, settings, seed=context.seed, views=views, first_epoch=first_epoch),
        settings,
        context,
        zeros=[f"student.{name}" for name in student.zeros],
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
    views, top_k = labels.origin.views, labels.origin.top_k
    labels.check(origin_of(model, task, seed=context.seed, views=views, top_k=top_k))
    context.log(f"the teacher's answers are read from soft labels, views per sample: {views}")
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
