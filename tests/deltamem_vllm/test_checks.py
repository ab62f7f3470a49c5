"""What can't be served is refused before anything is loaded, with the reason."""

import json

import pytest

from deltamem.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def folders(tmp_path_factory, loaded_models):
    """A backbone and a tsw adapter."""
    from tests.deltamem_vllm.engines import make_pair

    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder)
    return folder


def configure(folders, **changes):
    from vllm.engine.arg_utils import EngineArgs

    from deltamem_vllm.engine import engine_arguments

    arguments = engine_arguments(str(folders / "base"), str(folders / "adapter"))
    arguments |= {"skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32", **changes}
    return EngineArgs(**arguments).create_engine_config()


def test_an_engine_that_can_be_served_is_not_refused_and_feeds_no_token_in_advance(folders):
    assert configure(folders).scheduler_config.async_scheduling is False


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"enable_lora": True}, "LoRA"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "takes tokens back"),
        ({"kv_transfer_config": None}, "add --kv-transfer-config"),
        ({"additional_config": {}}, "name the adapter"),
        ({"tensor_parallel_size": 2}, "one device"),
    ],
    ids=["lora", "speculative", "no connector", "no adapter", "two devices"],
)
def test_what_a_memory_cannot_follow_is_refused(folders, changes, reason):
    with pytest.raises(Exception, match=reason):
        configure(folders, **changes)


def test_ssw_is_refused_and_told_where_it_can_be_served(folders, tmp_path):
    config = json.loads((folders / "adapter/adapter_config.json").read_text())
    (tmp_path / "ssw").mkdir()
    (tmp_path / "ssw/adapter_config.json").write_text(json.dumps({**config, "strategy": "ssw"}))
    weights = (folders / "adapter/adapter_model.safetensors").read_bytes()
    (tmp_path / "ssw/adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(Exception, match="without --engine"):
        configure(folders, additional_config={"deltamem_adapter": str(tmp_path / "ssw")})


def test_a_backbone_without_a_class_is_refused_and_told_how_to_make_one(tmp_path):
    from deltamem_vllm.engine import engine_arguments

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", "architectures": ["OPTForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="class of two lines"):
        engine_arguments(str(tmp_path), "nowhere")
