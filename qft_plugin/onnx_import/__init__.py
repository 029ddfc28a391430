"""From an ONNX file to a torch module, proved against ONNX Runtime."""
