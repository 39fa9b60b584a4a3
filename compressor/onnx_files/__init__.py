"""ONNX files as data: read, checked, counted, made smaller and opened. Knows no torch."""
