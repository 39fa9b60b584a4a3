"""A model that can be cut: which of its units leave, by share or by count, the ones of smallest score first."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, final

from compressor.models.artifact import TorchModel
from compressor.pruning.allocation import Allocation, Counts, StepOf, allocate, by_ratios, choose_by_counts
from compressor.pruning.channels import Pruned, prune_channels
from compressor.pruning.criteria import COMPARABLE, Criterion, Scores, scores
from compressor.pruning.group_sensitivity import check_sensitivity, ratios_by_sensitivity
from compressor.pruning.groups import Group, Removal
from compressor.task import Task

CutAllocation: TypeAlias = Allocation | Literal["sensitivity"]
"""`sensitivity`: every group loses as much as costs one common fall of the metric, which the model carries."""


@final
@dataclass(frozen=True)
class Cuttable:
    """A model, the groups of units that can leave it, and by what they are chosen."""

    model: TorchModel
    task: Task
    groups: tuple[Group, ...]
    criterion: Criterion
    allocation: CutAllocation

    @cached_property
    def scores(self) -> Scores:
        """How much each unit matters; computed at the first use and then kept. Raises what `scores` raises."""
        return scores(self.criterion, self.model.module, self.groups, self.task)

    def choose(self, pruning_ratio: float, step_of: StepOf) -> Removal:
        """The units to remove so that a share `pruning_ratio` of all channels leaves, as near as `step_of` allows.

        A larger share removes the same units and more. Raises StageError if the model must carry a sensitivity and
        has none that fits.
        """
        if self.allocation == "sensitivity":
            curves = check_sensitivity(self.model, self.groups, criterion=self.criterion)
            shares = ratios_by_sensitivity(curves, self.groups, pruning_ratio=pruning_ratio)
            return by_ratios(shares, self.groups, self.scores, step_of=step_of)
        return allocate(
            self.allocation,
            self.model.module,
            self.groups,
            self.scores,
            comparable=self.criterion in COMPARABLE,
            pruning_ratio=pruning_ratio,
            step_of=step_of,
        )

    def choose_counts(self, counts: Counts) -> Removal:
        """The units to remove so that each group loses as many as `counts` says."""
        return choose_by_counts(self.groups, self.scores, counts)

    def cut(self, removal: Removal) -> Pruned:
        """Remove the units of `removal`, as `prune_channels` does."""
        return prune_channels(self.model.module, self.task.example_inputs, self.groups, removal)
