import torch
from torch import nn

from compressor.export import operator_table, to_onnx
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.recipe import Recipe, int8_model
from compressor.task import Samples, Task


class Patches(nn.Module):
    """Reads the size of its input, as transformers of images do."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 4, 4)
        self.norm = nn.BatchNorm2d(4)
        self.start = nn.Parameter(torch.ones(1, 1, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.start.expand(x.shape[0], -1, -1), tokens], dim=1)
        return self.head(tokens.softmax(-1) + tokens)[:, 0]


def task_of_images():
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    split = Samples((images,), torch.zeros(8, dtype=torch.int64))
    return Task(split, split, split, split, (images[:2],))


def test_an_int8_graph_gives_the_bytes_of_a_second_trace_without_one(tmp_path, monkeypatch):
    task = task_of_images()
    torch.manual_seed(0)
    graph = fold_batch_norms(float_graph(Patches().eval(), task))
    int8 = int8_model(graph, task.calibration, range(8), Recipe("portable", "minmax", "nearest", False, 0)).int8_graph
    with monkeypatch.context() as traced:
        traced.setattr(to_onnx, "is_traced", lambda *_: False)
        traced.setattr(operator_table, "_stays", lambda *_: False)
        wanted = to_onnx.to_unchecked_onnx(int8, task, tmp_path / "traced.onnx").path.read_bytes()
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: 1 / 0)
    assert to_onnx.to_unchecked_onnx(int8, task, tmp_path / "direct.onnx").path.read_bytes() == wanted


def test_a_graph_with_other_open_axes_or_operators_in_place_is_traced():
    task = task_of_images()
    graph = float_graph(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), task)
    inputs = task.example_inputs
    assert to_onnx.is_traced(graph, inputs, ({0: "batch"},))
    assert not to_onnx.is_traced(graph, inputs, ({0: "batch", 2: "height"},))
    assert not to_onnx.is_traced(graph, (inputs[0].double(),), ({0: "batch"},))
    assert not to_onnx.is_traced(nn.Sequential(graph), inputs, ({0: "batch"},))
    next(n for n in graph.graph.nodes if n.name == "relu").target = torch.ops.aten.relu_.default
    assert not to_onnx.is_traced(graph, inputs, ({0: "batch"},))
