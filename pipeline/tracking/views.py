"""How MLflow shows the experiment: as one of models in training, with a saved view of the runs that compares them."""

import json
import time

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from pipeline.tracking.pages import RUNS_VIEW
from pipeline.tracking.tags import SAMPLES, STAGE_TAG

KIND_TAG = "mlflow.experimentKind"
KIND = "custom_model_development"
"""MLflow's name for experiments whose page opens with the runs."""
VIEW_TAG = f"mlflow.sharedViewState.{RUNS_VIEW}"
NOTE = "**Views > Fine-tunings** compares the runs; **GenAI > Evaluation runs** compares their samples."
COLUMNS = {
    "metrics": (
        "final/validation_loss",
        "test_bits_per_byte",
        "test_perplexity",
        "test_excess",
        "test_distance",
        "invented_words",
        "longest_copy_tokens",
        "engine_megabytes",
    ),
    "params": ("base.source", "finetune.epochs", "finetune.learning_rate", "finetune.batch_tokens"),
}
"""The columns of the saved view besides name and time."""
FILTER = f"tags.`{STAGE_TAG}` != '{SAMPLES}'"
WIDTHS = {"attributes.`Run Name`": 320}
"""The widths of columns in pixels."""


def set_views(client: MlflowClient, experiment_id: str) -> None:
    """Tag an experiment so that MLflow's pages open where the runs are and offer the view of them.

    What somebody has set stays.
    """
    now_ms = int(time.time() * 1000)
    columns = [f"{group}.`{name}`" for group, names in COLUMNS.items() for name in names]
    order = {"columnOrder": [*WIDTHS, *columns], "columnWidths": WIDTHS}
    # The format in which MLflow's page saves a view, of MLflow 3.17; others show no such view.
    state = json.dumps({"searchFilter": FILTER, "selectedColumns": columns, **order})
    view = {"name": "Fine-tunings", "createdAt": now_ms, "updatedAt": now_ms, "state": state}
    known = client.get_experiment(experiment_id).tags
    for name, value in ((MLFLOW_RUN_NOTE, NOTE), (VIEW_TAG, json.dumps(view)), (KIND_TAG, KIND)):
        if name not in known:
            client.set_experiment_tag(experiment_id, name, value)
