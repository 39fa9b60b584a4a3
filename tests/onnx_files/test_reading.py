"""ONNX files that are not trusted: what would harm whoever opens them is refused before that."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_function, make_graph, make_node, make_opsetid, make_sparse_tensor, make_tensor_value_info

from compressor.errors import InputError
from compressor.onnx_files.reading import MOST_BYTES, MOST_FILE_BYTES, external_files, load_graph
from compressor.onnx_files.runtime import open_session
from example_onnx import graph_model, linear_model, save_external

WEIGHT = np.ones((4, 4), np.float32)


def relu(domain: str = "", operator: str = "Relu") -> ModelProto:
    return graph_model(make_node(operator, ["x"], ["y"], domain=domain), weights={}, shape=("n", 4))


def described_by(*fields: tuple[str, str]) -> Callable[[TensorProto], None]:
    """Describe the external data of a tensor by these keys and values instead."""

    def change(tensor: TensorProto) -> None:
        del tensor.external_data[:]
        for key, value in fields:
            tensor.external_data.add(key=key, value=value)

    return change


def with_external_data(directory: Path, change: Callable[[TensorProto], None]) -> Path:
    """A model whose weight, 64 bytes, lies in model.onnx.data, then `change`d."""
    path = save_external(directory, WEIGHT)
    model = onnx.load(path, load_external_data=False)
    change(model.graph.initializer[0])
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_of_its_own_is_found(tmp_path):
    path = save_external(tmp_path, WEIGHT)
    assert external_files(load_graph(path), tmp_path) == (tmp_path / "model.onnx.data",)
    path = with_external_data(tmp_path, described_by(("location", "model.onnx.data")))  # as long as the tensor is
    assert external_files(load_graph(path), tmp_path) == (tmp_path / "model.onnx.data",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("location", "../secret")], "must lie beside the model, got location '../secret'"),
        ([("location", "/etc/hostname")], "must lie beside the model"),
        ([("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096"), ("length", "64")], "must lie beside the model"),
        ([("location", "model.onnx.data"), ("location", "../secret")], "by each key once"),
        ([("location", "model.onnx"), ("length", "64")], "in a file of its own, got the model itself"),
        ([("location", "model.onnx.data"), ("offset", "8"), ("length", "64")], "has 64 bytes, got an end at 72"),
        ([("location", "model.onnx.data"), ("offset", "65")], "has 64 bytes, got an end at 65"),
        ([("location", "model.onnx.data"), ("offset", "-4")], "whole numbers"),
        ([("location", "model.onnx.data"), ("length", "9" * 30)], "whole numbers"),
        ([("location", "model.onnx.data"), ("length", "6_4")], "whole numbers"),
    ],
)
def test_external_data_that_is_not_plainly_within_its_file_is_refused(tmp_path, fields, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    path = with_external_data(tmp_path / "model", described_by(*fields))
    with pytest.raises(ValueError, match=message):
        load_graph(path)


def test_hard_link_that_onnx_runtime_follows_is_refused(tmp_path):
    path, secret = save_external(tmp_path, WEIGHT), tmp_path / "secret"
    secret.write_bytes(bytes(64))
    (tmp_path / "model.onnx.data").unlink()
    (tmp_path / "model.onnx.data").hardlink_to(secret)
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with pytest.raises(ValueError, match=r"without other links to it, which 'model\.onnx\.data' is not"):
        load_graph(path)


def test_symbolic_link_is_refused(tmp_path):
    path = save_external(tmp_path, WEIGHT)
    (tmp_path / "model.onnx.data").rename(tmp_path / "other")
    (tmp_path / "model.onnx.data").symlink_to("other")
    with pytest.raises(ValueError, match="must be a regular file"):
        load_graph(path)


def in_a_sparse_tensor(model: ModelProto, tensor: TensorProto) -> None:
    indices = numpy_helper.from_array(np.array([0, 5]), "indices")
    values = numpy_helper.from_array(np.ones(2, np.float32), "values")
    sparse = make_sparse_tensor(values, indices, [4, 4])
    sparse.values.CopyFrom(tensor)
    model.graph.sparse_initializer.append(sparse)


def in_an_attribute(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(make_node("Constant", [], ["c"], value=tensor))


def in_a_branch(model: ModelProto, tensor: TensorProto) -> None:
    branch = make_graph([], "branch", [], [make_tensor_value_info("w", TensorProto.FLOAT, None)], [tensor])
    model.graph.node.append(make_node("If", ["x"], ["c"], then_branch=branch, else_branch=branch))


def in_a_function(model: ModelProto, tensor: TensorProto) -> None:
    body = [make_node("Constant", [], ["b"], value=tensor)]
    model.functions.append(make_function("mine", "F", [], ["b"], body, [make_opsetid("", 21)]))
    model.opset_import.append(make_opsetid("mine", 1))
    model.graph.node.append(make_node("F", [], ["c"], domain="mine"))


@pytest.mark.parametrize("hide", [in_a_sparse_tensor, in_an_attribute, in_a_branch, in_a_function])
def test_external_data_is_found_wherever_a_tensor_is(tmp_path, hide):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    model = relu()
    hide(model, tensor)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="must lie beside the model, got location '/etc/hostname'"):
        load_graph(tmp_path / "model.onnx")


def nested(domain: str) -> ModelProto:
    branch = make_graph(
        [make_node("Evil", ["x"], ["z"], domain=domain)],
        "branch",
        [],
        [make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    node = make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    return graph_model(node, weights={"yes": np.array(True)}, shape=("n", 4))


def called(domain: str) -> ModelProto:
    model = relu("mine", "F")
    body = [make_node("Evil", ["a"], ["b"], domain=domain)]
    opsets = [make_opsetid("", 21), make_opsetid(domain, 1)]
    model.functions.append(make_function("mine", "F", ["a"], ["b"], body, opsets))
    model.opset_import.extend([make_opsetid("mine", 1), make_opsetid(domain, 1)])
    return model


@pytest.mark.parametrize(
    "model",
    [relu("evil\x1b[31m", "Evil"), nested("evil\x1b[31m"), called("evil\x1b[31m")],
    ids=["graph", "branch", "function"],
)
def test_operator_of_an_unknown_domain_is_refused_wherever_it_is(tmp_path, model):
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        ValueError, match=r"of the domains ai\.onnx, ai\.onnx\.ml, com\.microsoft, got 'evil.x1b.31m\.Evil'"
    ):
        load_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("domain", ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"])
def test_operator_of_onnx_or_onnx_runtime_is_taken(tmp_path, domain):
    (tmp_path / "model.onnx").write_bytes(relu(domain).SerializeToString())
    assert load_graph(tmp_path / "model.onnx").graph.node[0].domain == domain


def calling(name: str, given: list[str], functions: list[FunctionProto]) -> ModelProto:
    """A model that calls one of its functions."""
    model = graph_model(make_node(name, given, ["y"], domain="mine"), weights={}, shape=("n", 4))
    model.opset_import.append(make_opsetid("mine", 1))
    model.functions.extend(functions)
    return model


def function(name: str, *nodes: NodeProto, opset: int = 21) -> FunctionProto:
    """From a to b, which the last of `nodes` gives."""
    return make_function("mine", name, ["a"], ["b"], nodes, [make_opsetid("", opset), make_opsetid("mine", 1)])


def twice(name: str) -> list[NodeProto]:
    """Two calls of a function, one after the other."""
    return [make_node(name, ["a"], ["m"], domain="mine"), make_node(name, ["m"], ["b"], domain="mine")]


RELU = function("F0", make_node("Relu", ["a"], ["b"]))
MEGABYTE = numpy_helper.from_array(np.zeros(1_000_000, np.uint8))


@pytest.mark.parametrize(
    ("functions", "given", "message"),
    [
        ([function("F0", make_node("F0", ["a"], ["b"], domain="mine"))], ["x"], "not call themselves, as 'F0' does"),
        ([RELU, *(function(f"F{i}", *twice(f"F{i - 1}")) for i in range(30, 0, -1))], ["x"], "at most 1,000,000 nodes"),
        (
            [
                function("F0", make_node("Constant", [], ["b"], value=MEGABYTE)),
                *(function(f"F{i}", *twice(f"F{i - 1}")) for i in range(1, 31)),
            ],
            ["x"],
            "of which 1 kB of constants counts as one",
        ),
        ([RELU], ["x", "x"], "cannot be inlined: .*Number of actual parameters cannot exceed"),
        (
            [function("F0", make_node("Relu", ["a"], ["b"]), opset=9)],
            ["x"],
            "the opsets of its model, got ai.onnx 9, mine 1 for 'mine.F0'",
        ),
    ],
    ids=["recursive", "doubled 30 times", "large constant", "too many inputs", "older opset"],
)
def test_functions_that_cannot_be_written_out_are_refused(tmp_path, functions, given, message):
    last = "F30" if len(functions) > 1 else "F0"
    (tmp_path / "model.onnx").write_bytes(calling(last, given, functions).SerializeToString())
    with pytest.raises(ValueError, match=message):
        load_graph(tmp_path / "model.onnx")


def test_functions_that_are_called_by_the_other_name_of_their_domain_are_counted(tmp_path):
    functions = [RELU, *(function(f"F{i}", *twice(f"F{i - 1}")) for i in range(1, 31))]
    model = calling("F30", ["x"], functions)
    for one in model.functions:
        one.domain = "ai.onnx"
        for node in one.node:
            node.domain = ""
    model.graph.node[0].domain = ""
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="at most 1,000,000 nodes"):
        load_graph(tmp_path / "model.onnx")


def test_functions_are_written_out_at_each_call_and_those_without_a_call_are_not(tmp_path):
    functions = [function("F1", *twice("F0")), RELU, function("Unused", make_node("Relu", ["a"], ["b"]), opset=9)]
    (tmp_path / "model.onnx").write_bytes(calling("F1", ["x"], functions).SerializeToString())
    assert [node.op_type for node in load_graph(tmp_path / "model.onnx").graph.node] == ["Relu", "Relu"]


@pytest.mark.parametrize(
    ("node", "parameter"),
    [
        (make_node("Sum", ["x", ""], ["y"]), "data_0"),
        (make_node("Max", ["x", "x", ""], ["y"], domain="ai.onnx"), "data_0"),
        (make_node("Einsum", ["x", ""], ["y"], equation="bi,ij->bj"), "Inputs"),
        (make_node("MatMul", ["x", ""], ["y"]), "B"),
    ],
    ids=lambda found: found.op_type if isinstance(found, NodeProto) else "",
)
def test_operand_without_which_onnx_runtime_would_end_the_process_is_refused(tmp_path, node, parameter):
    (tmp_path / "model.onnx").write_bytes(graph_model(node, weights={}, shape=("n", 4)).SerializeToString())
    with pytest.raises(ValueError, match=f"{node.op_type} must have all its operands, .* as '{parameter}'"):
        load_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "node",
    [
        make_node("Clip", ["x", "", "x"], ["y"]),
        make_node("MatMulNBits", ["x", ""], ["y"], domain="com.microsoft"),  # whose parameters onnx does not know
        make_node("Later", ["x", ""], ["y"]),
    ],
    ids=lambda node: node.op_type,
)
def test_operand_that_may_be_left_out_is_not_missed(tmp_path, node):
    (tmp_path / "model.onnx").write_bytes(graph_model(node, weights={}, shape=("n", 4)).SerializeToString())
    assert load_graph(tmp_path / "model.onnx").graph.node[0] == node


def test_opset_beyond_any_number_asks_for_no_operand(tmp_path):
    model = graph_model(make_node("Clip", ["x", "", "x"], ["y"]), weights={}, shape=("n", 4))
    model.opset_import[0].version = 2**40
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert load_graph(tmp_path / "model.onnx") == model  # ONNX Runtime refuses it


def test_constant_that_a_call_hands_to_many_nodes_counts_at_each(tmp_path):
    given = onnx.AttributeProto(name="value", ref_attr_name="big", type=onnx.AttributeProto.TENSOR)
    nodes = [make_node("Constant", [], [f"c{index}"]) for index in range(2000)]
    for node in nodes:
        node.attribute.append(given)
    called = function("F0", *nodes, make_node("Relu", ["a"], ["b"]))
    called.attribute.append("big")
    model = calling("F0", ["x"], [called])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("big", MEGABYTE))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="of which 1 kB of constants counts as one"):
        load_graph(tmp_path / "model.onnx")


def test_file_that_is_larger_than_a_protobuf_message_is_not_read(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(linear_model(WEIGHT).SerializeToString())
    os.truncate(path, MOST_FILE_BYTES + 1)  # a hole, which takes no room
    with pytest.raises(ValueError, match=r"at most 2,147,483,648 bytes \(2 GiB\), got 2,147,483,649"):
        load_graph(path)


def test_external_data_that_is_larger_than_any_edge_device_is_refused(tmp_path):
    path = save_external(tmp_path, WEIGHT)
    os.truncate(tmp_path / "model.onnx.data", MOST_BYTES)
    with pytest.raises(ValueError, match=r"with its external data must have at most 17,179,869,184 bytes \(16 GiB\)"):
        load_graph(path)


@pytest.mark.parametrize("text", [b"y", b"Relu", b"graph"])
def test_names_that_are_no_text_are_refused(tmp_path, text):
    content = relu().SerializeToString()
    (tmp_path / "model.onnx").write_bytes(content.replace(text, b"\xb9" * len(text)))
    with pytest.raises(ValueError, match=r"must be text in UTF-8, got b'.xb9"):
        load_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x08\x0a", "no nodes"),
        (linear_model(WEIGHT).SerializeToString()[:-20], "no protobuf message|is not a protobuf message"),
        (None, "no regular file"),
    ],
    ids=["empty graph", "truncated", "pipe"],
)
def test_what_is_no_whole_model_is_refused(tmp_path, content, message):
    path = tmp_path / "model.onnx"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_graph(path)


def test_path_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a\udcff.onnx"
    path.write_bytes(relu().SerializeToString())
    with pytest.raises(ValueError, match="its path must be text in UTF-8"):
        load_graph(path)


def test_what_onnx_runtime_says_of_bytes_that_are_no_text_is_an_input_error_and_no_banner(tmp_path, capfd):
    node = make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=1, direction=b"\xff\xfe")
    weights = {"w": np.ones((1, 4, 4), np.float32), "r": np.ones((1, 4, 1), np.float32)}
    model = graph_model(node, weights=weights, shape=("s", 1, 4), rank=4)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        InputError, match=r"model\.onnx must be a model that ONNX Runtime can run: .*codec can't decode"
    ):
        open_session(tmp_path / "model.onnx", threads=1)
    assert capfd.readouterr() == ("", "")


def test_file_is_read_as_onnx_whatever_its_name_and_first_bytes_say(tmp_path):
    model = relu()
    model.producer_name = "ORTM"  # where ONNX Runtime looks for the mark of its own format
    (tmp_path / "model.ort").write_bytes(model.SerializeToString())
    assert load_graph(tmp_path / "model.ort").graph.node
    assert open_session(tmp_path / "model.ort", threads=1).get_inputs()[0].name == "x"
    (tmp_path / "other.ort").write_bytes(b"\x08\x00\x00\x00ORTM")
    with pytest.raises(InputError, match=r"other\.ort must be a model that ONNX Runtime can run"):
        open_session(tmp_path / "other.ort", threads=1)
