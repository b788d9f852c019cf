"""Make anew what the tracking store no longer holds: the run that `run.json` names, scores, the registered version."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.tracking import registry, runs, store
from pipeline.training.curves import read_curve


def parent_run(client: MlflowClient, finetune: Path, parameters: Mapping[str, Any]) -> str:
    """Id of the run that `finetune` opened; where the store does not hold it, of one made anew from its outputs.

    The new run has the parameters, lineage, metrics and loss curves of the old one, but not its samples, and a tag
    that names it, by which later calls find it.
    """
    run_id = read_json(finetune / "run.json")["run_id"]
    found = runs.find_run(client, run_id)
    if found is not None:
        return found
    print(f"the tracking store does not hold run {run_id}; making it anew from {finetune}", file=sys.stderr)
    with runs.start_run("finetune", parameters, tags={runs.RESTORES_TAG: run_id}) as run:
        for name in ("train", "validation"):
            for step, loss in read_curve(finetune / f"loss_{name}.csv"):
                run.log_metrics({f"{name}_loss": loss}, step)
        run.log_scores("final", read_json(finetune / "metrics.json"))
    return run.run_id


def missing_stages(client: MlflowClient, out: Path) -> list[str]:
    """The stages whose outputs name something that the store does not hold."""
    run_id = runs.find_run(client, read_json(out / "finetune" / "run.json")["run_id"])
    missing = [
        stage for stage in ("tune", "evaluate") if run_id is None or runs.find_child(client, run_id, stage) is None
    ]
    if "evaluate" in missing:
        return [*missing, "register"]
    version = read_json(out / "register" / "version.json")
    found = registry.find_version(client, version["name"], version["fingerprint"])
    is_there = found is not None and int(found.version) == version["version"]
    return missing if is_there else [*missing, "register"]


def restore(out: Path) -> None:
    """Run the stages again whose runs or version are missing in the store; does nothing where all is there.

    Raises `UserError` where a stage fails.
    """
    for stage in missing_stages(store.connect(), out):
        print(f"the tracking store does not hold what {stage} wrote; running it again", file=sys.stderr)
        if subprocess.run(["dvc", "repro", "--force", "--single-item", stage], check=False).returncode:
            raise UserError(f"{stage} failed; see above, and call restore again")
