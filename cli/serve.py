"""`ar2diff serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import Dtype, quiet


def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers written together.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait.")] = 256,
    model_name: Annotated[
        str | None, typer.Option(help="Name under which clients know it.")
    ] = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve a model to OpenAI's clients, with a page to try it.

    Example: ar2diff serve runs/demo --port 8000
    """
    quiet()
    from ..serve.server import serve as run

    run(
        model,
        host=host,
        port=port,
        dtype=dtype,
        name=model_name,
        max_batch=max_batch,
        max_waiting=max_waiting,
    )
