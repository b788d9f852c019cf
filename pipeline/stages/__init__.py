"""The stages of dvc.yaml: one module each, run as `python -m pipeline.stages.NAME`.

To add a stage: its module here, its section in `pipeline/params/` (and in `whole.py`) and in params.yaml, its entry in
dvc.yaml, a test in `tests/stages/`, and a row of the README's table. If it opens a run in MLflow, `tracking/records.py`
says what is recorded, and `tracking/restore.py` records it again. tests/test_dag.py finds what is missing.
"""
