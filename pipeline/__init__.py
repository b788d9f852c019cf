"""Fine-tune GPT-2 on a pile of text, export it to ONNX, measure it, register it, serve it."""

import os

# Set before either is imported: usage is reported to their makers only if the user says so.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
