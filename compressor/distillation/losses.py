"""The losses that a pipeline file may name, each with its settings."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self, final

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from compressor.distillation.course import Temperature, Weight, value_at
from compressor.distillation.feature import attention_transfer_loss, hint_loss
from compressor.distillation.relation import relational_angle_loss, relational_distance_loss, similarity_loss
from compressor.distillation.response import (
    correlation_loss,
    decoupled_distillation_loss,
    distillation_loss,
    jensen_shannon_loss,
    logit_mse,
    reverse_distillation_loss,
    soft_cross_entropy,
    standardize,
)
from compressor.task import OutputKind

_SETTINGS = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Loss(BaseModel):
    """One term of what a student lowers, and how much it counts; a subclass is final, or abstract."""

    model_config = _SETTINGS

    needs_targets: ClassVar[bool] = False
    """Whether unlabeled samples take no part."""
    compares_samples: ClassVar[bool] = False
    """Whether a batch must have several samples."""

    weight: Weight


@final
class Hard(Loss):
    """The task's own loss against the labels, at temperature 1."""

    needs_targets: ClassVar[bool] = True

    weight: Weight = 0.1


class ResponseLoss(Loss, ABC):
    """A comparison of the student's logits with the teacher's, (N, C, …)."""

    kinds: ClassVar[tuple[OutputKind, ...]] = ("classes", "labels")
    """Which outputs can be compared; a label is two classes, yes and no."""

    temperature: Temperature | None = None
    """What logits are divided by before they become probabilities; above 1 these get softer. 4 for classes and 1 for
    labels unless given."""

    def temperature_at(self, progress: float, kind: OutputKind) -> float:
        """Its value at `progress` in [0, 1], for outputs of `kind`.

        Two classes hide nothing in their order: softened labels only ask for the teacher's largest logits. With four
        labels and a small student 4 cost 5 points of bit accuracy, 1 gained half a point over labels alone.
        """
        if self.temperature is None:
            return 4.0 if kind == "classes" else 1.0
        return value_at(self.temperature, progress)

    @abstractmethod
    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """One value per sample, (N,), or per token, (N, …); `targets` belong to the samples if `needs_targets`."""


class FeatureLoss(Loss, ABC):
    """A comparison of what a layer of the student gives with what a layer of the teacher gives."""

    regresses: ClassVar[bool] = False
    """Whether the student's features pass a regressor that gives them the shape of the teacher's."""
    compares_positions: ClassVar[bool] = False
    """Whether features are maps (N, C, H, W) or tokens (N, L, D), not signals (N, C, L)."""

    layers: Mapping[str, str] = Field(min_length=1)
    """Path of a layer of the student: path of a layer of the teacher. In a path `*` stands for part of a name and `**`
    for any number of names; patterns that match several layers are paired in order. `compress layers` lists paths."""

    @staticmethod
    @abstractmethod
    def compare(student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """One value per sample, (N,), of features (N, …)."""


@final
class Kd(ResponseLoss):
    """KL divergence of the student's softened answers from the teacher's, times T² (Hinton et al. 2015).

    Of classes it is taken over their softmax. Of independent labels it is taken of each label's sigmoid, and the mean
    over labels counts. Of values it is the mean squared difference, whatever the temperature.
    """

    kinds: ClassVar[tuple[OutputKind, ...]] = ("classes", "labels", "values")

    weight: Weight = 0.9
    temperature_squared: bool = True
    """Whether the loss is multiplied by T², which keeps the size of its gradients whatever the temperature."""
    standardize: bool = False
    """Of classes: whether logits are first brought to mean 0 and standard deviation 1 (Sun et al. 2024, arXiv
    2403.01427)."""

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """`distillation_loss`."""
        if self.standardize:
            student_logits, teacher_logits = standardize(student_logits), standardize(teacher_logits)
        return distillation_loss(
            student_logits, teacher_logits, temperature=temperature, temperature_squared=self.temperature_squared
        )


@final
class SoftCrossEntropy(ResponseLoss):
    """Cross-entropy against the teacher's softened classes, times T²: `kd` plus the teacher's own entropy."""

    weight: Weight = 0.9

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """`soft_cross_entropy`."""
        return soft_cross_entropy(student_logits, teacher_logits, temperature=temperature)


@final
class ReverseKl(ResponseLoss):
    """KL divergence of the teacher's softened classes from the student's, times T²: it seeks modes."""

    weight: Weight = 0.9

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """`reverse_distillation_loss`."""
        return reverse_distillation_loss(student_logits, teacher_logits, temperature=temperature)


@final
class Jsd(ResponseLoss):
    """Generalized Jensen-Shannon divergence, times T² (Agarwal et al. 2024, arXiv 2306.13649)."""

    weight: Weight = 0.9
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture that both are compared with."""

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """`jensen_shannon_loss`."""
        return jensen_shannon_loss(student_logits, teacher_logits, beta=self.beta, temperature=temperature)


@final
class Dkd(ResponseLoss):
    """Decoupled distillation: the target class and the other classes apart (Zhao et al. 2022, arXiv 2203.08679)."""

    kinds: ClassVar[tuple[OutputKind, ...]] = ("classes",)
    needs_targets: ClassVar[bool] = True

    weight: Weight = 1.0
    alpha: float = Field(default=1.0, ge=0)
    """Weight of target class against all others."""
    beta: float = Field(default=2.0, ge=0)
    """Weight of the other classes among themselves."""
    standardize: bool = False
    """As in `kd`."""

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """`decoupled_distillation_loss`."""
        if self.standardize:
            student_logits, teacher_logits = standardize(student_logits), standardize(teacher_logits)
        return decoupled_distillation_loss(
            student_logits, teacher_logits, targets, alpha=self.alpha, beta=self.beta, temperature=temperature
        )


@final
class Dist(ResponseLoss):
    """Pearson correlation of class probabilities within samples and within classes (Huang et al. 2022).

    Within classes all samples and tokens of a batch take part, those with target -100 too.
    """

    kinds: ClassVar[tuple[OutputKind, ...]] = ("classes",)
    compares_samples: ClassVar[bool] = True

    weight: Weight = 1.0
    temperature: Temperature | None = 1.0
    """What logits are divided by."""
    inter: float = Field(default=1.0, ge=0)
    """Weight of the correlation over the classes of a sample."""
    intra: float = Field(default=1.0, ge=0)
    """Weight of the correlation over the samples of a class."""

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """`correlation_loss`."""
        return correlation_loss(
            student_logits, teacher_logits, inter=self.inter, intra=self.intra, temperature=temperature
        )


@final
class LogitMse(ResponseLoss):
    """Mean squared difference of logits, divided by the temperature first; for outputs of any kind."""

    kinds: ClassVar[tuple[OutputKind, ...]] = ("classes", "labels", "values")

    weight: Weight = 1.0
    temperature: Temperature | None = 1.0
    """What logits are divided by."""

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """`logit_mse`."""
        return logit_mse(student_logits / temperature, teacher_logits / temperature)


@final
class Hint(FeatureLoss):
    """Mean squared difference of features after a regressor (Romero et al. 2015, arXiv 1412.6550)."""

    regresses: ClassVar[bool] = True

    weight: Weight = 1.0

    @staticmethod
    def compare(student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """`hint_loss`."""
        return hint_loss(student_features, teacher_features)


@final
class AttentionTransfer(FeatureLoss):
    """Mean squared difference of where layers are active, as the code of Zagoruyko and Komodakis 2017 has it."""

    compares_positions: ClassVar[bool] = True

    weight: Weight = 1000.0

    @staticmethod
    def compare(student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """`attention_transfer_loss`."""
        return attention_transfer_loss(student_features, teacher_features, normalization="mean_square")


@final
class AttentionDistance(FeatureLoss):
    """Euclidean distance between where layers are active, as the paper of Zagoruyko and Komodakis 2017 has it.

    It is larger than `attention_transfer`, by a factor that grows with the map (arXiv 1612.03928, equation 2).
    """

    compares_positions: ClassVar[bool] = True

    weight: Weight = 1.0

    @staticmethod
    def compare(student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """`attention_transfer_loss`."""
        return attention_transfer_loss(student_features, teacher_features, normalization="euclidean")


@final
class RkdDistance(FeatureLoss):
    """Difference of the distances between samples (Park et al. 2019, arXiv 1904.05068)."""

    compares_samples: ClassVar[bool] = True

    weight: Weight = 25.0

    @staticmethod
    def compare(student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """`relational_distance_loss`."""
        return relational_distance_loss(student_features, teacher_features)


@final
class RkdAngle(FeatureLoss):
    """Difference of the angles between samples (Park et al. 2019, arXiv 1904.05068)."""

    compares_samples: ClassVar[bool] = True

    weight: Weight = 50.0

    @staticmethod
    def compare(student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """`relational_angle_loss`."""
        return relational_angle_loss(student_features, teacher_features)


@final
class SimilarityPreserving(FeatureLoss):
    """Difference of the similarities between samples (Tung and Mori 2019, arXiv 1907.09682)."""

    compares_samples: ClassVar[bool] = True

    weight: Weight = 3000.0

    @staticmethod
    def compare(student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """`similarity_loss`."""
        return similarity_loss(student_features, teacher_features)


class Losses(BaseModel):
    """The losses that are added up; one that is left out takes no part."""

    model_config = _SETTINGS

    hard: Hard | None = None
    kd: Kd | None = None
    soft_cross_entropy: SoftCrossEntropy | None = None
    reverse_kl: ReverseKl | None = None
    jsd: Jsd | None = None
    dkd: Dkd | None = None
    dist: Dist | None = None
    logit_mse: LogitMse | None = None
    hint: Hint | None = None
    attention_transfer: AttentionTransfer | None = None
    attention_distance: AttentionDistance | None = None
    rkd_distance: RkdDistance | None = None
    rkd_angle: RkdAngle | None = None
    similarity_preserving: SimilarityPreserving | None = None

    @model_validator(mode="before")
    @classmethod
    def _says_what_takes_part(cls, settings: Any) -> Any:
        empty = [name for name, value in settings.items() if value is None] if isinstance(settings, dict) else []
        if empty:
            msg = f"{empty[0]} must be a mapping, {{}} for its defaults, got nothing"
            raise ValueError(msg)
        return settings

    @model_serializer(mode="wrap")
    def _those_that_take_part(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if not self.terms:
            msg = f"losses must name at least one of {', '.join(type(self).model_fields)}"
            raise ValueError(msg)
        return self

    @property
    def terms(self) -> dict[str, Loss]:
        """The losses that take part, by name."""
        return {name: loss for name, loss in self if loss is not None}

    def weights(self, progress: float) -> dict[str, float]:
        """Weight by name of the losses that take part, at `progress` in [0, 1]."""
        return {name: value_at(loss.weight, progress) for name, loss in self.terms.items()}

    @property
    def of_features(self) -> dict[str, FeatureLoss]:
        """Those that look into the models."""
        return {name: loss for name, loss in self.terms.items() if isinstance(loss, FeatureLoss)}

    @property
    def of_responses(self) -> dict[str, ResponseLoss]:
        """Those that compare logits."""
        return {name: loss for name, loss in self.terms.items() if isinstance(loss, ResponseLoss)}
