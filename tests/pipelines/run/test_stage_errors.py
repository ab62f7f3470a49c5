import errno
import subprocess
import sys

import pytest
import typer

from pipelines.errors import StageError, run_stage
from pipelines.run.files import alone, room_to_write

HOLDS = """
import os, sys
from pathlib import Path
from pipelines.run.files import alone
with alone(Path(sys.argv[1])):
    {}
"""


def test_a_stage_error_ends_the_program_with_its_message_alone(capsys):
    app = typer.Typer()

    @app.command()
    def main() -> None:
        raise StageError("data.json is not QASPER: no full_text in paper [12]. Give the official file.")

    with pytest.raises(SystemExit) as end:
        run_stage(lambda: app([]))
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "error: data.json is not QASPER: no full_text in paper [12]. Give the official file.\n"
    )


def test_any_other_exception_keeps_its_traceback():
    def app() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_stage(app)


def test_a_full_disk_names_the_folder(tmp_path):
    with pytest.raises(StageError, match=f"No room to write in {tmp_path}"), room_to_write(tmp_path):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")


def test_other_disk_errors_pass_through(tmp_path):
    with pytest.raises(OSError) as error, room_to_write(tmp_path):
        (tmp_path / "missing" / "file").write_bytes(b"x")
    assert error.value.errno == errno.ENOENT


def test_two_processes_never_do_the_same(tmp_path):
    lock = tmp_path / "seed42.lock"
    command = [sys.executable, "-c", HOLDS.format("pass"), str(lock)]
    with alone(lock):
        other = subprocess.run(command, capture_output=True, text=True)
        assert other.returncode == 1 and f"another process is doing this already: it holds {lock}" in other.stderr
    assert not lock.exists()
    assert subprocess.run(command).returncode == 0


def test_a_killed_process_keeps_nobody_out(tmp_path):
    lock = tmp_path / "seed42.lock"
    dies = HOLDS.format("os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", dies, str(lock)]).returncode == -9 and lock.exists()
    with alone(lock):
        pass
