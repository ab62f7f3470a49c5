"""Engines with tiny random backbones, in this process; all of this folder is skipped where vLLM isn't installed."""

import gc
import os

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session", autouse=True)
def vllm_is_installed():
    pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")


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
