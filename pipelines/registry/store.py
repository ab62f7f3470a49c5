"""The MLflow store: opening it safely, and saying plainly when that can't be done."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from sqlalchemy.exc import SQLAlchemyError

from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.run.layout import Layout

LOCK_SECONDS = 600


@contextlib.contextmanager
def open_store(config: Config) -> Generator[MlflowClient]:
    """A client of the store that the configuration names, held by one registering job at a time.

    Jobs take turns because several that create the same database at once all fail, and because an alias is
    chosen by comparing with what other jobs have registered. Raises StageError, naming the store, when it is
    locked, unreachable or refuses.
    """
    layout = Layout(config)
    uri, results = layout.store, layout.results
    results.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(results / "mlflow.lock", timeout=LOCK_SECONDS):
            client = MlflowClient(uri, uri)
            client.search_experiments(max_results=1)
            yield client
    except Timeout:
        raise StageError(
            f"MLflow store {uri}: another job has held {results / 'mlflow.lock'} for {LOCK_SECONDS} s. "
            "End it or wait for it, and run this again."
        ) from None
    except (MlflowException, SQLAlchemyError) as error:
        raise StageError(f"MLflow store {uri} can't be used: {_reason(error)}") from error


@contextlib.contextmanager
def made_meanwhile() -> Generator[None]:
    """Lets it pass that what is made inside is there already: runs with other results may share a server."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def point_alias(client: MlflowClient, name: str, alias: str, version: str) -> None:
    """Points an alias of a registered model at a version, whoever else gives the model its first one just now.

    MLflow looks whether a model has the alias before it inserts or moves it: of two that found none, the later
    is refused. What it then finds, it moves.
    """
    try:
        client.set_registered_model_alias(name, alias, version)
    except MlflowException:
        if alias not in client.get_registered_model(name).aliases:
            raise
        client.set_registered_model_alias(name, alias, version)


def experiment_id(client: MlflowClient, config: Config) -> str:
    """The configuration's experiment; a new one in a local database keeps its artefacts beside it."""
    name = config.registry.experiment or config.name
    found = client.get_experiment_by_name(name)
    if found is None:
        beside = (Layout(config).results / "mlflow_artifacts" / name).resolve()
        local = Layout(config).store.startswith("sqlite:")
        with made_meanwhile():
            return client.create_experiment(name, artifact_location=beside.as_uri() if local else None)
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise StageError(
            f"MLflow store {Layout(config).store}: experiment {name!r} was deleted. Restore it "
            "(mlflow experiments restore) or name another one under register.experiment."
        )
    return found.experiment_id


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "database is locked" in text:
        return "the database is locked by another program. End that program, or set register.tracking_uri."
    if "error code 401" in text:
        return (
            "the server doesn't let you in: you are not authenticated. Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD to a user's that it knows."
        )
    if len(text) > 300:
        text = text[:300] + "…"
    return f"{text} Check register.tracking_uri and that the store is up and writable."
