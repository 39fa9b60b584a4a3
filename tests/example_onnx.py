"""Small ONNX files, made with onnx alone."""

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info


def convolutions(path: Path, *layers: tuple[int, int], shape: tuple = ("batch", 1, 28, 28)) -> Path:
    """Write a chain of convolutions; a layer is (output channels, kernel size)."""
    nodes, weights, channels = [], [], shape[1]
    for index, (units, kernel) in enumerate(layers):
        weight = np.full((units, channels, kernel, kernel), 0.05, dtype=np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(make_node("Conv", [f"t{index}", f"w{index}"], [f"c{index}"], pads=[kernel // 2] * 4))
        nodes.append(make_node("Relu", [f"c{index}"], [f"t{index + 1}"]))
        channels = units
    nodes[-1].output[0] = "y"
    return save(path, nodes, weights, {"t0": (TensorProto.FLOAT, shape)})


def save(path: Path, nodes: list, weights: list, inputs: dict, kind: int = TensorProto.FLOAT) -> Path:
    arguments = [make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()]
    result = make_tensor_value_info("y", kind, None)
    graph = make_graph(nodes, "model", arguments, [result], weights)
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 20)], ir_version=10), path)
    return path


def graph_model(
    *nodes: NodeProto, weights: dict[str, np.ndarray], shape: tuple[int | str, ...], rank: int = 2
) -> ModelProto:
    """A model from x, of `shape`, to y, of `rank` dimensions."""
    graph = make_graph(
        nodes,
        "graph",
        [make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10)


def linear_model(weight: np.ndarray) -> ModelProto:
    return graph_model(make_node("MatMul", ["x", "w"], ["y"]), weights={"w": weight}, shape=("n", weight.shape[0]))


def save_external(directory: Path, weight: np.ndarray) -> Path:
    path = directory / "model.onnx"
    onnx.save(linear_model(weight), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path
