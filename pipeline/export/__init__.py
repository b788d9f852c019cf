"""Making an engine of a checkpoint: the serving graph, quantization, and parity with PyTorch. Needs torch and onnx."""
