from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import nn

from compressor import OnnxModel, Samples, Task, TorchModel
from compressor.errors import StageError
from compressor.export.operators import pack, unpack
from compressor.models.outputs import relative_error
from compressor.onnx_files.facts import OnnxFacts, read_facts
from compressor.quantization.float_graph import float_graph
from compressor.quantization.weight_blocks import block_codes, plan_weights
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.onnx_export import OnnxExport
from compressor.stages.weight_only import WeightOnly

TOKENS = torch.randint(0, 50, (16, 7), generator=torch.Generator().manual_seed(0))
NUMBERS = torch.randn(16, 5, 96, generator=torch.Generator().manual_seed(0))


def task_of(inputs: torch.Tensor) -> Task:
    split = Samples((inputs,), torch.zeros(len(inputs), dtype=torch.long))
    return Task(split, split, split, split, (inputs[:2],))


def apply(stage: WeightOnly | OnnxExport, model: TorchModel, task: Task, directory: Path) -> OnnxModel:
    directory.mkdir()
    return stage.apply(model, task, StageContext(model, torch.device("cpu"), 0, directory, print))


@pytest.fixture(scope="module")
def gpt2() -> TorchModel:
    model = TorchModel.build(Reference(factory="transformer_networks:gpt2", layers=1), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.module.parameters():  # equal tensors, such as biases of zero, are stored once
        nn.init.normal_(parameter, float(parameter.ndim == 1 and parameter.detach().mean()), 0.1, generator)
    return model


@pytest.fixture(scope="module")
def facts_before(gpt2: TorchModel, tmp_path_factory: pytest.TempPathFactory) -> OnnxFacts:
    """Of the file in float."""
    written = apply(OnnxExport(), gpt2, task_of(TOKENS), tmp_path_factory.mktemp("gpt2") / "float")
    return read_facts(written.path, [TOKENS[:1].numpy()])


@pytest.mark.parametrize("bits", [4, 8])
def test_each_weight_is_within_half_a_step_and_zeros_stay_zero(bits):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    weight[0, :40] = 0.0
    weight[1] = weight[1].abs()
    found = block_codes(weight, bits, 32)
    step = found.scale.repeat_interleave(32, dim=1)
    # an end that is not a multiple of the step moves by up to half of one with the zero point
    assert ((found.numbers() - weight).abs() <= step * 1.001).all()
    assert ((found.numbers() - weight).abs() <= step * 0.501).float().mean() > 0.95
    assert torch.equal(found.numbers()[0, :40], torch.zeros(40))


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_are_read_back(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8).reshape(2, -1)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    assert pack(codes, bits).numel() * 8 == codes.numel() * bits


@pytest.mark.parametrize(("bits", "error", "smaller"), [(4, 0.25, 3.0), (8, 0.025, 2.3)])
def test_gpt2_multiplies_with_blocks_and_stores_its_embeddings_as_int8(
    bits, error, smaller, *, gpt2, facts_before, tmp_path
):
    model = apply(WeightOnly(bits=bits), gpt2, task_of(TOKENS), tmp_path / "small")
    graph = onnx.load(model.path).graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["MatMulNBits"] == 4 + 1
    assert operators["Gemm"] == 0
    tables = [to_array(tensor) for tensor in graph.initializer if list(tensor.dims) in ([50, 32], [16, 32])]
    assert {str(table.dtype) for table in tables} == {"int8"}
    # each of 16 or 256 steps between the ends of a block
    assert relative_error(model.predict((TOKENS,)), gpt2.predict((TOKENS,))) < error
    facts = read_facts(model.path, [TOKENS[:1].numpy()])
    assert facts.macs == facts_before.macs
    # the last layer is the embedding, but has codes of its own; the rest is constants of the mask
    parameters = sum(parameter.numel() for parameter in gpt2.module.parameters()) + 50 * 32
    assert parameters <= facts.parameters < parameters + 50
    assert facts_before.size_bytes > smaller * facts.size_bytes


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_an_odd_number_of_blocks_and_layers_that_do_not_fit_are_close_to_float(bits, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 64, bias=False), nn.Linear(64, 8))
    model = TorchModel(network.eval(), Reference(factory="torch.nn:Sequential"))
    plan = plan_weights(float_graph(network, task_of(NUMBERS)), 32)
    assert [unit.layer for unit in plan.blocks] == ["0", "3"]
    assert [unit.layer for unit in plan.stored] == ["2"]
    found = apply(WeightOnly(bits=bits), model, task_of(NUMBERS), tmp_path / "small")
    assert relative_error(found.predict((NUMBERS,)), model.predict((NUMBERS,))) < (0.2 if bits == 4 else 0.02)


def test_model_of_which_no_layer_fits_is_refused():
    model = TorchModel(nn.Linear(96, 40).eval(), Reference(factory="torch.nn:Linear"))
    task = task_of(NUMBERS)
    with pytest.raises(StageError, match="inputs are a multiple of block_size=64"):
        WeightOnly(block_size=64).rehearse(model, model, task)
