"""The command line: one file per verb, heavy imports inside the verbs, one place for errors."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from ..core.errors import Ar2DiffError, as_keyword, check_text, first_line, is_panic
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
from .rl import rl
from .runs import runs
from .sft import sft

USAGE = typer.BadParameter.__mro__[1]  # typer names its class of usage errors nowhere public


class Verb(TyperCommand):
    """A command whose errors name options as its own flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The list of commands would keep the line breaks of a docstring.
        self.short_help = " ".join((self.help or "").split("\n\n")[0].split())

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except Ar2DiffError as error:
            raise error.named(self._as_flag) from error

    def _as_flag(self, name: str, value: str | None) -> str:
        for parameter in self.params:
            flag = max(parameter.opts, key=len)
            if parameter.name == name and flag.startswith("--"):
                shown = None if getattr(parameter, "is_flag", False) else value
                return flag if shown is None else f"{flag} {shown}"
            if parameter.name == name:
                return parameter.metavar or name.upper()
        return as_keyword(name, value)  # a key of the recipe


app = typer.Typer(
    help="Convert autoregressive language models into diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("adapt", cls=Verb)(adapt)
app.command("sft", cls=Verb)(sft)
app.command("rl", cls=Verb)(rl)
app.command("draft", cls=Verb)(draft)
app.command("generate", cls=Verb)(generate)
app.command("chat", cls=Verb)(chat)
app.command("runs", cls=Verb)(runs)
app.command("plot", cls=Verb)(plot)
app.command("eval", cls=Verb)(evaluate_command)
app.command("check", cls=Verb)(check_command)
app.command("merge", cls=Verb)(merge)
app.command("push", cls=Verb)(push)
app.command("card", cls=Verb)(card)
app.command("import", cls=Verb)(import_command)
app.command("export", cls=Verb)(export)
app.add_typer(recipes_app, name="recipes")
app.add_typer(config_app, name="config")
app.command("doctor", cls=Verb)(doctor)
app.command("memory", cls=Verb)(memory)


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
            sys.exit(app(standalone_mode=False) or 0)
        except USAGE as error:
            context = error.ctx
            if context and type(error).__name__ == "NoArgsIsHelpError":
                print(context.get_help())
                sys.exit(0)
            path = context.command_path if context else "ar2diff"
            told = error.format_message().replace(": Value error, ", ": ")  # pydantic's words
            raise Ar2DiffError(told, f"run '{path} --help' to see the usage") from None
