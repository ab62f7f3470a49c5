"""Where backbones and data come from, in the report's words."""

import pytest
from pydantic import TypeAdapter

from pipelines.config.backbones import Backbone
from pipelines.reporting.sources import backbone_loading, backbone_source, data_source


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({"hub": "org/set", "revision": "abc", "sha256": "…"}, "hub: org/set at abc"),
        ({"hub": "org/set", "revision": None}, "hub: org/set"),
        ({"hub": "org/set", "revision": None, "commit": "abc"}, "hub: org/set at abc"),
        ({"files": [{"path": "data/one.json"}, {"path": "two.json"}]}, "one.json, two.json"),
        ({"files": [{"path": "one.json"}], "held_out": 0.1}, "one.json; a held-out share of 0.1"),
        ({"generated": {"seed": 3, "train_papers": 8}}, "generated, seed 3"),
        (None, "–"),
    ],
)
def test_data_are_named_by_their_source(origin, words):
    assert data_source({"episodes": 3, "source": origin}) == words


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ({"source": "hub", "id": "org/name"}, "hub: org/name"),
        ({"source": "local", "path": "models/mine"}, "local: models/mine"),
        ({"source": "random", "architecture": {}}, "random"),
    ],
)
def test_backbones_are_named_by_their_source(entry, source):
    backbone = TypeAdapter(Backbone).validate_python(entry)
    assert (backbone_source(backbone), backbone_loading(backbone)) == (source, "bfloat16")
