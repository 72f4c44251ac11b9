"""The program `limner`: its commands, and how each of its ends becomes a line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from limner import __version__
from limner.cli.bench import bench
from limner.cli.check import check
from limner.cli.console import DONE, OUR_FAULT, STOPPED, WRONG_INPUT
from limner.cli.convert import convert
from limner.cli.evaluate import evaluate
from limner.cli.experiment import app as experiment
from limner.cli.models import models
from limner.cli.plan import plan
from limner.cli.reconstruct import reconstruct
from limner.cli.sample import sample
from limner.cli.studio import studio
from limner.cli.train import train
from limner.errors import LimnerError

_TYPERS_CTRL_C = 130

app = typer.Typer(
    name="limner",
    help="Train and sample conditional diffusion models.",
    epilog="Exit codes: 0 done; 2 wrong input, told in one line; 75 stopped by a signal, training can be resumed.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"limner {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _limner(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        context.get_help()


for _command in (train, sample, reconstruct, evaluate, check, convert, studio, bench, plan, models):
    app.command()(_command)
app.add_typer(experiment, name="experiment")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code (see `console.py`)."""
    signal.signal(signal.SIGTERM, _stop)
    code = run(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads any more (`limner check DATA | head`): what is still buffered goes nowhere, without a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code. Whatever goes wrong is one line on stderr."""
    try:
        code = app(args=list(arguments), prog_name="limner", standalone_mode=False) or DONE
    except Exception as error:
        if os.environ.get("LIMNER_DEBUG") == "1":
            traceback.print_exc()
        code, line = _explain(error)
        _say(line)
        return code
    except KeyboardInterrupt:
        code = _TYPERS_CTRL_C
    if code == _TYPERS_CTRL_C:
        _say("stopped")
        return STOPPED
    return code


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and line for an error."""
    # Typer's usage errors; its base class has another home in each of its major versions.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        return WRONG_INPUT, f"{format_message().rstrip('.')} ({_help_of(error)})"
    if isinstance(error, LimnerError):
        return WRONG_INPUT, str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return WRONG_INPUT, f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return WRONG_INPUT, "out of memory; a smaller --batch, picture or model would do"
    return OUR_FAULT, f"a fault of limner: {type(error).__name__}: {error} (LIMNER_DEBUG=1 shows where)"


def _help_of(usage_error: Exception) -> str:
    context = getattr(usage_error, "ctx", None)
    return f"see {context.command_path if context else 'limner'} --help"


def _say(message: str) -> None:
    print(f"limner: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _stop(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: files are let go, half-written outputs removed. Training has its own handler."""
    raise KeyboardInterrupt
