from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor.errors import StageError
from compressor.export.to_onnx import to_onnx
from compressor.models.artifact import TorchModel
from compressor.models.edits import structural_edits
from compressor.pruning.conv1d import with_linears
from compressor.pruning.groups import Group, Member, check_equal, run, silence, without
from compressor.pruning.transformers import transformer_groups, transformer_units
from compressor.references.reference import Reference
from compressor.task import Samples, Task
from networks import ConcatenatedNetwork, PlainNetwork
from processes import run_python
from transformer_networks import EncoderLayers, PatchTransformer, bert

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    factory: str
    attention: str
    """Path of the attention of the first layer."""
    heads: int
    width: int
    """Hidden units of the first feed-forward layer."""
    attributes: dict[str, int]
    """Of the attention, after one head and three hidden units have left."""
    groups: int = 4
    arguments: dict[str, object] = None
    tokens: bool = False


CASES = {
    "bert": Case(
        "bert",
        "model.bert.encoder.layer.0.attention.self",
        4,
        64,
        {"num_attention_heads": 3, "attention_head_size": 8, "all_head_size": 24},
        groups=5,  # the pooler's units too
        tokens=True,
    ),
    "bert-with-as-many-heads-as-channels-in-each": Case(
        "bert",
        "model.bert.encoder.layer.0.attention.self",
        4,
        64,
        {"num_attention_heads": 3, "attention_head_size": 4, "all_head_size": 12},
        groups=5,
        arguments={"width": 16},
        tokens=True,
    ),
    "vit": Case("vit", "model.vit.layers.0.attention", 4, 64, {"num_attention_heads": 3, "head_dim": 8}),
    "gpt2": Case(
        "gpt2",
        "model.transformer.h.0.attn",
        4,
        128,
        {"num_heads": 3, "head_dim": 8, "split_size": 24, "embed_dim": 32},
        tokens=True,
    ),
    "llama-with-grouped-queries": Case(
        "llama", "model.model.layers.0.self_attn", 2, 64, {"head_dim": 8, "num_key_value_groups": 2}, tokens=True
    ),
    "fused": Case(
        "PatchTransformer",
        "blocks.0.attn",
        4,
        64,
        {"num_heads": 3, "head_dim": 8},
        arguments={"attention": "fused"},
    ),
    "fused-with-as-many-heads-as-channels-in-each": Case(
        "PatchTransformer",
        "blocks.0.attn",
        4,
        32,
        {"num_heads": 3, "head_dim": 4},
        arguments={"attention": "fused", "dim": 16},
    ),
    "heads-first": Case(
        "PatchTransformer",
        "blocks.0.attn",
        4,
        64,
        {"heads": 3, "depth": 3},
        arguments={"attention": "heads_first"},
    ),
    "heads-first-and-three-heads": Case(
        "PatchTransformer",
        "blocks.0.attn",
        3,
        48,
        {"heads": 2, "depth": 3},
        arguments={"attention": "heads_first", "dim": 24, "heads": 3},
    ),
    "separate": Case("PatchTransformer", "blocks.0.attn", 4, 64, {"n_heads": 3}, arguments={"attention": "separate"}),
    "bias-for-each-head": Case(
        "PatchTransformer", "blocks.0.attn", 4, 64, {"n_heads": 3}, arguments={"attention": "biased"}
    ),
}

RELOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from compressor import TorchModel
for directory in map(Path, sys.argv[1:]):
    inputs = load_file(directory / "inputs.safetensors")["inputs"]
    save_file({"logits": TorchModel.load(directory).predict((inputs,))}, directory / "logits.safetensors")
"""


def model_and_inputs(case, digits_task):
    reference = Reference(factory=f"transformer_networks:{case.factory}", **(case.arguments or {}))
    model = with_linears(TorchModel.build(reference, seed=0))
    sharpen_in_place(model.module)
    tokens = torch.randint(50, (8, 7), generator=torch.Generator().manual_seed(0))
    return model, tokens if case.tokens else digits_task.test.inputs[0][:8]


def sharpen_in_place(module):
    # fresh weights make attention a plain mean, which no wrong grouping of queries and keys would change
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(1.5 / (layer.weight.std() * layer.in_features**0.5))


def removal_of(groups):
    return {group.path: (1,) if group.kind == "heads" else (0, 3, group.units - 1) for group in groups}


def pruned(model, inputs):
    groups = transformer_groups(model.module, (inputs,))
    smaller = without(model.module, groups, removal_of(groups))
    return model.with_module(smaller, *structural_edits(model.module, smaller))


def block_of(**arguments):
    torch.manual_seed(0)
    return PatchTransformer(**arguments).eval()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_heads_and_hidden_units_are_found_and_attributes_follow_them(case, digits_task):
    model, inputs = model_and_inputs(case, digits_task)
    groups = transformer_groups(model.module, (inputs,))
    attention = pruned(model, inputs).module.get_submodule(case.attention)
    assert len(groups) == case.groups
    assert (groups[0].kind, groups[0].units) == ("heads", case.heads)
    assert (groups[1].kind, groups[1].units) == ("channels", case.width)
    assert {name: getattr(attention, name) for name in case.attributes} == case.attributes
    for layer in attention.modules():
        if isinstance(layer, nn.Linear):
            assert tuple(layer.weight.shape) == (layer.out_features, layer.in_features)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pruned_model_answers_like_one_whose_units_are_silent(case, digits_task):
    model, inputs = model_and_inputs(case, digits_task)
    groups = transformer_groups(model.module, (inputs,))
    wide = model.module.double()  # so that rounding cannot hide a small fault
    inputs = (inputs if case.tokens else inputs.double(),)
    silent = silence(wide, groups, removal_of(groups))
    check_equal(without(wide, groups, removal_of(groups)), silent, inputs, tolerance=1e-6)
    with pytest.raises(StageError, match="its outputs differ by"):
        check_equal(wide, silent, inputs, tolerance=1e-3)  # what the removed units did is no trifle


def test_pruned_models_reload_in_a_fresh_process_with_equal_logits(tmp_path, digits_task):
    expected = {}
    for name, case in CASES.items():
        model, inputs = model_and_inputs(case, digits_task)
        smaller = pruned(model, inputs)
        directory = tmp_path / name
        directory.mkdir()
        smaller.save(directory)
        save_file({"inputs": inputs.contiguous()}, directory / "inputs.safetensors")
        expected[directory] = smaller.predict((inputs,))
    run_python("-c", RELOAD, *expected, PYTHONPATH=str(TESTS)).check_returncode()
    for directory, logits in expected.items():
        assert torch.equal(load_file(directory / "logits.safetensors")["logits"], logits), directory.name


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama-with-grouped-queries", "fused", "bias-for-each-head"])
def test_pruned_model_gives_the_same_logits_as_onnx(name, tmp_path, digits_task):
    model, inputs = model_and_inputs(CASES[name], digits_task)
    smaller = pruned(model, inputs)
    samples = Samples((inputs,), torch.zeros(len(inputs), dtype=torch.long))
    task = Task(samples, samples, samples, samples, example_inputs=(inputs[:2],))
    exported = to_onnx(smaller.module, task, tmp_path / "model.onnx")
    torch.testing.assert_close(exported.predict((inputs,)), smaller.predict((inputs,)), rtol=1e-3, atol=1e-4)


def test_rows_cut_without_their_attribute_run_and_give_other_numbers(digits_task):
    module, inputs = block_of(attention="separate"), digits_task.example_inputs
    sharpen_in_place(module)
    groups = transformer_groups(module, inputs)
    careless = tuple(replace(group, sizes=()) for group in groups)
    removal = {"blocks.0.attn.q": (1,)}
    smaller = without(module, careless, removal)
    assert run(smaller, inputs).shape == (2, 10)
    with pytest.raises(StageError, match="its outputs differ by"):
        check_equal(smaller, silence(module, groups, removal), inputs)
    check_equal(without(module, groups, removal), silence(module, groups, removal), inputs)


def test_bert_without_half_of_each_head_runs_and_gives_other_numbers(digits_task):
    # what Torch-Pruning does: channels leave every head, attention_head_size stays, and the rest is regrouped
    model, tokens = model_and_inputs(CASES["bert"], digits_task)
    attention = "model.bert.encoder.layer.0.attention"
    halves = (tuple(row for row in range(32) if row % 8 >= 4), tuple(row for row in range(32) if row % 8 < 4))
    makers = [f"{attention}.self.{name}" for name in ("query", "key", "value")]
    members = [Member(path, name, 0, halves) for path in makers for name in ("weight", "bias")]
    reader = Member(f"{attention}.output.dense", "weight", 1, halves, reads=True)
    group = Group(makers[0], 2, (*members, reader), ())
    smaller = without(model.module, [group], {group.path: (0,)})
    assert run(smaller, (tokens,)).shape == (8, 2)
    with pytest.raises(StageError, match="its outputs differ by"):
        check_equal(smaller, silence(model.module, [group], {group.path: (0,)}), (tokens,))


def test_regrouping_is_found_out_with_weights_too_small_to_show_it(digits_task):
    model = TorchModel.build(Reference(factory="transformer_networks:bert"), seed=0)
    groups = transformer_groups(model.module, (torch.arange(14).view(2, 7),))
    names = {size.name for size in groups[0].sizes if size.path.endswith("attention.self")}
    assert names == {"num_attention_heads", "all_head_size"}
    fresh = block_of(attention="separate")
    for layer in fresh.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(1e-3)
    sizes = transformer_groups(fresh, digits_task.example_inputs)[0].sizes
    assert ("blocks.0.attn", "n_heads") in {(size.path, size.name) for size in sizes}


def test_attention_that_takes_sizes_from_its_input_is_kept_and_the_rest_is_found(digits_task):
    units = transformer_units(block_of(attention="stale"), digits_task.example_inputs)
    assert [group.path for group in units.groups] == ["blocks.0.mlp.0", "blocks.1.mlp.0"]
    assert list(units.kept) == ["blocks.0.attn", "blocks.1.attn"]
    assert units.kept["blocks.0.attn"] == (
        "whichever attributes of StaleAttention follow (num_heads=4, head_dim=8), it does not run without a head or "
        "gives other numbers than with the head silent; let it reshape with its own num_heads and head_dim, not with "
        "sizes of its input, of a configuration or of another layer"
    )


def test_protected_attention_keeps_its_heads_and_the_rest_is_found(digits_task):
    protect = ("blocks.0.attn", "blocks.1.attn")
    units = transformer_units(block_of(attention="stale"), digits_task.example_inputs, protect=protect)
    assert [group.path for group in units.groups] == ["blocks.0.mlp.0", "blocks.1.mlp.0"]
    assert units.kept == {}


def test_torch_attention_is_kept_with_its_reason(digits_task):
    units = transformer_units(block_of(attention="torch"), digits_task.example_inputs)
    assert [group.path for group in units.groups] == ["blocks.0.mlp.0", "blocks.1.mlp.0"]
    assert list(units.kept) == ["blocks.0.attn", "blocks.1.attn"]
    assert "takes the size of a head from the width of its input" in units.kept["blocks.0.attn"]


def test_encoder_of_torch_loses_hidden_units_alone(digits_task):
    units = transformer_units(EncoderLayers().eval(), digits_task.example_inputs)
    assert [group.path for group in units.groups] == ["encoder.layers.0.linear1", "encoder.layers.1.linear1"]
    assert list(units.kept) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]


def test_attention_with_a_layer_in_between_is_named_as_kept(digits_task):
    units = transformer_units(block_of(attention="interleaved"), digits_task.example_inputs)
    assert list(units.kept) == ["blocks.0.attn", "blocks.1.attn"]
    assert [group.path for group in units.groups] == ["blocks.0.mlp.0", "blocks.1.mlp.0"]


def test_hidden_units_that_a_softmax_mixes_are_no_group(digits_task):
    module = block_of(attention="fused")
    module.blocks[0].mlp[1] = nn.Softmax(dim=-1)  # runs with fewer units, and gives the others more
    paths = [group.path for group in transformer_groups(module, digits_task.example_inputs)]
    assert paths == ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.0"]


def test_weight_shared_by_two_layers_is_kept(digits_task):
    module = block_of(attention="fused")
    module.blocks[1].mlp[0].weight = module.blocks[0].mlp[0].weight
    units = transformer_units(module, digits_task.example_inputs)
    assert [group.path for group in units.groups] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    reason = "blocks.0.mlp.0.weight and blocks.1.mlp.0.weight are one and the same"
    assert units.kept == {"blocks.0.mlp.0": reason, "blocks.1.mlp.0": reason}


def test_frozen_layer_matters_only_where_it_would_be_cut(digits_task):
    module = block_of(attention="fused")
    module.positions.requires_grad_(False)
    module.blocks[0].attn.proj.requires_grad_(False)
    units = transformer_units(module, digits_task.example_inputs)
    assert [group.path for group in units.groups] == ["blocks.0.mlp.0", "blocks.1.attn.qkv", "blocks.1.mlp.0"]
    assert units.kept == {"blocks.0.attn.qkv": "blocks.0.attn.proj.weight is frozen: it has requires_grad=False"}


@pytest.mark.parametrize("network", [PlainNetwork, ConcatenatedNetwork])
def test_network_without_attention_has_no_groups(network, digits_task):
    units = transformer_units(network().eval(), digits_task.example_inputs)
    assert (units.groups, units.kept) == ((), {})


def test_module_is_left_as_it_was():
    module = bert().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    transformer_groups(module, (torch.arange(14).view(2, 7),))
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
