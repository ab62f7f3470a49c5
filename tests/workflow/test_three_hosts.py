"""A run on three hosts, by the commands of the page on clusters, while hosts die."""

import csv
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.docs.pages import blocks
from tests.hosts import Host, hosts
from tests.paths import PROJECT

PROFILE = PROJECT / "workflow/profiles/ray-cluster"
STEPS = 40
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "of-no-other-cluster-than-this-one-0123456789",
    # otherwise that of the machine's name, which is none of the hosts'
    "GLOO_SOCKET_IFNAME": "eth0",
    # a dead host is noticed in a few seconds rather than in minutes
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


class Cluster:
    """Three hosts and the folder they share."""

    def __init__(self, found: list[Host], folder: Path) -> None:
        self.head, *self.others = found
        self.folder = folder
        documented = [
            shlex.split(line, comments=True) for line in blocks(PROJECT / "docs/cluster.md", "sh")[0].splitlines()
        ]
        self._first, self._other = (words[1:] for words in documented if words[:2] == ["ray", "start"])

    def start_everywhere(self) -> None:
        """On the head, and then on the others side by side."""
        self.start_ray(self.head)
        with ThreadPoolExecutor() as side_by_side:
            list(side_by_side.map(self.start_ray, self.others))

    def start_ray(self, host: Host) -> None:
        """By the page's command for this host, which has a processor for jobs unless it is the head."""
        words = self._first if host is self.head else [word.replace("HEAD", self.head.address) for word in self._other]
        words = [*words, "--block", f"--node-ip-address={host.address}", "--object-store-memory=80000000"]
        words += ["--include-dashboard=false"] if host is self.head else ["--num-cpus=1"]
        log = self.folder / f"ray-{host.name}.log"
        while not self._started(host, [sys.executable, "-m", "ray.scripts.scripts", *words], log):
            host.starts_anew()

    def _started(self, host: Host, command: list[str], log: Path) -> bool:
        """Whether Ray came up in the time that it gives itself, which is too short where many run."""
        log.write_text("")
        process = host.start(command, log, **self._environment(host))
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None:
                assert "timed out during startup" in log.read_text(), log.read_text()
                return False
            time.sleep(0.1)
        return True

    def run(self, host: Host, command: list[str], log: Path) -> subprocess.Popen:
        return host.start(command, log, **self._environment(host))

    def _environment(self, host: Host) -> dict[str, str]:
        return {**SETTINGS, "RAY_TMPDIR": str(host.own)}


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    with hosts(3) as found:
        made = Cluster(found, tmp_path)
        made.start_everywhere()
        yield made


@pytest.fixture
def small(workflow):
    """A workflow of one training of some steps and two evaluations, on a cluster."""
    workflow.settings |= {"strategies": ["tsw"], "register": {"live": False}}
    workflow.settings["data"] |= {"generated": {"train_papers": 3, "eval_papers": 2, "facts_per_paper": 2}}
    workflow.settings["data"] |= {"max_written_tokens": 512, "max_read_tokens": 128, "processes": 1}
    workflow.settings["train"] |= {"max_steps": STEPS, "epochs": 99, "batch_size": 2, "precision": "float32"}
    workflow.settings["train"] |= {"checkpoint_every": 2, "measure_memory_every": 0}
    workflow.settings["evaluate"] |= {"max_new_tokens": 4, "bootstrap_samples": 100}
    return workflow


def until(come, process: subprocess.Popen, log: Path) -> None:
    """Waits for something that a process brings about."""
    while not come():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)


def rows(workflow) -> list[dict[str, str]]:
    """Of the curve of the training under way."""
    for path in workflow.folder.glob("results/tiny/train_state/tiny-random/tsw/seed42/run-*/curve.csv"):
        return list(csv.DictReader(path.open()))
    return []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_finishes_though_hosts_lose_their_power(cluster, small, tmp_path):
    small.settings["train"]["num_workers"] = 2
    results, said = tmp_path / "results/tiny", tmp_path / "snakemake.log"
    run = cluster.run(cluster.head, small.command("--workflow-profile", str(PROFILE)), said)

    until(lambda: len(rows(small)) >= 5, run, said)
    dead, other = cluster.others
    dead.loses_power()
    log = results / "logs/train/tiny-random/tsw/seed42.log"
    until(lambda: "going on from the last checkpoint" in log.read_text(), run, said)
    dead.gets_power()
    cluster.start_ray(dead)

    until(lambda: any(host.runs("pipelines.evaluate") for host in cluster.others), run, said)
    next(host for host in cluster.others if host.runs("pipelines.evaluate")).loses_power()
    assert run.wait() == 0, said.read_text()

    record = json.loads((results / "adapters/tiny-random/tsw/seed42/training.json").read_text())
    assert record["step"] == STEPS and record["workers"] == [{"count": 2, "from_step": 1}]
    logs = [path.read_text() for path in (results / "logs/evaluate").rglob("*.log")]
    assert len(logs) == 2 and any("the Ray cluster lost this job" in text for text in logs)
    assert (results / "report/index.html").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_whose_head_loses_its_power_ends_and_goes_on_with_another(cluster, small, tmp_path):
    beside, _ = cluster.others
    target = "results/tiny/adapters/tiny-random/tsw/seed42/training.json"
    command, said = small.command("--workflow-profile", str(PROFILE), target), tmp_path / "snakemake.log"
    run = cluster.run(beside, command, said)
    until(lambda: len(rows(small)) >= 5, run, said)
    before = rows(small)
    cluster.head.loses_power()
    assert run.wait() == 1
    assert "1 job failed or did not finish:\n  train tiny-random tsw seed42" in said.read_text()
    cluster.head.gets_power()
    for host in cluster.others:
        host.starts_anew()
    cluster.start_everywhere()
    again = cluster.run(beside, command, said)
    assert again.wait() == 0, said.read_text()
    record = json.loads((tmp_path / target).read_text())
    assert record["step"] == STEPS and record["workers"] == [{"count": 1, "from_step": 1}]
    after = list(csv.DictReader((tmp_path / target).with_name("curve.csv").open()))
    assert [row["seconds"] for row in after[:4]] == [row["seconds"] for row in before[:4]]  # were not taken again
