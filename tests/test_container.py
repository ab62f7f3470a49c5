"""The container's file, as far as it can be checked without building it."""

import re
import shlex

import yaml

from tests.paths import PROJECT

TEXT = (PROJECT / "Dockerfile").read_text()
COMMANDS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line.strip()
]
ARGS = dict(rest.split("=") for name, rest in COMMANDS if name == "ARG")


def all_of(name):
    return [rest for command, rest in COMMANDS if command == name]


def test_every_instruction_is_one_of_docker():
    known = {"FROM", "ARG", "RUN", "COPY", "WORKDIR", "USER", "ENV", "EXPOSE", "CMD"}
    assert {name for name, _ in COMMANDS} == known


def test_the_base_image_is_pinned_to_a_version_of_the_python_that_is_locked():
    conda = yaml.safe_load((PROJECT / "environment.yml").read_text())["dependencies"]
    python = next(entry for entry in conda if str(entry).startswith("python=")).removeprefix("python=")
    for image in all_of("FROM"):
        assert re.fullmatch(rf"python:{re.escape(python)}\.\d+-slim-[a-z]+", image)


def test_what_is_copied_is_there_and_sent_to_the_builder():
    ignored, *exceptions = [
        line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert ignored == "*"
    copied = [source for rest in all_of("COPY") for source in shlex.split(rest)[:-1]]
    assert all((PROJECT / source).exists() for source in copied)
    assert {f"!{source}" for source in copied} == {line for line in exceptions if line.startswith("!")}


def test_the_code_that_is_installed_is_all_copied():
    copied = {source for rest in all_of("COPY") for source in shlex.split(rest)[:-1]}
    assert {"deltamem", "kernels", "pipelines", "pyproject.toml", "README.md", "LICENSE"} <= copied
    assert not re.search(r"^COPY \. ", TEXT, re.MULTILINE)


def test_installers_and_versions_are_those_of_the_makefile():
    assert (
        ARGS["UV_VERSION"] == re.search(r"^UV_VERSION := (\S+)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)[1]
    )
    installs = [rest for rest in all_of("RUN") if "uv pip install" in rest]
    assert all("--constraint requirements.lock" in rest or "--no-deps" in rest for rest in installs)
    assert "rm -rf /var/lib/apt/lists/*" in all_of("RUN")[0]


def test_the_profile_that_snakemake_takes_by_itself_lies_beside_the_snakefile():
    assert (PROJECT / "profiles").readlink().as_posix() == "workflow/profiles"
    assert any("ln -s workflow/profiles profiles" in rest for rest in all_of("RUN"))


def test_nothing_runs_as_root():
    names = [name for name, _ in COMMANDS]
    assert all_of("USER") == ["deltamem"] and "RUN" not in names[names.index("USER") :]


def test_the_builds_that_are_shown_use_arguments_that_there_are():
    for shown in (TEXT, (PROJECT / "docs/container.md").read_text()):
        builds = re.findall(r"docker build .*", shown)
        assert len(builds) == 2
        assert {name for build in builds for name in re.findall(r"--build-arg (\w+)=", build)} == {"TORCH_BACKEND"}
    assert ARGS["TORCH_BACKEND"] == "cpu"
