"""Adapter folders of both formats: round trips, and every way in which they can be wrong."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamem import DeltaMemConfig, DeltaMemModel, get_delta_mem_model
from deltamem.adapters import files as adapter_files
from deltamem.adapters import public_release
from deltamem.adapters.tensors import collect_tensors
from deltamem.errors import AdapterFormatError

IDS = torch.tensor([[5, 9, 20, 33, 7, 8]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1]])


def trained(tiny_model, **config):
    model = get_delta_mem_model(tiny_model("qwen3"), DeltaMemConfig(**config)).eval()
    for layer in model.memory_layers.values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, memory=model.write(IDS, segment_ids=SEGMENTS), segment_ids=SEGMENTS).logits


@pytest.fixture(params=["ours", "public"])
def folder(request, tiny_model, tmp_path):
    model = trained(tiny_model)
    write_folder(model, tmp_path, request.param)
    return tmp_path


def write_folder(model, path, kind):
    if kind == "ours":
        model.save_pretrained(path)
    else:
        tensors = collect_tensors(model.memory_layers.state_dict(), model.config)
        public_release.write(path, model.config, tensors)


@pytest.mark.parametrize("kind", ["ours", "public"])
@pytest.mark.parametrize(
    "config",
    [{"strategy": "tsw"}, {"strategy": "ssw", "segmentation": "release"}, {"strategy": "msw"},
     {"strategy": "ssw", "segment": "sentence", "segmentation": "release"},
     {"steer": ("q", "k", "v", "o"), "rank": 4, "alpha": 8.0, "layers": (0, 2)}],
    ids=["tsw", "ssw", "msw", "ssw-sentence", "qkvo-layers"],
)  # fmt: skip
def test_round_trip_is_bit_exact(tiny_model, tmp_path, kind, config):
    model = trained(tiny_model, **config)
    write_folder(model, tmp_path, kind)
    loaded = DeltaMemModel.from_pretrained(tiny_model("qwen3"), tmp_path, is_trainable=True)
    assert loaded.config.to_dict() == {
        **model.config.to_dict(), "base_model_name_or_path": loaded.config.base_model_name_or_path
    }  # fmt: skip
    assert torch.equal(logits(model), logits(loaded))
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("segment", ["message", "sentence"])
def test_segments_of_this_projects_rule_stay_so_here_and_are_warned_of_in_the_public_format(
    tiny_model, tmp_path, segment
):
    model = trained(tiny_model, strategy="ssw", segment=segment)
    write_folder(model, tmp_path / "ours", "ours")
    assert adapter_files.load_adapter(tmp_path / "ours")[0].segment_rule == segment
    with pytest.warns(UserWarning, match="write somewhat else"):
        write_folder(model, tmp_path / "public", "public")
    assert adapter_files.load_adapter(tmp_path / "public")[0].segment_rule == f"release_{segment}"


def test_limits_of_norms_stay_here_and_are_warned_of_in_the_public_format(tiny_model, tmp_path):
    model = trained(tiny_model, strategy="msw", limit_norms=True)
    with pytest.warns(UserWarning, match="limits how large its states grow"):
        write_folder(model, tmp_path / "public", "public")
    config, tensors = adapter_files.load_adapter(tmp_path / "public")
    assert not config.limit_norms and not [name for name in tensors if name.endswith("norm_limit")]
    assert torch.equal(logits(model), logits(DeltaMemModel.from_pretrained(tiny_model("qwen3"), tmp_path / "public")))


def test_an_adapter_from_before_there_were_two_rules_keeps_this_projects(tiny_model, tmp_path):
    write_folder(trained(tiny_model, strategy="ssw"), tmp_path, "ours")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "segmentation"}))
    assert adapter_files.load_adapter(tmp_path)[0].segment_rule == "message"


def test_the_folder_holds_the_adapter_and_nothing_of_the_backbone(tiny_model, tmp_path):
    model = trained(tiny_model)
    model.save_pretrained(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert tensors["model.layers.2.self_attn.delta_o_proj"].shape == (32, 8)


def test_an_adapter_loaded_for_use_takes_the_backbones_dtype_and_is_frozen(tiny_model, tmp_path):
    trained(tiny_model).save_pretrained(tmp_path)
    loaded = DeltaMemModel.from_pretrained(tiny_model("qwen3").bfloat16(), tmp_path)
    assert loaded.memory_layers["0"].in_proj.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.write(IDS).states[0].dtype == torch.float32


def test_unsteered_heads_of_the_public_format_are_dropped_if_zero(tiny_model, tmp_path):
    model = trained(tiny_model)
    tensors = collect_tensors(model.memory_layers.state_dict(), model.config)
    extra = {f"model.layers.{i}.self_attn.delta_k_proj": torch.zeros(16, 8) for i in range(3)}
    public_release.write(tmp_path, model.config, {**tensors, **extra})
    assert torch.equal(logits(DeltaMemModel.from_pretrained(tiny_model("qwen3"), tmp_path)), logits(model))
    extra["model.layers.1.self_attn.delta_k_proj"] += 1
    public_release.write(tmp_path, model.config, {**tensors, **extra})
    with pytest.raises(AdapterFormatError, match="layers.1.self_attn.delta_k_proj is not zero"):
        adapter_files.load_adapter(tmp_path)


def edit_tensors(folder, change):
    ours = folder / adapter_files.WEIGHTS_FILE
    if ours.exists():
        tensors = load_file(ours)
        change(tensors)
        save_file(tensors, ours)
    else:
        path = folder / public_release.WEIGHTS_FILE
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)


NAME = "model.layers.1.self_attn.beta_proj"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop(NAME), f"tensor {NAME} is missing"),
        (lambda t: t.update({NAME: torch.zeros(8, 31)}), r"has shape \(8, 31\).*need \(8, 32\)"),
        (lambda t: t.update({"model.layers.7.x": torch.zeros(2)}), "to no layer of this adapter: model.layers.7"),
    ],
    ids=["missing", "shape", "extra"],
)
def test_tensors_that_do_not_fit_are_named(tiny_model, folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(AdapterFormatError, match=message):
        DeltaMemModel.from_pretrained(tiny_model("qwen3"), folder)


def test_another_backbone_is_refused(tiny_model, folder):
    with pytest.raises(AdapterFormatError, match="is this the backbone that the adapter was made for"):
        DeltaMemModel.from_pretrained(tiny_model("qwen3", hidden_size=64), folder)


class Payload:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(trained(tiny_model), tmp_path, "public")
    for write in (lambda f: torch.save({"x": Payload()}, f), lambda f: f.write_bytes(pickle.dumps(Payload()))):
        write(tmp_path / public_release.WEIGHTS_FILE)
        with pytest.raises(AdapterFormatError, match="holds more than tensors and was not loaded"):
            adapter_files.load_adapter(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "option,value",
    [("state_update_mode", "no_lambda"), ("normalize_qk", False), ("couple_lambda", False), ("rankwise_gates", False),
     ("memory_write_granularity", "paragraph"), ("num_memory_partitions", 2), ("latent_memory_layers", [3]),
     ("delta_scale_parameterization", "sqrt_rank"), ("delta_o_rmsnorm", True), ("synthetic_memory_slots", 4)],
)  # fmt: skip
def test_an_unsupported_public_option_is_named(tiny_model, tmp_path, option, value):
    write_folder(trained(tiny_model), tmp_path, "public")
    path = tmp_path / public_release.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(AdapterFormatError, match=option):
        adapter_files.load_adapter(tmp_path)


def test_inactive_options_are_ignored_and_unknown_ones_warned_of():
    values = {"rank": 8, "projected_kv_temperature": 16.0, "latent_gate_init": 0.01, "something_off": False}
    assert public_release.config_from_public(values, "x").steer == ("q", "k", "v", "o")
    with pytest.warns(UserWarning, match="unknown option novelty='on'"):
        public_release.config_from_public({**values, "novelty": "on"}, "x")


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("adapter_config.json", "{", "not valid JSON"),
        ("adapter_config.json", "[1]", "must hold a JSON object"),
        ("adapter_config.json", '{"format": "lora"}', "not a δ-mem adapter"),
        ("adapter_config.json", '{"format": "deltamem", "format_version": 9}', "format_version 9"),
        ("adapter_config.json", '{"format": "deltamem", "format_version": 1, "rnak": 8}', "did you mean 'rank'"),
        ("adapter_model.safetensors", "garbage", "not a readable safetensors file"),
    ],
)
def test_malformed_folders_each_get_their_own_error(tiny_model, tmp_path, name, content, message):
    trained(tiny_model).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(AdapterFormatError, match=message):
        adapter_files.load_adapter(tmp_path)


def test_an_empty_folder_and_a_name_nobody_has_are_errors(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(AdapterFormatError, match="holds no adapter"):
        DeltaMemModel.from_pretrained(tiny_model("qwen3"), tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AdapterFormatError, match="neither a local folder nor an adapter that the Hub gave us"):
        DeltaMemModel.from_pretrained(tiny_model("qwen3"), tmp_path / "nowhere")


def test_whoever_may_read_new_files_may_read_an_adapter(tiny_model, tmp_path):
    get_delta_mem_model(tiny_model("qwen3", "sdpa")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "new").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "new", *(tmp_path / "adapter").iterdir()]}
    assert set(modes.values()) == {modes["new"]} and "adapter_model.safetensors" in modes
