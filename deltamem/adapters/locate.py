"""Where an adapter is: a folder, the Hub, or an MLflow registry (the only module of the library that knows MLflow)."""

from __future__ import annotations

from pathlib import Path

import yaml

from deltamem.adapters import public_release
from deltamem.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from deltamem.errors import AdapterFormatError

FILES = [CONFIG_FILE, WEIGHTS_FILE, public_release.CONFIG_FILE, public_release.WEIGHTS_FILE, "README.md"]


def locate(path: str | Path, registry: str | None = None) -> Path:
    """The local folder behind a path, a Hub id or an MLflow ``models:/`` address.

    Args:
        registry: MLflow store to look ``models:/`` addresses up in; None: the one MLflow is set to.

    Raises:
        AdapterFormatError: it can't be found or fetched.
    """
    text = str(path)
    if text.startswith("models:/"):
        folder = _from_registry(text, registry)
    elif Path(path).is_dir():
        folder = Path(path)
    else:
        folder = _from_hub(text)
    nested = folder / "adapter"
    return nested if nested.is_dir() and not (folder / CONFIG_FILE).is_file() else folder


def registered_backbone(folder: Path) -> str | None:
    """The backbone's folder that the MLmodel file of a registered model names; None where there is no such file.

    Raises:
        AdapterFormatError: that folder is not here.
    """
    file = folder / "MLmodel"
    if not file.is_file():
        return None
    flavour = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("flavors", {}).get("python_function", {})
    backbone = (flavour.get("config") or {}).get("backbone")
    if backbone and not Path(backbone).is_dir():
        raise AdapterFormatError(
            f"the model was registered with its backbone in {backbone}, which is not here: make it there again "
            "(python -m pipelines.backbone), or name the folder that has it with --base"
        )
    return backbone


def _from_registry(uri: str, registry: str | None) -> Path:
    try:
        import mlflow
    except ImportError as error:
        raise AdapterFormatError(f"{uri}: a registry address needs the package mlflow") from error
    if registry is not None:
        mlflow.set_tracking_uri(registry)
    store = mlflow.get_registry_uri()
    file = store.removeprefix("sqlite:///").split("?")[0]
    if store.startswith("sqlite:///") and not Path(file).is_file():  # mlflow would make an empty one
        raise AdapterFormatError(
            f"{uri}: there is no MLflow store at {store}; name the one that has the model with MLFLOW_TRACKING_URI, "
            "e.g. sqlite:///results/mlflow.db"
        )
    if store.startswith(("http://", "https://")):
        _check_answers(uri, store)
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except (mlflow.exceptions.MlflowException, OSError) as error:
        if told := _files_gone(uri, Path(file)):
            raise AdapterFormatError(told) from error
        raise AdapterFormatError(
            f"{uri} was not found in the MLflow registry at {store} (MLFLOW_TRACKING_URI names another): {error}"
        ) from error


def _check_answers(uri: str, store: str) -> None:
    """Raises AdapterFormatError where no server answers, for which mlflow would try for minutes without a word."""
    import requests

    try:
        requests.head(store, timeout=10)
    except requests.exceptions.SSLError:
        pass  # it answers; which certificates are taken is for mlflow to say
    except requests.exceptions.RequestException as error:
        raise AdapterFormatError(
            f"{uri}: no MLflow server answers at {store}; start it, or name the store that has the model with "
            f"MLFLOW_TRACKING_URI ({type(error).__name__})"
        ) from error


def _files_gone(uri: str, store: Path) -> str | None:
    """What to say of a model that is registered, with files that aren't where they were then; else None."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
    from mlflow.utils.file_utils import local_file_uri_to_path

    try:
        source = ModelsArtifactRepository.get_underlying_uri(uri)
    except MlflowException:
        return None
    if not source.startswith(("file:", "/")) or (folder := Path(local_file_uri_to_path(source))).is_dir():
        return None
    told = f"{uri} is registered, but its files are no longer in {folder}"
    # whoever moves a store moves what lies beside it along
    ends = (store.parent.joinpath(*folder.parts[start:]) for start in range(1, len(folder.parts)))
    if moved := next((end for end in ends if end.is_dir()), None):
        return f"{told}: they are in {moved.resolve()} now. Name that folder, or move the results back"
    return f"{told}. Move them back, or register the adapter again (python -m pipelines.register)"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFormatError(
            f"{name!r} is neither a local folder nor an adapter that the Hub gave us ({type(error).__name__}: {error})"
        ) from error
