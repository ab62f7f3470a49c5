"""MLflow: runs, registered models, champions."""
