"""The program around the commands: help, quick start, one line and one exit code for each end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from limner import __version__
from limner.cli.console import STOPPED
from limner.cli.program import app, run
from tiny_cli import program

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
HEAVY = ("torch", "datasets", "transformers", "gradio", "diffusers", "matplotlib", "accelerate", "scipy", "pandas")


def loaded_by(statement: str, names: tuple[str, ...]) -> list[str]:
    code = f"import sys\ntry:\n {statement}\nexcept SystemExit: pass\n" \
           f"print('LOADED', *[n for n in {names!r} if n in sys.modules])"  # fmt: skip
    result = program(code=code)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(f"from limner.cli import main; main({arguments!r})", HEAVY) == []


def test_import_limner_imports_no_optional_package() -> None:
    # Reached through the lazy names too: what a notebook's first cell pays for.
    optional = ("datasets", "transformers", "gradio", "diffusers", "matplotlib")
    assert loaded_by("import limner", HEAVY) == []
    assert loaded_by("import limner; limner.load", optional) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_examples_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"limner {name} " in shown.split("Examples:")[1]
    assert "--json" in shown or name == "studio"  # a server ends without a result


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"limner {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "limner: No such command 'trian'. Did you mean 'train'? (see limner --help)"),
        (["sample"], "limner: Missing option '--out' (see limner sample --help)"),
        (["sample", "r", "--lable", "cat"], "--label"),
        (["train", "d", "--out", "r", "--task", "segmentation"], "--task"),
        (["sample", "r", "--out", "x.png", "--num", "many"], "--num"),
        (["sample", "r", "--out", "x.png", "--seed", "1.5"], "--seed"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("limner: ")
    assert line in captured.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(28, "No space left on device", "/data/x"), 2, "limner: /data/x: No space left on device\n"),
        (PermissionError(13, "Permission denied", "a"), 2, "limner: a: Permission denied\n"),
        (MemoryError(), 2, "limner: out of memory; a smaller --batch, picture or model would do\n"),
        (TypeError("a\nb"), 1, "limner: a fault of limner: TypeError: a b (LIMNER_DEBUG=1 shows where)\n"),
        (KeyboardInterrupt(), 75, "limner: stopped\n"),
    ],
)
def test_each_end_has_its_code_and_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("limner.data.check.check", fail)
    assert run(["check", "somewhere"]) == code
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback() -> None:
    plain, debug = program("check", "/no/such/path"), program("check", "/no/such/path", debug=True)
    assert (plain.returncode, debug.returncode) == (2, 2)
    assert plain.stderr == "limner: /no/such/path: no such file or folder\n"
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)


def test_nobody_reads_the_output() -> None:
    command = [sys.executable, "-m", "limner", "--version"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        result = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode in (0, 1)


def test_sigterm_is_told_like_ctrl_c() -> None:
    code = "import os, signal, limner.data.check as c\nfrom limner.cli import main\n" \
           "c.check = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\nmain(['check', 'x'])"  # fmt: skip
    result = program(code=code)
    assert result.stderr == "limner: stopped\n"
    assert result.returncode == STOPPED == 75
