# Validates the configuration and owns the targets. Every stage runs as `python -m pipelines.STAGE`, with the
# resolved configuration, and reruns when the part of the configuration that its output depends on has changed.
import json
import math
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from pipelines.config import resolve_config
from pipelines.config.files import read_layers
from pipelines.errors import StageError
from pipelines.run import parts
from pipelines.run.gpu_slots import WHOLE, thousandths, visible_gpus
from pipelines.run.layout import Layout
from pipelines.run.status import jobs, progress, summary

PYTHON = sys.executable

try:
    # Snakemake's own merge takes the last of equal keys, lets a mapping replace a list of names, and has texts for numbers
    layers = read_layers(workflow.configfiles, workflow.config_settings.config)
    given = [*map(str, workflow.configfiles), *(["--config"] if workflow.config_settings.config else [])]
    CONFIG = resolve_config(layers, " + ".join(given))
except StageError as error:
    raise WorkflowError(f"The configuration can't be used.\n{error}")

LAYOUT = Layout(CONFIG)
RESOLVED = str(LAYOUT.resolved_config)

EVALUATIONS = [LAYOUT.evaluation(*evaluation) for evaluation in parts.evaluations(CONFIG)]
TRAINING_RECORDS = [LAYOUT.training_record(*cell) for cell in parts.cells(CONFIG)]
REGISTRATIONS = [LAYOUT.registration(*cell) for cell in parts.cells(CONFIG)]

# How many GPUs there are Snakemake can't know; a limit on the command line (--resources gpus=4) wins. Jobs may take a
# share of one and Snakemake counts in whole numbers, so they are given out in thousandths. A process that is no main
# one runs a single job where another scheduler has placed it, with GPUs of its own.
LOCAL_GPUS = len(visible_gpus()) if workflow.is_main_process else 0
GPU_LIMIT = workflow.global_resources["gpus"].value if "gpus" in workflow.global_resources else LOCAL_GPUS
GPU_SHARES = WHOLE * GPU_LIMIT
workflow.register_resource("gpu_thousandths", GPU_SHARES)


wildcard_constraints:
    backbone=r"[^/]+",
    source=r"[^/]+",
    strategy=r"[^/]+",
    seed=r"\d+",
    benchmark=r"[^/]+",


def part(value):
    """A part of the configuration as one string, the form in which Snakemake compares it."""
    return json.dumps(value, sort_keys=True)


def gpu_shares(gpus, jobs=1):
    """At most what this machine has: a stage that lacks its GPUs says so itself, a scheduler would just wait."""
    return min(jobs * thousandths(gpus), GPU_SHARES)


# Where a frozen or trained model is asked. On a cluster it is Ray that gives GPUs to jobs, wherever there is room; Snakemake decides only what is due.
EVALUATION_GPUS = CONFIG.evaluate.gpus if CONFIG.evaluate.use_gpu else 0
# What another scheduler is asked for; it doesn't know shares.
EVALUATION_WHOLE_GPUS = 0 if CONFIG.train.ray_address else math.ceil(EVALUATION_GPUS)
EVALUATION_SHARES = 0 if CONFIG.train.ray_address or not EVALUATION_GPUS else gpu_shares(EVALUATION_GPUS)
EVALUATION_PLACE = (
    f"on_cluster {CONFIG.train.ray_address} {EVALUATION_GPUS:g}"
    if CONFIG.train.ray_address
    else f"gpu_slots {EVALUATION_SHARES}"
)


def write_resolved_config():
    LAYOUT.resolved_config.parent.mkdir(parents=True, exist_ok=True)
    LAYOUT.resolved_config.write_text(CONFIG.to_json(), encoding="utf-8")


def explain_success():
    """Says where the report is, if this run, or one before, got as far as that."""
    if LAYOUT.report_page.exists():
        return f"\nDone. The report is {LAYOUT.report_page}"
    return f"\nDone. {progress(jobs(CONFIG))}."


def explain_failure():
    """Names what failed, with its log, and writes the report of what is there."""
    import subprocess

    LAYOUT.log("report").parent.mkdir(parents=True, exist_ok=True)
    with open(LAYOUT.log("report"), "w") as log:
        command = [PYTHON, "-m", "pipelines.report", "--config", RESOLVED]
        written = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode == 0
    page = f"\nThe report of what is finished: {LAYOUT.report_page}" if written else ""
    return f"\n{summary(CONFIG)}{page}\n"
