"""The stages of dvc.yaml: one module each, run as `python -m pipeline.stages.NAME`."""
