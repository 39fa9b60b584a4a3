"""Compress PyTorch models: distillation, pruning, int8 quantization, ONNX export, honest measurement."""
