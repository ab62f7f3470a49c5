"""Runs the workflow as a job of a Ray cluster, and follows its log.

    python -m pipelines.submit --address http://127.0.0.1:8265 --configfile configs/paper.yaml

The job runs in this project's folder, with this Python, so both must lie on storage that the cluster shares
(or the cluster is this machine). Trainings and evaluations run wherever the cluster has room for them, the
other stages where the job runs. Options of Snakemake follow ``--``. A cluster that asks for a token gets the
one Ray is told of (RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH).
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
import uuid
from pathlib import Path
from typing import Annotated

import typer
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from requests.exceptions import RequestException
from rich.console import Console

from pipelines.config import load_config
from pipelines.config.files import PROJECT_ROOT
from pipelines.errors import StageError, run_stage

AGENT_SECONDS = 90
PROFILE = PROJECT_ROOT / "workflow/profiles/ray-cluster"
"""Of which jobs run on the cluster, as many at once as it may have room for, whatever the head's machine has."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True, markup=False)


def submit(client: JobSubmissionClient, configfile: Path, options: list[str]) -> str:
    """Submits the run and returns the job's id; a run that is a job already gets no second one.

    Raises StageError when the cluster takes no jobs.
    """
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", str(PROFILE), *options]
    command += ["--configfile", str(configfile.resolve())]
    entrypoint = f"cd {shlex.quote(str(PROJECT_ROOT))} && {shlex.join(command)}"
    for job in client.list_jobs():
        if job and job.entrypoint == entrypoint and not job.status.is_terminal():
            console.print(f"this run is job {job.submission_id} already")
            return str(job.submission_id)
    job_id = f"deltamem-{uuid.uuid4().hex[:12]}"  # one for all tries: one that seemed to fail may have got through
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(submission_id=job_id, entrypoint=entrypoint, metadata={"config": str(configfile)})
        except RuntimeError as error:
            if f"{job_id} already exists" in str(error):
                return job_id
            if "No available agent" not in str(error):
                raise
            # a head that has only just started answers before it can take jobs
            if time.monotonic() > deadline:
                raise StageError(
                    f"the Ray cluster answers, but its head has taken no job for {AGENT_SECONDS} s. Ray's "
                    "dashboard_agent.log there says why: where another Ray runs on that machine, its port is "
                    "taken, and `ray start --head --dashboard-agent-listen-port=0` finds a free one."
                ) from error
            time.sleep(2)


def follow(client: JobSubmissionClient, job_id: str) -> None:
    """Prints the job's log until it ends. Raises StageError when it didn't succeed."""

    async def show() -> None:
        async for lines in client.tail_job_logs(job_id):
            console.print(lines, end="")

    asyncio.run(show())
    status = client.get_job_status(job_id)
    if status != JobStatus.SUCCEEDED:
        details = client.get_job_info(job_id)
        raise StageError(f"Ray job {job_id} ended as {status}: {details and details.message}")


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job server. Raises StageError when it can't be reached or refuses."""
    if not address.startswith(("http://", "https://")):  # which Ray takes for addresses of other kinds, and waits for
        raise StageError(f"--address: a job server's begins with http://, as http://HEAD:8265 does, and not {address}")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        asked = str(error).splitlines()[0]
        raise StageError(
            f"the Ray cluster at {address} asks for a token: {asked}. Set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's."
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise StageError(
            f"no Ray job server at {address} ({error}). Start one with `ray start --head` (Ray needs its "
            "[default] extra) or correct --address."
        ) from error


@app.command()
def main(
    configfile: Annotated[Path, typer.Option(help="Configuration file.")],
    address: Annotated[str, typer.Option(help="The cluster's job server.")] = "http://127.0.0.1:8265",
    options: Annotated[list[str] | None, typer.Argument(help="Options of Snakemake, after --.")] = None,
) -> None:
    """Submit the workflow to a Ray cluster and follow its log; interrupting this leaves the job running."""
    load_config(configfile)  # what is wrong with it is told here, and not by a job that fails
    client = connect(address)
    try:
        job_id = submit(client, configfile, options or [])
        console.print(f"following {job_id}; `ray job stop --address {address} {job_id}` ends it")
        follow(client, job_id)
    except KeyboardInterrupt:
        console.print(f"\n{job_id} goes on; the same command follows it again")
        raise
    except RequestException as error:
        raise StageError(f"lost the Ray job server at {address}: {error}") from error


if __name__ == "__main__":
    run_stage(app)
