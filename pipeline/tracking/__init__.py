"""MLflow: the store, runs, lineage, the model registry. The only folder that uses MLflow's tracking API."""
