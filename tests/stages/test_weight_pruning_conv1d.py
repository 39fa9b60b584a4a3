import pytest
import torch
from torch import nn

from compressor import Samples, Task
from compressor.models.artifact import TorchModel
from compressor.models.kept_zeros import zeros_of
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.weight_pruning import WeightPruning

TOKENS = torch.arange(14).view(2, 7)


def test_the_layers_of_gpt2_get_zeros_and_keep_them_when_reloaded(tmp_path):
    model = TorchModel.build(Reference(factory="transformer_networks:gpt2"), seed=0)
    samples = Samples((TOKENS,), TOKENS)
    task = Task(train=samples, validation=samples, test=samples, calibration=samples, example_inputs=(TOKENS,))
    stage = WeightPruning(sparsity=0.5, protect=("model.lm_head",))  # it is the embedding
    context = StageContext(model, torch.device("cpu"), 0, tmp_path, print)
    sparse = stage.apply(model, task, context)
    sparse.save(tmp_path)
    layers = [
        layer for layer in TorchModel.load(tmp_path).module.model.transformer.modules() if type(layer) is nn.Linear
    ]
    assert len(layers) == 4 * len(model.module.model.transformer.h)
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    assert float((weights == 0).float().mean()) == pytest.approx(0.5, abs=1e-4)
    assert zeros_of(stage.rehearse(model, model, task)).keys() == zeros_of(sparse).keys()
