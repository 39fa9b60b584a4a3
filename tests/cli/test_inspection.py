from pathlib import Path

from compressor.cli.inspection import inspect_models, to_table
from compressor.config.pipeline_file import load

CODE = """
import torch
from torch import nn

from compressor import Samples, Stage, StageContext, Task, TorchModel
from compressor.references.reference import Reference


class Words(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, 1200)])

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def words(width=4):
    return Words(width)


def greeting():
    return "no module"


def task():
    tokens, targets = torch.arange(21).reshape(3, 7) % 50, torch.arange(3)
    split = Samples((tokens,), targets)
    return Task(train=split, validation=split, test=split, calibration=split, example_inputs=(tokens,))


class Greet(Stage[TorchModel, TorchModel]):
    greeting: Reference

    def apply(self, model: TorchModel, task: Task, context: StageContext) -> TorchModel:
        return model
"""

PIPELINE = """
name: words
model: {factory: word_code:words, width: 8, weights_file: words.safetensors}
task: {factory: word_code:task}
stages:
  - {stage: "word_code:Greet", greeting: {factory: word_code:greeting}}
  - {stage: distillation, epochs: 1, student: {factory: word_code:words}}
  - {stage: distillation, epochs: 2, student: {factory: word_code:words, weights_file: other.safetensors}}
"""


def test_every_model_of_a_pipeline_is_inspected_once_without_its_weights(tmp_path: Path):
    (tmp_path / "word_code.py").write_text(CODE)
    for name in ("words", "other"):
        (tmp_path / f"{name}.safetensors").write_text("not read")
    (tmp_path / "words.yaml").write_text(PIPELINE)
    models = inspect_models(load(tmp_path / "words.yaml"))
    assert [model.name for model in models] == ["word_code:words(width=8)", "word_code:words"]
    assert [model.parameters for model in models] == [50 * 8 + 8 * 9 + 9 * 1200, 50 * 4 + 4 * 5 + 5 * 1200]
    assert to_table(models[0]).splitlines() == [
        "word_code:words(width=8): 11,272 parameters",
        "layer      class      output        parameters",
        "---------  ---------  ------------  ----------",
        "embedding  Embedding  (N, 7, 8)            400",
        "blocks.0   Linear     (N, 7, 8)             72",
        "blocks.1   Linear     (N, 7, 1200)      10,800",
        "never called, or without a tensor: blocks",
    ]
