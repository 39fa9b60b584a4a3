"""Int8: what of a model becomes integers, with which ranges and codes, simulated in PyTorch and written for ONNX."""
