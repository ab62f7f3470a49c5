"""The real Snakefile in a temporary folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.paths import PROJECT


class Workflow:
    """Runs Snakemake on a configuration that lies, like its results, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = {
            "name": "tiny",
            "backbones": ["tiny-random"],
            "strategies": {name: {"adapter": {"strategy": name}} for name in ("tsw", "ssw", "msw")},
            "benchmarks": ["qasper"],
            "data": {"source": "generated"},
            "train": {"num_workers": 1, "use_gpu": False},
            "evaluate": {"use_gpu": False},
        }

    def command(self, *arguments: str, config: Path | list[Path] | None = None) -> list[str]:
        """Snakemake's, with the settings as they are now."""
        own = self.folder / "config.yaml"
        own.write_text(yaml.safe_dump(self.settings))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--cores", "2"]
        configs = config if isinstance(config, list) else [config or own]
        return [*command, *arguments, "--directory", str(self.folder), "--configfile", *map(str, configs)]

    def run(self, *arguments: str, config: Path | list[Path] | None = None) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments, config=config)
        return subprocess.run(command, capture_output=True, text=True, cwd=self.folder)

    def said_of_plan(self, *arguments: str, config: Path | list[Path] | None = None) -> str:
        """All that Snakemake says of the jobs that would run."""
        result = self.run("--dry-run", *arguments, config=config)
        text = result.stdout + result.stderr
        assert result.returncode == 0, text
        return text

    def plan(self, *arguments: str, config: Path | list[Path] | None = None) -> list[str]:
        """The messages of the jobs that would run ("Training tsw on …"), without anything being done."""
        text = self.said_of_plan(*arguments, config=config)
        jobs = [line.split(": ", 1)[1] for line in text.splitlines() if line.startswith("Job ") and ": " in line]
        return [job.split(";")[0] for job in jobs]

    def pretend(self) -> None:
        """Marks everything as done, with files that hold nothing."""
        planned = self.run("--dry-run", "--summary")
        assert planned.returncode == 0, planned.stderr
        for line in planned.stdout.splitlines()[1:]:
            path = self.folder / line.split("\t")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        result = self.run("--touch", "--forceall")
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def workflow(tmp_path) -> Workflow:
    return Workflow(tmp_path)
