"""What the report's charts show."""

import pandas as pd

from pipelines.evaluation.statistics import Estimate
from pipelines.reporting.charts import PAPER, curves, write_by_layer


def test_a_curve_of_one_point_is_drawn_as_a_point():
    found = {("tsw", 42): pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0], "memory_effect": [0.1, None]})}
    figure = curves({"tiny": found}, {"loss": "loss", "memory_effect": "memory effect"}, set())
    loss, effect = (axis.lines[0].get_marker() for axis in figure.axes)
    assert (loss, effect) == ("None", "o")


def test_a_picture_looked_at_by_itself_is_readable_on_any_background(tmp_path):
    write_by_layer({0: Estimate(0.1, 0.0, 0.2, 4, 2)}, "nats", tmp_path / "layers.svg")
    behind = (tmp_path / "layers.svg").read_text().partition('id="patch_1"')[2].partition("/>")[0]
    assert f"fill: {PAPER}" in behind
