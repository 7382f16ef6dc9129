"""`ar2diff serve`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Dtype, quiet
from .sampler import with_sampler


@partial(with_sampler, without=("check_cache",))  # which only reports
def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model.")],
    host: Annotated[
        str, typer.Option(help="Where to listen; beyond this machine, --api-key-file is needed.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes one that is free.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the keys that clients may use, one a line."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(help="Name under which clients know the model.", show_default="the folder's"),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Number of answers that are written together.")
    ] = 32,
    max_waiting: Annotated[
        int,
        typer.Option(min=1, help="Number of answers that may wait; beyond it, clients get 429."),
    ] = 256,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens that a request may ask for in an answer.")
    ] = 4096,
    time_limit: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds after which a request's answers end where they are."),
    ] = 600.0,
    prefix_cache: Annotated[
        int,
        typer.Option(
            min=0, metavar="MB", help="Memory for beginnings that prompts share; 0: none are kept."
        ),
    ] = 256,
    dtype: Dtype = "auto",
    *,
    settings: dict[str, Any],
) -> None:
    """Serve a model to clients of OpenAI's interface, with a page to try it in a browser. Sampler
    options hold for requests that do not set their own.

    Example: ar2diff serve runs/demo --port 8000
    """
    quiet()
    from .. import serve as run

    run(
        model, host=host, port=port, api_key_file=api_key_file, model_name=model_name,
        dtype=dtype, max_batch=max_batch, max_waiting=max_waiting, max_tokens=max_tokens,
        time_limit=time_limit, prefix_cache=prefix_cache, settings=settings, ready=typer.echo,
    )  # fmt: skip
