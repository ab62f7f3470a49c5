"""MLflow: runs, registered models, champions. The one room of the pipeline that knows it."""

import os

# mlflow reads these at import
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
