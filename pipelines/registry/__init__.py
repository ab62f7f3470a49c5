"""MLflow: runs, registered models, champions. The one room of the pipeline that knows it."""

from pipelines import environment

environment.for_registry()
