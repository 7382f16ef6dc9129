"""Commands and groups whose errors say what to type instead."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..core.errors import Ar2DiffError, as_keyword

USAGE = typer.BadParameter.__mro__[1]  # typer names its class of usage errors nowhere public


class UnknownVerb(USAGE):
    """A group has no command of that name."""

    def __init__(self, name: str, context: typer.Context):
        super().__init__(f"there is no verb {name}", context)
        self.name = name


class ExtraWords(USAGE):
    """A command does not take that many arguments."""

    def __init__(self, words: list[str], context: typer.Context):
        super().__init__(f"unexpected {words}", context)
        self.words = words


class Group(TyperGroup):
    """A group of commands."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:
        """Find a command by its name."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UnknownVerb(args[0], ctx)
        return super().resolve_command(ctx, args)


class Verb(TyperCommand):
    """A command whose errors name options as its own flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Help would keep the line breaks of a docstring.
        paragraphs = [" ".join(text.split()) for text in (self.help or "").split("\n\n")]
        self.help = "\n\n".join(paragraphs)
        for parameter in self.params:
            if not parameter.opts[0].startswith("-") and parameter.metavar is None:
                parameter.metavar = parameter.name.upper()
        self.short_help = re.split(r"(?<=\.) ", paragraphs[0])[0]

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse the arguments of the verb."""
        ctx.allow_extra_args = True  # so that those are known one by one
        try:
            extra = super().parse_args(ctx, args)
        except USAGE as error:
            error.ctx = error.ctx or ctx
            raise
        if extra and not ctx.resilient_parsing:
            raise ExtraWords(extra, ctx)
        return extra

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
