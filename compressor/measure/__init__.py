"""What a model is and how fast it runs, measured on its ONNX file under ONNX Runtime."""
