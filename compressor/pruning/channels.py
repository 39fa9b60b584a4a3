"""`prunable_groups`: what can leave a module; `prune_channels`: the module without it, physically, and proven."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from compressor.errors import StageError
from compressor.models.layers import is_within, layer_paths, paths_matching
from compressor.pruning.dependency_graph import channel_groups
from compressor.pruning.groups import Group, Removal, check_cut, without
from compressor.pruning.kept import list_lines, list_reasons
from compressor.pruning.transformers import transformer_units
from compressor.task import Inputs
from compressor.text.figures import list_names


@dataclass(frozen=True)
class Pruned:
    """A smaller module, and what became of the units of each group."""

    module: nn.Module
    channels: dict[str, tuple[int, int]]
    """By the path of the group: channels kept, channels before."""

    @property
    def channels_removed(self) -> int:
        """How many channels left."""
        return sum(had - kept for kept, had in self.channels.values())

    @property
    def pruning_ratio(self) -> float:
        """Share of the channels that left."""
        return self.channels_removed / sum(had for _, had in self.channels.values())


def prunable_groups(
    module: nn.Module,
    example_inputs: Inputs,
    *,
    protect: Sequence[str] = (),
    log: Callable[[str], None] = lambda _line: None,
) -> tuple[Group, ...]:
    """Every group of units that can leave `module`.

    Of a module with attention these are its heads and the hidden units of its feed-forward layers, else the channels of
    all layers that are coupled. `protect` holds paths of layers that keep all, or patterns of such paths as
    `paths_matching` takes them; what a protected layer holds is protected too.

    What cannot be followed is kept, with all that is coupled to it: layers of unknown kinds or uses, weights that are
    frozen, shared or computed from others. `log` is told, in one line for each reason.

    Raises InputError if a pattern of `protect` matches nothing; StageError if weights are not finite, or if nothing can
    be removed.
    """
    protected = tuple(path for pattern in protect for path in paths_matching(module, pattern))
    _check_finite(module)
    units = transformer_units(module, example_inputs, protect=_inside(module, protected))
    groups, kept = units.groups, units.kept
    if not groups:
        channels = channel_groups(module, example_inputs, protect=_inside(module, [*protected, *units.kept]))
        groups, kept = channels.groups, {**units.kept, **channels.kept}
    if not groups:
        msg = f"pruning must have something to remove, but {type(module).__name__} has no group of channels that may go"
        left_out = [f"protect leaves out {', '.join(protect)}"] if protect else []
        raise StageError("; ".join([msg, *left_out, *list_reasons(kept, layer_paths(module))]))
    for line in list_lines(kept, layer_paths(module)):
        log(line)
    return groups


def _inside(module: nn.Module, parents: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path, _ in module.named_modules() if is_within(path, parents))


def prune_channels(module: nn.Module, example_inputs: Inputs, groups: Sequence[Group], removal: Removal) -> Pruned:
    """Return a copy of `module` without the units of `removal`.

    The copy is proven before it is returned: it runs, keeps the shape of its outputs, and answers as `module` does when
    nothing reads those units. Normalizations that average over the units are left out of this proof.

    Raises StageError if the proof fails, if a group would lose all, or if `removal` is empty.
    """
    if not any(removal.values()):
        sizes = sorted({group.units for group in groups})
        msg = (
            f"pruning must remove a channel, but what is asked leaves groups of {sizes} whole; lower round_to or raise "
            "pruning_ratio"
        )
        raise StageError(msg)
    check_cut(module, groups, removal, example_inputs)
    smaller = without(module, groups, removal)
    channels = {}
    for group in groups:
        kept = group.units - len(removal.get(group.path, ()))
        channels[group.path] = (kept * group.channels_per_unit, group.units * group.channels_per_unit)
    return Pruned(smaller, channels)


def _check_finite(module: nn.Module) -> None:
    names = [name for name, parameter in module.named_parameters() if not parameter.isfinite().all()]
    if names:
        listed = list_names(names, most=5)
        msg = f"all weights must be finite to be pruned, but {listed} are not; check the weights file"
        raise StageError(msg)
