"""What the report's charts show."""

import pandas as pd

from pipelines.reporting.charts import curves


def test_a_curve_of_one_point_is_drawn_as_a_point():
    found = {("tsw", 42): pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0], "memory_effect": [0.1, None]})}
    figure = curves({"tiny": found}, {"loss": "loss", "memory_effect": "memory effect"}, set())
    loss, effect = (axis.lines[0].get_marker() for axis in figure.axes)
    assert (loss, effect) == ("None", "o")
