"""Zeros among the weights of a model: a promise that later stages keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import nn

from compressor.errors import InputError, StageError
from compressor.models.artifact import TorchModel
from compressor.models.attachment import Attachment
from compressor.models.edits import Edit, name_after
from compressor.models.weights import count_zeros

_FILE_NAME = "zeros.json"
_COUNTS = TypeAdapter(dict[str, NonNegativeInt])


@final
@dataclass(frozen=True)
class KeptZeros(Attachment):
    """By name of a parameter, at least how many of its values are zero."""

    counts: Mapping[str, int]

    @classmethod
    def of(cls, module: nn.Module, counts: Mapping[str, int]) -> Self:
        """Promise `counts`. Raises StageError if `module` has fewer zeros, or no parameter of such a name."""
        parameters = dict(module.named_parameters())
        for name, promised in counts.items():
            kept = count_zeros(parameters[name]) if name in parameters else "no such parameter"
            if not isinstance(kept, int) or kept < promised:
                msg = (
                    f"{name} must keep its {promised} zeros, got {kept}; pass the names of `zeros_of` to fit, or "
                    "Student.of(model) to distil"
                )
                raise StageError(msg)
        return cls(counts)

    def save(self, directory: Path) -> None:
        """Write `zeros.json`."""
        (directory / _FILE_NAME).write_bytes(_COUNTS.dump_json(dict(self.counts), indent=1))

    @classmethod
    def load(cls, directory: Path, module: nn.Module) -> Self:
        """Read `zeros.json`. Raises InputError if it is damaged, StageError if `module` has lost zeros."""
        try:
            counts = _COUNTS.validate_json((directory / _FILE_NAME).read_bytes())
        except (OSError, ValidationError) as error:
            msg = f"{directory / _FILE_NAME} must hold numbers of zeros by name of a parameter, but: {error}"
            raise InputError(msg) from error
        return cls.of(module, counts)

    def carry_over(self, before: nn.Module, after: nn.Module, edits: tuple[Edit, ...]) -> Self | None:
        """Return the promise for the parameters that are left; in those of another shape, zeros are counted anew."""
        counts = {}
        for name, count in self.counts.items():
            if (now := name_after(name, edits)) is not None:
                weight = after.get_parameter(now)
                same = weight.shape == before.get_parameter(name).shape
                counts[now] = count if same else count_zeros(weight)
        return self.of(after, counts) if counts else None


def zeros_of(model: TorchModel) -> Mapping[str, int]:
    """By name of a parameter, how many zeros `model` promises to keep; none for a dense model."""
    kept = model.attachment(KeptZeros)
    return {} if kept is None else kept.counts
