"""Simplification of int8 graphs: fewer nodes, the same outputs bit for bit."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from compressor.onnx_files.qdq import simplify_qdq

CONSTANTS = """
    float s = {0.5}, float t = {0.25}, uint8 zero = {0}, int8 signed = {0},
    uint8 z = {100}, float one = {1}, float low = {-50},
    float high = {77.5}, int64[8] around = {0,0,1,1,0,0,1,1}, int64[2] flat = {0,-1}, int64[1] first = {1},
    int64[1] last = {3}, float[4] double = {1,1,2,2}"""


@pytest.mark.parametrize(
    ("nodes", "simpler"),
    [
        pytest.param("r = Relu(x) q = Q(r, s, zero) y = DQ(q, s, zero)", "Q DQ", id="relu at the lowest code"),
        pytest.param("r = Relu(x) q = Q(r, s, z) y = DQ(q, s, z)", "Relu Q DQ", id="relu above the lowest code"),
        pytest.param("r = Clip(x, low, high) q = Q(r, s, z) y = DQ(q, s, z)", "Q DQ", id="clip at the end codes"),
        pytest.param("r = Clip(x, low, one) q = Q(r, s, z) y = DQ(q, s, z)", "Clip Q DQ", id="clip between them"),
        pytest.param("r = Clip(x, low) q = Q(r, s, z) y = DQ(q, s, z)", "Q DQ", id="clip without upper bound"),
        pytest.param(
            "m = ReduceMax <keepdims=0> (x) r = Clip(x, low, m) q = Q(r, s, z) y = DQ(q, s, z)",
            "ReduceMax Clip Q DQ",
            id="clip to a computed bound",
        ),
        pytest.param(
            "r = Relu(x) q = Q(r, s, zero) d = DQ(q, s, zero) y = Add(d, r)",
            "Relu Q DQ Add",
            id="relu with two readers",
        ),
        pytest.param("q = Q(x, s, z) d = DQ(q, s, z) p = Q(d, s, z) y = DQ(p, s, z)", "Q DQ", id="round trip"),
        pytest.param(
            "q = Q(x, s, z) d = DQ(q, s, z) p = Q(d, t, z) y = DQ(p, t, z)", "Q DQ Q DQ", id="change of scale"
        ),
        pytest.param(
            "q = Q(x, s, signed) d = DQ(q, s, signed) p = Q(d, s, zero) y = DQ(p, s, zero)",
            "Q DQ Q DQ",
            id="change from signed to unsigned",
        ),
        pytest.param(
            "q = Q(x, s, z) d = DQ(q, s, z) m = Reshape(d, flat) p = Q(m, s, z) y = DQ(p, s, z)",
            "Q Reshape DQ",
            id="reshape",
        ),
        pytest.param(
            "q = Q(x, s, z) d = DQ(q, s, z) m = Reshape(d, flat) p = Q(m, t, z) y = DQ(p, t, z)",
            "Q DQ Reshape Q DQ",
            id="reshape with a change of scale",
        ),
        pytest.param(
            "q = Q(x, s, z) d = DQ(q, s, z) m = MaxPool <kernel_shape=[2,2],pads=[1,1,1,1]> (d) p = Q(m, s, z) "
            "e = DQ(p, s, z) n = Slice(e, first, last, last) o = Q(n, s, z) y = DQ(o, s, z)",
            "Q MaxPool Slice DQ",
            id="two moves",
        ),
        pytest.param(
            "q = Q(x, s, z) d = DQ(q, s, z) m = Pad(d, around) p = Q(m, s, z) y = DQ(p, s, z)",
            "Q Pad DQ",
            id="zero pad",
        ),
        pytest.param(
            "q = Q(x, s, z) d = DQ(q, s, z) m = Pad(d, around, one) p = Q(m, s, z) y = DQ(p, s, z)",
            "Q DQ Pad Q DQ",
            id="pad with ones",
        ),
        pytest.param(
            'q = Q(x, s, z) d = DQ(q, s, z) m = Pad <mode="reflect"> (d, around) p = Q(m, s, z) y = DQ(p, s, z)',
            "Q Pad DQ",
            id="reflected pad",
        ),
        pytest.param(
            'q = Q(x, s, z) d = DQ(q, s, z) m = Resize <mode="linear"> (d, , double) p = Q(m, s, z) y = DQ(p, s, z)',
            "Q DQ Resize Q DQ",
            id="interpolation",
        ),
        pytest.param(
            "q = Q(x, s, z) d = DQ(q, s, z) o = Mul(x, x) r = Q(o, s, z) e = DQ(r, s, z) "
            "m = Concat <axis=1> (d, e) p = Q(m, s, z) y = DQ(p, s, z)",
            "Q Mul Q Concat DQ",
            id="concatenation with one scale",
        ),
        pytest.param(
            "q = Q(x, s, z) d = DQ(q, s, z) r = Q(x, t, z) e = DQ(r, t, z) "
            "m = Concat <axis=1> (d, e) p = Q(m, s, z) y = DQ(p, s, z)",
            "Q DQ Q DQ Concat Q DQ",
            id="concatenation with two scales",
        ),
        pytest.param(
            "q = Q(x, s, z) d = DQ(q, s, z) m = Concat <axis=1> (d, x) p = Q(m, s, z) y = DQ(p, s, z)",
            "Q DQ Concat Q DQ",
            id="concatenation with a float",
        ),
    ],
)
def test_simpler_graph_gives_the_same_outputs_bit_for_bit(nodes: str, simpler: str) -> None:
    body = nodes.replace(" Q(", " QuantizeLinear(").replace(" DQ(", " DequantizeLinear(")
    header = '<ir_version: 10, opset_import: ["": 20]> graph (float[N,2,4,4] x) => (float y)'
    model = parser.parse_model(f"{header} <{CONSTANTS}> {{ {body} }}")

    simplified = simplify_qdq(model)

    onnx.checker.check_model(simplified)
    short = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}
    assert " ".join(short.get(node.op_type, node.op_type) for node in simplified.graph.node) == simpler
    images = np.random.default_rng(0).normal(0, 40, (3, 2, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(run_as_written(simplified, images), run_as_written(model, images))


def test_float_graph_stays_as_it_is() -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> graph (float[N] x) => (float[N] y) { r = Relu(x) y = Neg(r) }'
    )
    assert simplify_qdq(model) == model


def run_as_written(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Outputs under ONNX Runtime without its own simplifications."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": images})[0]
