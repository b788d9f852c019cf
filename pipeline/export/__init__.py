"""Make an engine from a checkpoint: the serving graph, quantization, and parity with PyTorch. Needs torch and onnx."""
