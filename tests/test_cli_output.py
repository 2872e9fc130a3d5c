"""Results that cannot be written: said in one line, and of files before the work begins."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dora_cache import cli
from dora_cache.cli import backends as backends_command
from dora_cache.cli import bench as bench_command
from dora_cache.cli import demo as demo_command
from dora_cache.cli.app import app
from dora_cache.cli.output import check_file
from dora_cache.lab import bench, caps, coverage, simulator, traffic
from dora_cache.lab.field import measuring
from dora_cache.lab.freshness import report

PROGRAM = [sys.executable, "-m", "dora_cache"]
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


class Failing(io.StringIO):
    """A stream that takes so many writes, and then fails."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error = error
        self.left = after

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


FULL = OSError(errno.ENOSPC, "No space left on device")
GONE = BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.fixture
def invoke(monkeypatch, capsys):
    """Run the program in this process with some standard output; return exit code and stderr."""

    def run(stdout, *arguments):
        monkeypatch.setattr(sys, "argv", ["dora-cache", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert sys.stdout is stdout
        return left.value.code, capsys.readouterr().err

    return run


COMMANDS = [
    ["--help"],
    ["--version"],
    ["backends"],
    ["backends", "--help"],
    ["plan", "--shape", "tiny"],
    ["lab", "--help"],
    ["lab", "simulate", "--scale", "0.01", "--traces", "cyclic", "--policies", "lru", "--out", "."],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_disk_is_one_line_for_every_command(invoke, arguments, monkeypatch, tmp_path):
    """The exit code is that of other failures, and there is no traceback."""
    monkeypatch.chdir(tmp_path)
    code, said = invoke(Failing(FULL), *arguments)
    assert code == 2
    assert said == (
        "error: cannot write to standard output (No space left on device): send it somewhere else\n"
    )


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_reader_that_has_gone_is_not_told(invoke, arguments, monkeypatch, tmp_path):
    """As in `dora-cache backends | head -1`: a quiet end, with the exit code of such tools."""
    monkeypatch.chdir(tmp_path)
    assert invoke(Failing(GONE), *arguments) == (141, "")


def test_a_failure_in_the_middle_is_told_as_well(invoke, tmp_path, monkeypatch):
    """What has been written before it stays, and it is not taken for one of the files."""
    monkeypatch.chdir(tmp_path)
    stream = Failing(FULL, after=2)
    code, said = invoke(stream, *COMMANDS[-1])
    assert (code, said.count("\n")) == (2, 1)
    assert "standard output" in said
    assert "cyclic" in stream.getvalue()


def test_what_works_is_as_before(invoke):
    """Output, and the exit codes of success and of mistakes."""
    stream = io.StringIO()
    assert invoke(stream, "backends") == (0, "")
    assert "max_bytes*" in stream.getvalue()
    assert invoke(io.StringIO(), "generate", "x", "--prompt", "y")[0] == 2


def test_another_error_is_not_taken_for_one_of_output(invoke, monkeypatch):
    """A bug's OSError comes through."""

    def fail():
        raise OSError(errno.ENOSPC, "of something else")

    monkeypatch.setattr(backends_command, "available", fail)
    monkeypatch.setattr(sys, "argv", ["dora-cache", "backends"])
    with pytest.raises(OSError, match="of something else"):
        cli.main()


@needs_full
@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_full_device_leaves_python_nothing_to_complain_about(unbuffered):
    """What is left in buffers fails no second time at the end of the process."""
    command = [sys.executable, *unbuffered, "-m", "dora_cache", "backends"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_a_closed_pipe_ends_the_process_quietly():
    """Nothing on stderr, no exit code of success."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*PROGRAM, "backends"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# Files


def never(*_, **__):
    raise AssertionError("the work has begun")


@pytest.fixture
def nothing_is_measured(monkeypatch):
    """Make every command's work an error."""
    for module, names in {
        report: ["rows"],
        coverage: ["measure_coverage", "count_examples"],
        measuring: ["measure"],
        traffic: ["write_adapters"],
        caps: ["measure_caps", "random_adapter"],
        simulator: ["simulate"],
        bench: ["compare"],
        bench_command: ["random_dora"],
        demo_command: ["_load"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, never)


FILES = {
    "bench": (["--shape", "tiny"], ["bench.json", "bench.png"]),
    "lab caps": (["--shape", "tiny"], ["caps.json", "caps.png"]),
    "lab coverage": ([], ["coverage.json"]),
    "lab field": ([], ["field.json"]),
    "demo": ([], ["demo.json", "demo.png"]),
    "lab pages": ([], ["report.html", "pool-report.html"]),
    "lab simulate": ([], ["simulate.json", "simulate.png"]),
    "lab traffic": ([], ["traffic.json"]),
}


def assert_told(arguments, *parts):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert str(part) in result.stderr


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize("command", FILES)
def test_a_folder_is_tried_before_the_work(command, tmp_path):
    """One that cannot be made, and one in which a result cannot be written."""
    arguments, names = FILES[command]
    (tmp_path / "file").write_text("")
    run = [*command.split(), *arguments, "--out"]
    assert_told([*run, tmp_path / "file" / "out"], "another one as --out")
    for name in names:
        out = tmp_path / f"with {name}"
        (out / name).mkdir(parents=True)
        assert_told([*run, out], out / name, "another folder as --out")
        assert [path.name for path in out.iterdir()] == [name]


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize("command", ["freshness", "lab coverage", "lab field"])
def test_a_markdown_file_is_tried_before_the_work(command, tmp_path):
    """A missing folder is found at once."""
    path = tmp_path / "missing" / "table.md"
    more = [] if command == "freshness" else ["--out", tmp_path]
    assert_told([*command.split(), *more, "--markdown", path], path, "give another --markdown")


def test_trying_a_file_leaves_it_as_it_is(tmp_path):
    """No file is made, none is emptied, and no pipe is opened."""
    old, new, pipe, link = (tmp_path / name for name in ("old", "new", "pipe", "link"))
    old.write_text("text")
    os.mkfifo(pipe)
    link.symlink_to("nowhere")
    for path in (old, new, pipe, link, None):
        check_file(path, "--markdown")
    assert old.read_text() == "text"
    assert not new.exists()
    assert link.is_symlink()


@needs_full
def test_a_file_that_fails_in_the_end_is_told(tmp_path, monkeypatch):
    """A disk may fill up in the meantime."""
    monkeypatch.setattr(report, "rows", lambda **_: [])
    assert_told(["freshness", "--markdown", "/dev/full"], "No space left", "another --markdown")
    (tmp_path / "simulate.json").symlink_to("/dev/full")
    quick = ["lab", "simulate", "--scale", "0.01", "--traces", "cyclic", "--policies", "lru"]
    assert_told([*quick, "--out", tmp_path], "No space left", "another folder as --out")
