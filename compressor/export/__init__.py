"""A module as an ONNX file that gives the same outputs under ONNX Runtime."""
