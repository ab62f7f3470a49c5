"""What holds for every test: nothing of the user's, no haste, no GPU tests without a GPU."""

import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

from tests.isolation import isolate

HOME = tempfile.TemporaryDirectory(prefix="deltamem-tests-")

hypothesis.settings.register_profile("deltamem", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])


def pytest_configure(config):
    # before the test modules: the libraries read the environment as they are imported
    isolate(os.environ, Path(HOME.name))
    hypothesis.settings.load_profile("deltamem")


def pytest_unconfigure(config):
    HOME.cleanup()


@pytest.fixture(scope="session", autouse=True)
def away_from_the_checkout(tmp_path_factory):
    """Relative paths lead to an empty folder, not to results, data and stores that lie in the checkout."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("working_directory"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def mlflow_is_set_to_nothing():
    """What one test tells MLflow, which keeps it for the process, isn't told to the next."""
    yield
    if "mlflow" in sys.modules:
        import mlflow

        mlflow.set_tracking_uri(None)


@pytest.fixture
def tiny_model():
    from tests.tiny_models import make_tiny_model

    return make_tiny_model


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
