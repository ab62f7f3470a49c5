"""Engines with tiny random backbones, in this process; this folder is left out where vLLM isn't installed."""

import gc
import os
from importlib.util import find_spec

import pytest

# vLLM has an environment of its own (make test-vllm), and these modules import it.
collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session")
def loaded_models():
    from deltamem_vllm.plugin import register_classes

    register_classes()


@pytest.fixture(scope="module")
def start_engine(tmp_path_factory, loaded_models):
    """Starts engines; all end with the module, and before the next one starts."""
    from tests.deltamem_vllm.engines import TinyEngine

    running = []

    def end():
        from vllm.distributed import cleanup_dist_env_and_memory

        while running:
            running.pop().close()
            gc.collect()
            cleanup_dist_env_and_memory()

    def start(**settings):
        end()
        running.append(TinyEngine(tmp_path_factory.mktemp("engine"), **settings))
        return running[0]

    yield start
    end()
