"""What is left out of an ONNX graph, and how it is written."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from compressor.onnx_files.writing import compact, with_metadata, write

WEIGHT = np.random.default_rng(0).normal(size=(2, 1, 3, 3)).astype(np.float32)


@pytest.fixture
def model() -> ModelProto:
    """As an exporter writes it: every attribute, one tensor twice, an operator set that nothing uses."""
    graph = parser.parse_graph(
        """graph (float[N,1,6,6] input) => (float[N,2,2,2] output) {
            [first] hidden = Conv <group=1, auto_pad="NOTSET", dilations=[1,1], pads=[0,0,0,0], strides=[1,1],
                                   kernel_shape=[3,3]> (input, weight)
            [second] sum = Conv <pads=[1,1,1,1], group=2, strides=[2,2]> (hidden, twin)
            output = Add (sum, bias)
        }"""
    )
    tensors = {"weight": WEIGHT, "twin": WEIGHT, "bias": np.float32(1.0), "same bits": np.int32(0x3F800000)}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items())
    for node in graph.node:
        node.doc_string = "a comment"
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "net.py", line 15')
    graph.value_info.append(helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["N", 2, 4, 4]))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("pkg.onnxscript.torch_lib", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(path: Path) -> np.ndarray:
    images = np.random.default_rng(1).normal(size=(3, 1, 6, 6)).astype(np.float32)
    return onnxruntime.InferenceSession(path).run(None, {"input": images})[0]


def test_compact_graph_gives_the_same_outputs(model: ModelProto, tmp_path: Path) -> None:
    write(model, tmp_path / "whole.onnx")
    write(compact(model), tmp_path / "compact.onnx")
    np.testing.assert_array_equal(run(tmp_path / "compact.onnx"), run(tmp_path / "whole.onnx"))


def test_compact_graph_holds_only_what_computes(model: ModelProto) -> None:
    smaller = compact(model)
    first, second, _ = smaller.graph.node
    assert [attribute.name for attribute in first.attribute] == ["kernel_shape"]
    assert {attribute.name for attribute in second.attribute} == {"pads", "group", "strides"}
    assert not any(node.name or node.doc_string or node.metadata_props for node in smaller.graph.node)
    assert not smaller.graph.value_info
    assert [imported.domain for imported in smaller.opset_import] == [""]


def test_equal_tensors_are_stored_once_but_not_equal_bits_of_another_type(model: ModelProto) -> None:
    stored = compact(model).graph.initializer
    assert [tuple(tensor.dims) for tensor in stored] == [WEIGHT.shape, (), ()]
    assert all(len(tensor.name) == 1 for tensor in stored)


def test_names_reach_into_the_bodies_of_conditions(tmp_path: Path) -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]> graph (float[N] input) => (float[N] output)
        <float zero = {0}, float nothing = {0}> {
            total = ReduceSum <keepdims=0> (input)
            positive = Greater (total, zero)
            output = If (positive) <
                then_branch = left () => (float[N] left_result) { left_result = Add (input, total) },
                else_branch = right () => (float[N] right_result) { right_result = Sub (nothing, input) }>
        }"""
    )
    write(compact(model), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for numbers, expected in (([1, 2], [4, 5]), ([-1, -2], [1, 2])):
        (outputs,) = session.run(None, {"input": np.array(numbers, dtype=np.float32)})
        np.testing.assert_array_equal(outputs, np.array(expected, dtype=np.float32))


def test_input_is_not_changed(model: ModelProto) -> None:
    before = model.SerializeToString()
    compact(model)
    with_metadata(model, {"name": "digits"})
    assert model.SerializeToString() == before


def test_metadata_is_added_to_what_is_there_in_one_order(model: ModelProto) -> None:
    described = with_metadata(with_metadata(model, {"b": "1", "a": "2"}), {"c": "3", "b": "4"})
    assert [(entry.key, entry.value) for entry in described.metadata_props] == [("a", "2"), ("b", "4"), ("c", "3")]


def test_model_against_the_specification_is_not_written_silently(model: ModelProto, tmp_path: Path) -> None:
    model.graph.node[2].input[0] = "no such tensor"
    with pytest.raises(onnx.checker.ValidationError):
        write(model, tmp_path / "model.onnx")


def test_external_data_of_an_earlier_export_does_not_stay(model: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    large = numpy_helper.from_array(np.zeros(5000, dtype=np.float32), "large")
    model.graph.initializer.append(large)
    write(model, path, inline_bytes=1000)
    assert (tmp_path / "model.onnx.data").stat().st_size >= 20_000
    write(model, path)
    assert not (tmp_path / "model.onnx.data").exists()
    assert path.stat().st_size > 20_000
