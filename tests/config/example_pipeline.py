"""A package that offers stages, a pipeline that uses them, and what loading it tells."""

from pathlib import Path

import pytest

from compressor.config.pipeline_file import load
from compressor.errors import ConfigError

STAGES = '''
from enum import Enum
from typing import ClassVar, Literal, final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.models.artifact import Artifact, OnnxModel, TorchModel
from compressor.references.reference import Reference
from compressor.stage import Stage

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Kd(BaseModel):
    model_config = STRICT
    temperature: float = Field(default=4.0, gt=0)


class Recovery(BaseModel):
    model_config = STRICT
    epochs: int = Field(gt=0)
    losses: dict[str, Kd] = {}
    sizes: tuple[int, int] = (8, 8)

    @model_validator(mode="after")
    def _is_short(self) -> "Recovery":
        if self.epochs > 100:
            raise ValueError(f"recovery must be shorter than 100 epochs, got {self.epochs}")
        return self


@final
class Train(Stage[TorchModel, TorchModel]):
    """Train."""

    makes_baseline: ClassVar[bool] = True
    epochs: int = Field(gt=0)

    def apply(self, model: TorchModel, task, context) -> TorchModel: ...


@final
class Distill(Stage[TorchModel, TorchModel]):
    """Distil."""

    student: Reference

    def apply(self, model: TorchModel, task, context) -> TorchModel: ...


@final
class Prune(Stage[TorchModel, TorchModel]):
    """Prune."""

    pruning_ratio: float = Field(gt=0, lt=1)
    recovery: Recovery | None = None
    round_to: int | Literal["target"] = 8
    protect: Literal["none"] | tuple[str, ...] = ()

    def apply(self, model: TorchModel, task, context) -> TorchModel: ...


@final
class Quantize(Stage[TorchModel, OnnxModel]):
    """Quantize."""

    target: Literal["portable", "x86-vnni"] = "portable"

    def apply(self, model: TorchModel, task, context) -> OnnxModel: ...


@final
class Export(Stage[Artifact, OnnxModel]):
    """Export."""

    def apply(self, model: Artifact, task, context) -> OnnxModel: ...
'''
PIPELINE = """\
name: digits
model: {factory: digits:teacher}
task: {factory: digits:task, data_dir: data}
stages:
  - stage: train
    epochs: 20
  - stage: distill
    student: {factory: digits:student, weights_file: student.pt}
  - stage: prune
    pruning_ratio: 0.5
    recovery: {epochs: 10}
  - stage: quantize
  - stage: export
gate: {size_ratio: {min: 10}, accuracy_drop: {max: 0.01}}
"""
USER_CODE = """\
raise SystemExit("the user's model and task are not to be imported")
def teacher(width=64): ...
def student(): ...
def task(data_dir): ...
"""


def problems(directory: Path, text: str, *overrides: str) -> list[str]:
    """What `load` tells about `text`, each as `line:column: message`, or `--set …` as it is."""
    (directory / "p.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(directory / "p.yaml", overrides)
    return [str(problem).removeprefix(f"{directory / 'p.yaml'}:") for problem in raised.value.problems]


def changed(old: str, new: str) -> str:
    assert PIPELINE.count(old) == 1
    return PIPELINE.replace(old, new)


def with_stages(*lines: str) -> str:
    head, _, _ = PIPELINE.partition("  - stage")
    return head + "".join(f"  - {line}\n" for line in lines)
