"""A model's decoder through torch.compile, for forwards whose shapes recur.

The steps of decoding have few shapes: a block, a block behind the one before it, a token, a fixed
number of candidates. With a static cache, whose width is rounded up, they recur from call to call.
On a GPU such a forward is replayed as a CUDA graph, with one launch; on a CPU its operations are
fused; on other devices, the decoder is called as it is. Prompts are read by the plain model, and so
is the head, which sees another number of slots at each step.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .errors import Ar2DiffError, first_line, option
from .forward import rope_switches

DEVICES = ("cuda", "cpu")  # where graphs are compiled
LEAST_COLUMNS = 128  # of a static cache
MOST_GRAPHS = 64  # of a model: shapes of a step, times numbers of rows, times widths of a cache
LOCK = Lock()
DECODERS: WeakKeyDictionary[Any, _Decoder] = WeakKeyDictionary()


def rounded(columns: int) -> int:
    """The width of a static cache for so many columns: a power of two, so that prompts of unlike
    length share their graphs."""
    return max(LEAST_COLUMNS, 1 << (columns - 1).bit_length())


def check_compiles(model: Any) -> None:
    """Refuse a model whose forwards cannot be compiled, before anything is computed.

    Raises:
        Ar2DiffError: it is spread over several devices, quantized by a method that does not allow
            it, or its rotary factors depend on the length of the text.
    """
    why = None
    if rope_switches(model.config):
        why = "whose rotary factors change with the length of the text"
    elif len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        why = "that is spread over several devices"
    elif not getattr(getattr(model, "hf_quantizer", None), "is_compileable", True):
        why = "that is quantized by this method"
    if why is not None:
        raise Ar2DiffError(
            f"{option('compile')} does not work with a model {why}",
            f"leave out {option('compile')}",
        )


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """In the model's forwards by this thread, until the end of the `with`, the decoder is the
    compiled one.

    Raises:
        Ar2DiffError: in the first forward of a shape, if it cannot be compiled.
    """
    with LOCK:
        decoder = DECODERS.get(model)
        if decoder is None or decoder.kind != model.device.type:
            decoder = DECODERS[model] = _Decoder(model)
    with decoder.installed():
        yield


class _Decoder:
    """The plain and the compiled forward of a model's decoder, and the threads that want the
    latter."""

    def __init__(self, model: Any):
        self.module, self.kind = model.get_decoder(), model.device.type
        self.plain = self.module.forward
        self.fast = _graphs_of(self.plain) if self.kind in DEVICES else self.plain
        # CUDA graphs are replayed by the thread that captured them; others use the plain forward.
        self.owner = get_ident() if self.kind == "cuda" else None
        self.threads: set[int] = set()
        self.before: Callable[..., Any] | None = None  # the module's own `forward`, if it has one

    @contextmanager
    def installed(self) -> Iterator[None]:
        own = get_ident()
        if self.owner not in (None, own):
            yield
            return
        held = vars(self.module)
        with LOCK:
            if not self.threads:
                self.before = held.get("forward")
                held["forward"] = self._forward
            self.threads.add(own)
        try:
            yield
        finally:
            with LOCK:
                self.threads.discard(own)
                if not self.threads:
                    held.pop("forward")
                    held |= {} if self.before is None else {"forward": self.before}

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.fast if get_ident() in self.threads else self.plain
        return forward(*args, **kwargs)


def _graphs_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is compiled for each shape that it sees."""
    graphs = torch.compile(forward, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def called(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # nothing of the last step is read any more
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                return graphs(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            return forward(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise Ar2DiffError(
                f"{option('compile')}: the model cannot be compiled ({first_line(error)})",
                f"leave out {option('compile')}",
            ) from error

    return called
