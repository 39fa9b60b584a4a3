"""What a training lowers: the weighted sum of the means of some losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor, nn

from compressor.training.sampling import TrainingBatch


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
