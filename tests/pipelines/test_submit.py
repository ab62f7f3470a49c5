"""Submission to a real Ray head of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import StageError
from pipelines.submit import main
from tests.paths import PROJECT
from tests.ray_head import ray_head

TOKEN = "0123456789abcdef0123456789abcdef"
TOKENS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}

TRIED_AGAIN = """
import sys
from pathlib import Path
from pipelines.submit import JobSubmissionClient, submit

class LosesAnAnswer(JobSubmissionClient):
    def submit_job(self, **request):
        answer = super().submit_job(**request)
        if not lost:
            lost.append(answer)
            raise RuntimeError("No available agent to submit job, please try again later.")
        return answer

lost, client = [], LosesAnAnswer(sys.argv[1])
before = len(client.list_jobs())
run = client, Path("configs/quickstart.yaml"), ["--dry-run", "--cores", "2"]
first = submit(*run)
assert lost == [first]
again = submit(*run)  # while the first is running
assert again == first, (again, first)
assert len(client.list_jobs()) == before + 1
print("one job")
"""
"""Submits a run whose first answer gets lost, and then the same run again."""


def submit(address: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Plans the quickstart, as if it had been cloned into ``folder`` just now."""
    command = [sys.executable, "-m", "pipelines.submit", "--address", address]
    command += ["--configfile", str(PROJECT / "configs/quickstart.yaml")]
    command += ["--", "--dry-run", "--cores", "1", "--directory", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def head():
    with ray_head("--num-cpus=1", **TOKENS) as found:
        yield found.jobs


@pytest.mark.slow
def test_the_workflow_runs_as_a_job(head, tmp_path):
    refused = submit(head, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN[::-1])
    assert refused.returncode == 1
    assert "asks for a token" in refused.stderr
    assert "Traceback" not in refused.stderr

    done = submit(head, tmp_path, **TOKENS)
    assert done.returncode == 0, done.stderr
    assert "Training msw on smollm2-135m-instruct" in done.stdout
    assert "profiles/ray-cluster" in done.stdout  # by which jobs are under way for all nodes

    script = subprocess.run(
        [sys.executable, "-c", TRIED_AGAIN, head],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**os.environ, **TOKENS},
    )
    assert script.returncode == 0, script.stderr
    assert script.stdout.splitlines()[-1] == "one job"


@pytest.mark.parametrize(
    ("address", "configfile", "told"),
    [
        ("http://127.0.0.1:9", "configs/quickstart.yaml", "no Ray job server at http://127.0.0.1:9"),
        ("127.0.0.1:6379", "configs/quickstart.yaml", "a job server's begins with http://"),
        ("http://127.0.0.1:9", "configs/quickstar.yaml", "configs/quickstar.yaml: can't read this file"),
    ],
)
def test_what_cannot_be_submitted_is_said_at_once(address, configfile, told):
    with pytest.raises(StageError, match=told):
        main(PROJECT / configfile, address)
