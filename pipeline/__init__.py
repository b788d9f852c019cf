"""Fine-tune GPT-2 on a pile of text, export it to ONNX, measure it, register it, serve it."""
