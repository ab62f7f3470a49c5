import json
import resource
import shutil
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from deltamem.backbone.facts import computed_dtype
from pipelines.backbone import app, prepare_backbone
from pipelines.backbones.prepared import load_backbone
from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.backbones.record import backbone_digest
from pipelines.config import load_config
from pipelines.config.backbones import Backbone
from pipelines.errors import StageError
from pipelines.run.layout import Layout
from tests.paths import PROJECT

CONFIGS = PROJECT / "configs" / "backbones"


def spec(**fields):
    return TypeAdapter(Backbone).validate_python(fields)


def named(name: str, **changes):
    return spec(**{**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), **changes})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A prepared tiny-random backbone; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny-random"
    prepare_backbone("tiny-random", named("tiny-random"), folder)
    return folder


@pytest.fixture
def tiny_copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "tiny-random"))


def read_prompt(tokenizer, question: str):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def model_files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_backbone_configuration_is_valid(path):
    named(path.stem)


def test_the_seed_alone_decides_the_weights(tiny, tmp_path):
    torch.manual_seed(123)
    again = prepare_backbone("again", named("tiny-random"), tmp_path / "again")
    other = prepare_backbone("other", named("tiny-random", seed=1), tmp_path / "other")
    assert again["digest"] == backbone_digest(tiny)
    assert other["digest"] != backbone_digest(tiny)


def test_the_record_says_what_was_made(tiny):
    record = json.loads((tiny / "backbone.json").read_text())
    assert record["name"] == "tiny-random"
    assert record["source"] == named("tiny-random").model_dump(mode="json")
    assert record["revision"] == "seed 0"
    assert len(record["digest"]) == 64
    assert len(record["provenance"]["config_hash"]) == 64


def test_a_loaded_backbone_answers_a_chat(tiny):
    model, tokenizer = load_backbone(tiny)
    inputs = read_prompt(tokenizer, "Hé?")
    prompt = "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(inputs["input_ids"][0]) == prompt
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[-1] == len(tokenizer) and logits.isfinite().all()
    assert not model.training and model.dtype == torch.float32


def test_dtype_and_attention_can_be_chosen_at_loading(tiny):
    model, _ = load_backbone(tiny, dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="FlashAttention may run here")
def test_flash_attention_falls_back_to_sdpa(tiny):
    model, _ = load_backbone(tiny, attn_implementation="flash_attention_2")
    assert model.config._attn_implementation == "sdpa"


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_byte_tokenizer_has_one_token_per_byte(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"model_type": "lama"}, "lama"),
        ({"hidden_size": 64}, "model_type"),
        ({"model_type": "t5"}, "'t5' is not a causal language model"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "vocab_size": 100}, "vocab_size is 100, but the tokenizer has 259"),
    ],
    ids=["unknown-type", "no-type", "encoder-decoder", "wrong-value", "small-vocabulary"],
)
def test_an_impossible_architecture_is_named(architecture, message, tmp_path):
    with pytest.raises(StageError, match=message):
        prepare_backbone("x", spec(source="random", architecture=architecture), tmp_path / "x")
    assert not list(tmp_path.iterdir())


# Complete, damaged and half-written folders


def test_a_complete_folder_is_left_as_it_is(tiny_copy):
    before = model_files(tiny_copy)
    prepare_backbone("tiny-random", named("tiny-random"), tiny_copy)
    assert model_files(tiny_copy) == before


@pytest.mark.parametrize("damage", ["weights", "config.json", "backbone.json"])
def test_a_damaged_folder_is_made_anew(tiny_copy, tiny, damage):
    path = tiny_copy / ("model.safetensors" if damage == "weights" else damage)
    path.write_bytes(path.read_bytes()[:-100])
    record = prepare_backbone("tiny-random", named("tiny-random"), tiny_copy)
    assert record["digest"] == backbone_digest(tiny)
    load_backbone(tiny_copy)


def test_a_changed_configuration_makes_it_anew(tiny_copy):
    record = prepare_backbone("tiny-random", named("tiny-random", dtype="bfloat16"), tiny_copy)
    assert record["source"]["dtype"] == "bfloat16"
    assert load_backbone(tiny_copy)[0].dtype == computed_dtype(torch.bfloat16, "cpu")


def test_what_an_interrupted_run_left_is_replaced(tmp_path, tiny):
    partial = tmp_path / "tiny-random.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    record = prepare_backbone("tiny-random", named("tiny-random"), tmp_path / "tiny-random")
    assert record["digest"] == backbone_digest(tiny)
    assert not partial.exists()


def test_no_room_for_the_weights(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StageError, match="No room to write in"):
            prepare_backbone("tiny-random", named("tiny-random"), tmp_path / "tiny-random")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["backbone.json", "model.safetensors", "config.json"])
def test_loading_an_incomplete_folder_says_how_to_mend_it(tiny_copy, name):
    (tiny_copy / name).unlink()
    with pytest.raises(StageError, match="not a complete backbone folder.*pipelines.backbone"):
        load_backbone(tiny_copy)


def test_loading_truncated_weights_says_how_to_mend_it(tiny_copy):
    path = tiny_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StageError, match="not a complete backbone folder"):
        load_backbone(tiny_copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_where_there_is_none(tiny):
    with pytest.raises(StageError, match="no CUDA device.*use_gpu: false"):
        load_backbone(tiny, device="cuda")


def test_a_device_of_no_kind_is_named(tiny):
    with pytest.raises(StageError, match="no device gpu; it may be cpu, cuda"):
        load_backbone(tiny, device="gpu")


def test_a_backbone_larger_than_the_memory(tiny_copy):
    numbers = psutil.virtual_memory().total  # at four bytes each
    tensor = {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}
    header = json.dumps({"w": tensor}).encode()
    with (tiny_copy / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * numbers)  # sparse: takes no room
    with pytest.raises(StageError, match="doesn't fit on cpu: its weights take"):
        load_backbone(tiny_copy)


def test_a_local_folder_keeps_its_weights(tiny, tmp_path):
    prepare_backbone("local", spec(source="local", path=str(tiny), dtype="float32"), tmp_path / "local")
    assert backbone_digest(tmp_path / "local") == backbone_digest(tiny)
    weights = [load_backbone(folder)[0].state_dict() for folder in (tiny, tmp_path / "local")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_local_folder_that_is_not_there(tmp_path):
    with pytest.raises(StageError, match="nowhere does not exist"):
        prepare_backbone("local", spec(source="local", path=str(tmp_path / "nowhere")), tmp_path / "local")


def test_pickled_weights_are_not_taken(tiny_copy, tmp_path):
    (tiny_copy / "model.safetensors").unlink()
    torch.save({}, tiny_copy / "pytorch_model.bin")
    with pytest.raises(StageError, match="no safetensors weights"):
        prepare_backbone("local", spec(source="local", path=str(tiny_copy)), tmp_path / "local")


@pytest.mark.parametrize(
    "model",
    [
        T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1)),
        BertForMaskedLM(
            BertConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        ),
    ],
    ids=["t5", "bert"],
)
def test_a_model_that_is_not_a_causal_lm(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(StageError, match=f"{type(model).__name__}, not a causal language model"):
        prepare_backbone("local", spec(source="local", path=str(tmp_path / "source")), tmp_path / "local")


def test_code_inside_a_model_folder_is_not_run(tiny_copy, tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tiny_copy / "config.json").write_text(json.dumps(config))
    (tiny_copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(StageError, match="no configuration that transformers can read"):
        prepare_backbone("local", spec(source="local", path=str(tiny_copy)), tmp_path / "local")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_chat_template(tiny_copy, tmp_path):
    (tiny_copy / "chat_template.jinja").unlink()
    with pytest.raises(StageError, match="no chat template"):
        prepare_backbone("local", spec(source="local", path=str(tiny_copy)), tmp_path / "local")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_model_in_the_hub_cache_needs_no_network(hub_cache, tiny, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--someone--tiny"
    shutil.copytree(tiny, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("backbone.json"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    record = prepare_backbone("hub", spec(source="hub", id="someone/tiny", dtype="float32"), tmp_path / "hub")
    assert record["revision"] == commit
    assert record["digest"] == backbone_digest(tiny)
    shutil.rmtree(hub_cache)
    load_backbone(tmp_path / "hub")


def test_a_hub_that_cannot_be_reached(hub_cache, tmp_path):
    with pytest.raises(StageError, match="can't be reached, and someone/absent is not in its local cache"):
        prepare_backbone("hub", spec(source="hub", id="someone/absent"), tmp_path / "hub")


def test_an_id_that_cannot_be_on_the_hub(hub_cache, tmp_path):
    with pytest.raises(StageError, match="no model 'a/b/c/d' on the Hugging Face Hub"):
        prepare_backbone("hub", spec(source="hub", id="a/b/c/d"), tmp_path / "hub")


def test_the_command_prepares_a_backbone_of_a_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    quickstart = yaml.safe_load((CONFIGS.parent / "quickstart.yaml").read_text())
    path.write_text(
        yaml.safe_dump({**quickstart, "backbones": ["tiny-random"], "results_dir": str(tmp_path / "results")})
    )
    result = CliRunner().invoke(app, ["--config", str(path), "--backbone", "tiny-random"])
    assert result.exit_code == 0, result.output
    assert backbone_digest(Layout(load_config(path)).backbone("tiny-random"))[:12] in result.output
