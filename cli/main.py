"""The command line: one file per verb, heavy imports inside the verbs, one place for errors."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..core.errors import Ar2DiffError, check_text, first_line, is_panic
from ..distributed.ranks import ending, is_launched, report_error
from .adapt import adapt
from .card import card
from .chat import chat
from .check import check_command
from .config import config_app
from .doctor import doctor
from .draft import draft
from .eval import evaluate_command
from .export import export
from .generate import generate
from .import_ import import_command
from .memory import memory
from .merge import merge
from .plot import plot
from .push import push
from .recipes import recipes_app
from .report import compare_command, report_command
from .rl import rl
from .runs import runs
from .serve import serve
from .sft import sft
from .usage import USAGE, Group, Verb

# Groups of verbs in the help.
TRAIN = "Train"
GENERATE = "Generate and measure"
MOVE = "Publish and exchange models"
PREPARE = "Prepare runs"

app = typer.Typer(
    cls=Group,
    help="Convert autoregressive language models into diffusion language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("adapt", cls=Verb, rich_help_panel=TRAIN)(adapt)
app.command("sft", cls=Verb, rich_help_panel=TRAIN)(sft)
app.command("rl", cls=Verb, rich_help_panel=TRAIN)(rl)
app.command("draft", cls=Verb, rich_help_panel=TRAIN)(draft)
app.command("generate", cls=Verb, rich_help_panel=GENERATE)(generate)
app.command("chat", cls=Verb, rich_help_panel=GENERATE)(chat)
app.command("serve", cls=Verb, rich_help_panel=GENERATE)(serve)
app.command("runs", cls=Verb, rich_help_panel=TRAIN)(runs)
app.command("plot", cls=Verb, rich_help_panel=TRAIN)(plot)
app.command("eval", cls=Verb, rich_help_panel=GENERATE)(evaluate_command)
app.command("report", cls=Verb, rich_help_panel=GENERATE)(report_command)
app.command("compare", cls=Verb, rich_help_panel=GENERATE)(compare_command)
app.command("check", cls=Verb, rich_help_panel=GENERATE)(check_command)
app.command("merge", cls=Verb, rich_help_panel=MOVE)(merge)
app.command("push", cls=Verb, rich_help_panel=MOVE)(push)
app.command("card", cls=Verb, rich_help_panel=MOVE)(card)
app.command("import", cls=Verb, rich_help_panel=MOVE)(import_command)
app.command("export", cls=Verb, rich_help_panel=MOVE)(export)
app.add_typer(recipes_app, name="recipes", rich_help_panel=PREPARE)
app.add_typer(config_app, name="config", rich_help_panel=PREPARE)
app.command("doctor", cls=Verb, rich_help_panel=PREPARE)(doctor)
app.command("memory", cls=Verb, rich_help_panel=PREPARE)(memory)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version."),
) -> None:
    """Convert autoregressive language models into diffusion language models."""
    if version:
        from .. import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@contextmanager
def boundary() -> Iterator[None]:
    """Exit with 2 for what the user can fix, told in two lines; 1 for a bug; 130 if interrupted."""
    try:
        yield
    except Ar2DiffError as error:
        say(error, f"error: {error.what}\n  fix: {error.fix}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:
        raise
    except BaseException as error:  # whatever is left is a bug of ours
        if is_panic(error):  # of a damaged tokenizer.json, at a text that its trial had not
            told = f"the tokenizer crashed ({first_line(error)})"
            panic = Ar2DiffError(told, "download its tokenizer.json again")
            say(panic, f"error: {panic.what}\n  fix: {panic.fix}")
            sys.exit(2)
        told = "error: this is a bug in ar2diff\n  fix: please report it with the lines above"
        say(error, traceback.format_exc() + told)
        sys.exit(1)


def say(error: BaseException, text: str) -> None:
    """Print an error; a launched process leaves that to the launcher, which speaks once for all."""
    if is_launched():
        report_error(error, text)
    else:
        print(text, file=sys.stderr)


def main() -> None:
    """Run the command line."""
    with ending(), boundary():
        for argument in sys.argv[1:]:
            if not argument.isascii():
                check_text(argument, "the argument")
        try:
            sys.exit(app(prog_name="ar2diff", standalone_mode=False) or 0)
        except USAGE as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.ctx.get_help())
                sys.exit(0)
            from .correction import explain

            raise explain(error, sys.argv[1:]) from None
