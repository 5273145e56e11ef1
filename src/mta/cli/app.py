"""Register all commands in one application, and print errors without a traceback."""

from __future__ import annotations

import logging
import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType

import typer

from mta import __version__
from mta.cli import bank, compare, data, machine, person, personalize, predict, serve, store
from mta.errors import MtaError
from mta.system.process import is_out_of_memory, keep_freed_memory, limit_threads

app = typer.Typer(
    name="mta",
    help="Give every person their own language model, without keeping one model per person.\n\nStart with:  mta demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
START, BUILD, MEASURE, MANAGE = "Start here", "Build and use", "Measure", "Manage"
app.command(rich_help_panel=START)(machine.demo)
app.command(rich_help_panel=START)(machine.doctor)
app.add_typer(data.app, name="data", rich_help_panel=BUILD)
app.add_typer(bank.app, name="bank", rich_help_panel=BUILD)
app.command(rich_help_panel=BUILD)(personalize.personalize)
app.command(rich_help_panel=BUILD)(serve.generate)
app.command(rich_help_panel=BUILD)(predict.predict)
app.command(rich_help_panel=BUILD)(serve.serve)
app.command(rich_help_panel=MEASURE)(compare.compare)
app.command(rich_help_panel=MEASURE)(machine.size)
app.add_typer(person.app, name="person", rich_help_panel=MANAGE)
app.command(rich_help_panel=MANAGE)(person.export)
app.command(rich_help_panel=MANAGE)(person.forget)
app.add_typer(store.app, name="store", rich_help_panel=MANAGE)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Give every person their own language model, without keeping one model per person."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


_LESS_MEMORY = (
    "Lower memory=, set gradient_checkpointing=true, or choose another device: --device cpu. "
    "(mta demo and mta-lab evaluate: run.memory=, run.device=cpu, and so on)"
)


def main() -> None:
    """Run a command of ``mta``."""
    run(app)


def run(app: typer.Typer) -> None:
    """Run a command. Print a user's mistake without a traceback, and exit with 1."""
    if sys.platform == "win32":  # writing files needs flags of POSIX: system/atomic.py
        typer.echo("mta does not run on Windows. Install and run it in WSL 2.", err=True)
        sys.exit(1)
    _prepare()
    try:
        app()
    except (MtaError, OSError) as error:  # OSError: for example a full disk or a read-only folder
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        typer.echo(f"out of memory: {(str(error) or 'no memory is left').splitlines()[0]}\n  {_LESS_MEMORY}", err=True)
        sys.exit(1)
    except Terminated as end:  # now end as if the signal had not been caught, which supervisors expect
        signal.signal(end.number, signal.SIG_DFL)
        os.kill(os.getpid(), end.number)
        raise  # the first process of a container survives its own signal
    except SystemExit as end:
        if end.code == 130:  # typer's exit code for Ctrl-C
            typer.echo("Interrupted. Nothing is half written; repeat the command.", err=True)
        raise


def _prepare() -> None:
    """Set up signals, streams, logging, threads, and memory for a process that is ours: a library must not do this."""
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # progress bars would fill log files
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # for passes of many sizes on a GPU
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # which nohup sets
            signal.signal(ending, _end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that cannot show a character is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    log = logging.getLogger("mta")
    log.handlers[:], log.propagate = [logging.StreamHandler()], False
    log.setLevel(logging.INFO)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # misses kernels that mta never uses
    limit_threads()
    keep_freed_memory()


class Terminated(SystemExit):
    """A signal to end: like an error, so that temporary files with people's texts are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def _end(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)
