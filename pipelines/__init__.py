"""The stages of the workflow, one module each: `python -m pipelines.STAGE --help`."""
