import errno

import pytest
import typer

from pipelines.errors import StageError, run_stage
from pipelines.run.files import room_to_write


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
