#!/usr/bin/env bash
# onnxruntime 1.31.1: a Conv or Gemm with float weights between DequantizeLinear and QuantizeLinear is not run in float.
#
# Guess: a mixed file runs as it is written, float weights in float; an optimizer may fuse, but not round. Seen: from the
# basic level on, the weight becomes int8 with one scale for the whole tensor. Where one output channel is a hundred
# times as large as the others, those others come out with an error of a fifth of their size. A product with 1
# in between is taken away first; a clip to what the codes reach anyway stays, and the outputs are right at every level.
# Source: onnxruntime/core/optimizer/qdq_transformer/weight_bias_quantization.cc.
# Whoever keeps a sensitive layer in float, to save the accuracy of an int8 model, loses it without a word.
#
# Output seen, error of the quiet channels relative to their size:
#   as written, no optimization: 0.0000; basic level: 0.2240; times one: 0.2240; clipped to what the codes reach: 0.0000
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1
cat > "$place/rounds.py" <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

generator = np.random.default_rng(0)
weight = generator.standard_normal((8, 8)).astype(np.float32)
weight[0] *= 100
codes = generator.integers(0, 256, (64, 8)).astype(np.uint8)


def model(between):
    """Codes times a scale, an operator if one is given, a Gemm in float, and codes again as numbers."""
    scale = np.float32(0.02)
    constants = {
        "scale": scale, "zero": np.uint8(128), "weight": weight,
        "out_scale": np.float32(0.05), "middle": np.uint8(128),
    }
    nodes = [helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["x"])]
    inputs = {"Mul": [np.float32(1)], "Clip": [scale * np.float32(-128), scale * np.float32(127)]}.get(between, [])
    constants |= {f"{between}_{place}": value for place, value in enumerate(inputs)}
    if between:
        names = [f"{between}_{place}" for place in range(len(inputs))]
        nodes.append(helper.make_node(between, ["x", *names], ["shielded"]))
    nodes += [
        helper.make_node("Gemm", ["shielded" if between else "x", "weight"], ["y"], transB=1),
        helper.make_node("QuantizeLinear", ["y", "out_scale", "middle"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "out_scale", "middle"], ["z"]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("codes", onnx.TensorProto.UINT8, ["n", 8])],
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n", 8])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def error(between, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        model(between).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"codes": codes})
    exact = (codes.astype(np.float32) - 128) * np.float32(0.02) @ weight.T
    wanted = np.clip(np.rint(exact / np.float32(0.05)) + 128, 0, 255) * 0.05 - 128 * 0.05
    quiet = slice(1, None)
    return float(np.abs(found[:, quiet] - wanted[:, quiet]).mean() / np.abs(wanted[:, quiet]).mean())


Level = onnxruntime.GraphOptimizationLevel
cases = {
    "as written, no optimization": (None, Level.ORT_DISABLE_ALL),
    "basic level": (None, Level.ORT_ENABLE_BASIC),
    "times one": ("Mul", Level.ORT_ENABLE_ALL),
    "clipped to what the codes reach": ("Clip", Level.ORT_ENABLE_ALL),
}
found = {name: error(*case) for name, case in cases.items()}
print("; ".join(f"{name}: {value:.4f}" for name, value in found.items()))
assert found["as written, no optimization"] < 1e-3
assert found["clipped to what the codes reach"] < 1e-3
assert found["basic level"] > 0.05, "onnxruntime now leaves float weights alone: this finding is out of date"
assert found["times one"] > 0.05, "a product with one is kept now: this finding is out of date"
PY
"$place/venv/bin/python" "$place/rounds.py"
