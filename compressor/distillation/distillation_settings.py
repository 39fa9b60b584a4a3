"""What every distillation asks beside what every training does."""

from abc import ABC
from typing import final

from pydantic import Field

from compressor.distillation.losses import Hard, Kd, Losses
from compressor.distillation.panel import Combine
from compressor.training.settings import TrainingFields


class DistillationFields(TrainingFields, ABC):
    """The settings of everything that distils. A stage inherits them; `DistillationSettings` has no others."""

    losses: Losses = Losses(kd=Kd(), hard=Hard())
    combine: Combine | None = None
    """How the members of an ensemble teach: as one, by the mean of probabilities or logits, or each on its own. As the
    ensemble itself answers unless given."""
    unlabeled_share: float | None = Field(default=None, ge=0, lt=1)
    """Part of each batch that comes from the task's unlabeled samples; a half unless given, if the task has any."""


@final
class DistillationSettings(DistillationFields):
    """Training against a teacher, unless `losses` names `hard` alone."""
