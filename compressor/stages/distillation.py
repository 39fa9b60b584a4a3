"""A student learns from the model that enters the stage."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Self, final

from pydantic import Field, model_validator

from compressor.distillation.distil import Student, distil
from compressor.distillation.distillation_settings import DistillationFields
from compressor.distillation.setup import check_fit, check_outputs
from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.models.soft_label_file import SoftLabelFile
from compressor.pruning.students import narrower, reborn, shallower
from compressor.references.reference import Reference
from compressor.stage import Stage, StageContext
from compressor.task import Task


@final
class Distillation(DistillationFields, Stage[TorchModel, TorchModel]):
    """Train a student to give the answers of the model that enters; the student leaves."""

    student: Reference | None = None
    """Builds the student. Without it the student is the model that enters, cut by `depth` and `width`; if these are
    missing too and that model is the teacher, a new network of its architecture."""
    depth: Mapping[str, Annotated[int, Field(gt=0)]] = {}
    """By path of a stack in the model, such as `encoder.layer`: how many of its layers the student keeps."""
    width: float | None = Field(default=None, gt=0, lt=1)
    """Share of the model's channels that the student keeps, those of largest magnitude."""
    round_to: int | None = Field(default=None, gt=0)
    """With `width`, channels are kept in multiples of this; 8 unless given."""
    protect: tuple[str, ...] = ()
    """With `width`, paths of layers that keep all their channels, with all below them; `*` and `**` as in `losses`."""
    teacher: Reference | None = None
    """Builds another teacher than the model that enters, such as an ensemble: `compressor:ensemble`."""
    generations: int = Field(default=1, gt=0)
    """How often a student becomes the teacher of a new one of its kind (Furlanello et al. 2018, arXiv 1805.04770). Each
    is trained for `epochs`."""

    @model_validator(mode="after")
    def _has_one_student(self) -> Self:
        if self.student is not None and (self.depth or self.width is not None):
            msg = "student must stand alone: depth and width make a student from the model that enters"
            raise ValueError(msg)
        if self.width is None and self.round_to is not None:
            msg = "round_to goes with width, which is not given"
            raise ValueError(msg)
        if self.width is None and self.protect:
            msg = "protect goes with width, which is not given"
            raise ValueError(msg)
        return self

    def rehearse(self, model: TorchModel, reference: TorchModel, task: Task) -> TorchModel:  # noqa: ARG002  # not used
        """Make the student and find the layers that losses name."""
        teacher = model if self.teacher is None else TorchModel.build(self.teacher, seed=0)
        student = self._student(model, task, seed=0)
        check_fit(student, teacher, task, self)
        return student

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        """Return the trained student of the last generation.

        Raises InputError if the student cannot be made, its outputs have another shape than the teacher's, or the
        losses do not fit the models.
        """
        teacher = model if self.teacher is None else TorchModel.build(self.teacher, seed=context.seed)
        if self.teacher is not None and model.attachment(SoftLabelFile) is not None:
            context.log("the soft labels of the model that enters are not read: another teacher is named")
        student = self._student(model, task, seed=context.seed, log=context.log)
        if zeros_of(model) and not zeros_of(student):
            context.log("the student is dense: the zeros of the model that enters stay behind with its weights")
        for generation in range(self.generations):
            now = replace(context, seed=context.seed + generation)
            if generation > 0:
                teacher, student = student, reborn(student, seed=now.seed + 1)
            check_outputs(student, teacher, task, self.losses)
            student = student.with_module(distil(Student.of(student), teacher, task, self, now))
        return student

    def _student(
        self, model: TorchModel, task: Task, *, seed: int, log: Callable[[str], None] = lambda _line: None
    ) -> TorchModel:
        if self.student is not None:
            return TorchModel.build(self.student, seed=seed)
        student = shallower(model, task.example_inputs, depth=self.depth) if self.depth else model
        if self.width is not None:
            return narrower(
                student,
                task.example_inputs,
                width=self.width,
                round_to=self.round_to or 8,
                protect=self.protect,
                log=log,
            )
        # the seed itself may be the one that the teacher's first weights came from
        return student if self.depth or self.teacher is not None else reborn(model, seed=seed + 1)
