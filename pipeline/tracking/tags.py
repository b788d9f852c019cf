"""The names of tags that several modules read: of runs, and of versions in the registry."""

STAGE_TAG = "pipeline.stage"
SAMPLES = "samples"
"""The value of `STAGE_TAG` of runs with samples, which no stage opens."""
FINGERPRINT_TAG = "pipeline.fingerprint"
"""Of a run, the name of all that its outputs depend on: data, parameters, code, libraries. Of a version, that of its
files."""
RESTORED_TAG = "pipeline.restored"
"""The tag of a run that was recorded again from files: its commit is not that of what it records."""
COMMIT_TAG = "git.commit"
DIRTY_TAG = "git.dirty"
EXPERIMENT_TAG = "dvc.experiment"
DATA_TAG = "dvc.data_md5"
