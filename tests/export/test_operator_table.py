import inspect

import torch
from torch import nn

from compressor.export.operator_table import share_operator_table
from compressor.export.operators import translations
from compressor.export.to_onnx import quiet_torch


def export(**settings) -> bytes:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    with quiet_torch():
        program = torch.onnx.export(module, (torch.ones(2, 1, 8, 8),), dynamo=True, verbose=False, **settings)
    return program.model_proto.SerializeToString(deterministic=True)


def test_second_export_reads_no_source_and_gives_the_bytes_that_torch_gives_alone(monkeypatch):
    alone = export()
    with share_operator_table():
        export()
        reads = []
        getsource = inspect.getsource
        monkeypatch.setattr(inspect, "getsource", lambda function: reads.append(function) or getsource(function))
        assert export() == alone
    assert not reads


def test_operators_of_one_export_are_not_in_the_table_of_the_next():
    with share_operator_table():
        alone = export()
        export(custom_translation_table=dict(translations()))
        assert export() == alone


def test_composite_operators_are_looked_up_once_for_an_export(monkeypatch):
    lookups = []
    look_up = torch._C._dispatch_get_registrations_for_dispatch_key
    monkeypatch.setattr(
        torch._C, "_dispatch_get_registrations_for_dispatch_key", lambda key: lookups.append(key) or look_up(key)
    )
    alone = export()
    assert len(lookups) > 10  # torch 2.13 does it for each namespace, twice
    lookups.clear()
    with share_operator_table():
        assert export() == alone
    assert len(lookups) == 1


def test_torch_makes_its_own_table_again_behind_the_block():
    from torch.onnx._internal.exporter._registration import ONNXRegistry  # noqa: PLC0415  # private to torch

    before = vars(ONNXRegistry)["from_torchlib"]
    with share_operator_table():
        assert ONNXRegistry.from_torchlib(opset_version=20) is not ONNXRegistry.from_torchlib(opset_version=20)
    assert vars(ONNXRegistry)["from_torchlib"] is before
