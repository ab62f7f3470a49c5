"""A backbone that is quantised as it is loaded, from its entry to a trained and evaluated adapter."""

import pytest
import torch

from pipelines.backbone import prepare_backbone
from pipelines.backbones.prepared import load_backbone
from pipelines.backbones.record import backbone_digest
from pipelines.config import resolve_config
from pipelines.errors import StageError
from pipelines.preprocess import preprocess
from pipelines.run.layout import Layout
from pipelines.strategies.kinds import recipe_of
from pipelines.strategies.models import load_model

INT8 = {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}


def a_run(folder, quant_type=INT8):
    quantization = {"quant_method": "torchao", "quant_type": quant_type}
    generated = {"train_papers": 2, "eval_papers": 1, "facts_per_paper": 1}
    config = resolve_config(
        {
            "name": "run",
            "results_dir": str(folder),
            "backbones": {
                "plain": {"from": "tiny-random"},
                "int8": {"from": "tiny-random", "quantization": quantization},
            },
            "strategies": ["tsw"],
            "benchmarks": ["qasper"],
            "data": {"source": "generated", "generated": generated, "processes": 1},
            "train": {"num_workers": 1, "use_gpu": False},
            "evaluate": {"use_gpu": False},
        },
        "test",
    )
    for name, spec in config.backbones.items():
        prepare_backbone(name, spec, Layout(config).backbone(name))
    return config


@pytest.mark.quantized
def test_an_adapter_is_trained_and_evaluated_on_a_quantised_backbone(tmp_path):
    pytest.importorskip("torchao")
    config = a_run(tmp_path)
    layout, cell = Layout(config), ("int8", "tsw", 42)
    assert backbone_digest(layout.backbone("int8")) != backbone_digest(layout.backbone("plain"))
    base, _ = load_backbone(layout.backbone("int8"))
    assert type(base.model.layers[0].self_attn.q_proj.weight).__name__ == "Int8Tensor"

    preprocess(config, "int8")
    recipe = recipe_of(config, config.cell(*cell))
    episodes, _ = recipe.episodes()
    objective = recipe.objective(base)
    batch, optimizer = recipe.collate(episodes, [[0], [1]]), torch.optim.AdamW(objective.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = objective(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tensors = {n.removeprefix("adapter."): p.detach() for n, p in objective.named_parameters()}
    recipe.save(layout.adapter(*cell), tensors)

    model, _, digests = load_model(config, *cell)
    assert type(model.base_model.model.layers[0].self_attn.q_proj.weight).__name__ == "Int8Tensor"
    assert digests["backbone"] == backbone_digest(layout.backbone("int8"))


@pytest.mark.quantized
def test_a_quantisation_that_transformers_cannot_use_is_named(tmp_path):
    pytest.importorskip("torchao")
    config = a_run(tmp_path, {"default": {"_type": "Int3Config", "_data": {}}})
    with pytest.raises(StageError, match="backbones.int8.quantization: transformers can't use it.*Int3Config"):
        load_backbone(Layout(config).backbone("int8"))


def test_a_method_that_nobody_knows_is_named(tmp_path):
    config = a_run(tmp_path)
    record = Layout(config).backbone_record("int8")
    record.write_text(record.read_text().replace('"quant_method": "torchao"', '"quant_method": "magic"'))
    with pytest.raises(StageError, match="backbones.int8.quantization: .*magic"):
        load_backbone(Layout(config).backbone("int8"))
