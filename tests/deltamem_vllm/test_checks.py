"""What can't be served is refused before anything is loaded, with the reason."""

import json
import shutil

import pytest

from deltamem.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def folders(tmp_path_factory, loaded_models):
    """A backbone and a tsw adapter."""
    from tests.deltamem_vllm.engines import make_models

    folder = tmp_path_factory.mktemp("pair")
    make_models(folder)
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


def changed(folders, place, **changes):
    """The adapter once more, with another configuration."""
    shutil.copytree(folders / "adapter", place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return str(place)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_ssw_is_refused_and_told_where_it_can_be_served(folders, tmp_path, beside):
    ssw = changed(folders, tmp_path / "ssw", strategy="ssw")
    named = {"tsw": str(folders / "adapter"), "ssw": ssw} if beside else ssw
    with pytest.raises(Exception, match="without --engine"):
        configure(folders, additional_config={"deltamem_adapter": named})


@pytest.mark.parametrize("key, value", [("rank", 4), ("layers", [0, 1])])
def test_adapters_that_cannot_lie_side_by_side_are_refused_with_what_differs(folders, tmp_path, key, value):
    named = {"one": str(folders / "adapter"), "other": changed(folders, tmp_path / "other", **{key: value})}
    with pytest.raises(Exception, match=f"the same {key}, but 'one' has .* and 'other' has"):
        configure(folders, additional_config={"deltamem_adapter": named})


def test_layers_named_one_by_one_are_the_same_as_all_of_them(folders, tmp_path):
    named = {"all": str(folders / "adapter"), "named": changed(folders, tmp_path / "named", layers=[0, 1, 2])}
    assert configure(folders, additional_config={"deltamem_adapter": named}) is not None


def test_a_backbone_without_a_class_is_refused_and_told_how_to_make_one(tmp_path):
    from deltamem_vllm.engine import engine_arguments

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", "architectures": ["OPTForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="class of two lines"):
        engine_arguments(str(tmp_path), "nowhere")
