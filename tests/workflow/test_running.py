"""Real runs of the workflow that fail, and what they say."""

import pytest


def test_a_mistake_in_the_configuration_stops_everything(workflow):
    workflow.settings["train"]["lerning_rate"] = 1
    result = workflow.run()
    text = result.stdout + result.stderr
    assert result.returncode == 1
    assert "train.lerning_rate: unknown key; did you mean 'learning_rate'?" in text
    assert not (workflow.folder / "results").exists()


def test_a_mistake_on_the_command_line_is_not_laid_to_the_file(workflow):
    result = workflow.run("--config", "train={lerning_rate: 1}")
    assert "config.yaml + --config: train.lerning_rate: unknown key" in result.stdout + result.stderr


TINY = {
    "source": "random",
    "architecture": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
}


@pytest.mark.slow
def test_a_run_that_stops_before_the_report_does_not_speak_of_one(workflow):
    workflow.settings["backbones"] = {"here": TINY}
    result = workflow.run("--until", "backbone")
    text = result.stdout + result.stderr
    assert result.returncode == 0, text
    # one backbone and its data, three trainings, four evaluations, three registrations
    assert "Done. 1 of 12 jobs are finished.\n" in text and "report" not in text.split("Done.")[1]


@pytest.mark.slow
def test_a_failed_cell_is_named_and_the_others_go_on(workflow):
    missing = workflow.folder / "nowhere"
    workflow.settings["backbones"] = {
        "gone": {"source": "local", "path": str(missing)},
        "here": TINY,
    }
    backbones = [f"results/tiny/backbones/{name}/backbone.json" for name in ("gone", "here")]
    result = workflow.run(*backbones)
    text = result.stdout + result.stderr
    assert result.returncode == 1
    assert (workflow.folder / backbones[1]).exists()
    assert "1 job failed or did not finish:\n  backbone gone\n    error:" in text
    assert "log: results/tiny/logs/backbone/gone.log" in text
    assert "results/tiny/report/index.html" in text
    page = (workflow.folder / "results/tiny/report/index.html").read_text(encoding="utf-8")
    assert "backbone gone" in page
