"""The script that makes a Slurm allocation a Ray cluster, where it can't."""

import subprocess

import pytest

from tests.paths import PROJECT

SCRIPT = PROJECT / "workflow/clusters/slurm.sh"


@pytest.mark.parametrize(
    ("environment", "told"),
    [({}, "this is started by sbatch"), ({"SLURM_JOB_NODELIST": "node1"}, "make setup there, or call sbatch in the")],
)
def test_what_it_lacks_is_said(environment, told, tmp_path):
    path = {"PATH": "/usr/bin:/bin"}
    ended = subprocess.run(["bash", SCRIPT], env=path | environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and told in ended.stderr
