"""An embedding stored as int8 takes the memory of its codes, measured in a process of ONNX Runtime alone."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor import Samples, Task
from compressor.export.to_onnx import to_unchecked_onnx
from compressor.quantization.float_graph import float_graph
from compressor.quantization.int8_model import predict
from compressor.quantization.recipe import Recipe, int8_model
from processes import run_python

RESIDENT_BYTES_OF_A_SESSION = """
import sys
import onnxruntime

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

before = resident()
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(resident() - before)
"""


class Text(nn.Module):
    """A table of 41 MB and a layer that reads means of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40_000, 256), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory of a process")
def test_session_of_an_int8_table_takes_less_memory_than_of_the_float_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 40_000, (16, 8))
    split = Samples((tokens,), torch.zeros(16, dtype=torch.long))
    task = Task(split, split, split, split, (tokens[:2],))
    graph = float_graph(Text().eval(), task)
    int8 = int8_model(graph, split, range(16), Recipe("portable", "minmax", "nearest", bias_correction=False, seed=0))
    files = [
        to_unchecked_onnx(one, task, tmp_path / name) for one, name in ((graph, "float"), (int8.int8_graph, "int8"))
    ]
    torch.testing.assert_close(files[1].predict((tokens,)), predict(int8.int8_graph, (tokens,)), rtol=0, atol=1e-5)
    taken = [int(run_python("-c", RESIDENT_BYTES_OF_A_SESSION, file.path, torch=False).stdout) for file in files]
    # codes and their factors are 10.4 MB of 41; while it is read, the file may be there as well
    assert taken[1] < 0.6 * taken[0]
