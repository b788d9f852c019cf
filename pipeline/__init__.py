"""Fine-tune GPT-2 on a pile of text, export it to ONNX, measure it, register it, serve it."""

import os

# Before either is imported: what they would report to their makers is nobody's business unless the user says so.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
