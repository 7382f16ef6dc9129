"""A loaded checkpoint in Python: it generates, streams, fills gaps, chats and evaluates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint
from ..core.generate import check_model
from ..core.spec import Spec
from ..evaluation.score import Evaluation, evaluate
from ..generation.chat import complete_chat
from ..generation.complete import Completion, complete_all, infill, stream


class DiffusionModel:
    """A model with its tokenizer, as `load` returns it.

    Every method takes the options of `ar2diff generate` as keywords: `mode`, `max_new_tokens`,
    `threshold`, `temperature`, `seed` and so on. An unconverted model has the mode `ar` alone.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __repr__(self) -> str:
        spec = self.spec
        kind = f"{spec.attention}, blocks of {spec.block_length}" if spec else "not converted"
        name = type(self.model).__name__
        return f"DiffusionModel({str(self._checkpoint.path)!r}, {name}, {kind})"

    @property
    def model(self) -> Any:
        """The stock transformers model; of an adapter, the PEFT model around it."""
        return self._checkpoint.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, which knows the mask token."""
        return self._checkpoint.tokenizer

    @property
    def spec(self) -> Spec | None:
        """What a logit means, as config.json says; None of a model that is not converted."""
        return self._checkpoint.spec

    def generate(
        self, prompt: str | Sequence[str], *, batch_size: int = 8, **options: Any
    ) -> Completion | list[Completion]:
        """Complete a prompt, or several.

        Args:
            prompt: a text, or a sequence of texts. `{mask:N}` in one is a gap of N tokens to fill.
            batch_size: prompts that are decoded together; it changes no result.

        Returns:
            One result for a text, a list in the order of the prompts for a sequence.

        Raises:
            Ar2DiffError: an option is wrong, or a prompt does not fit.
        """
        several = not isinstance(prompt, str)
        prompts = list(prompt) if several else [prompt]
        found = dict(complete_all(self._checkpoint, prompts, batch_size=batch_size, **options))
        return [found[number] for number in range(len(prompts))] if several else found[0]

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Complete a prompt, yielding pieces of text as soon as everything before them is decided.
        The pieces together are the prompt and its completion."""
        for text, _ in stream(self._checkpoint, prompt, **options):
            if text:
                yield text

    def infill(
        self, prefix: str, suffix: str = "", *, length: int | Sequence[int], **options: Any
    ) -> Completion:
        """Fill the gap between two texts.

        Args:
            length: tokens of the gap; of several lengths, the one with the likeliest text is taken,
                and `candidates` of the result holds all of them.
        """
        lengths = [length] if isinstance(length, int) else list(length)
        return infill(self._checkpoint, prefix, suffix, lengths, **options)

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> Completion:
        """Answer a conversation by the tokenizer's chat template.

        Args:
            messages: dictionaries with `role` and `content`, the last one of the user.
        """
        return complete_chat(self._checkpoint, messages, **options)

    def evaluate(self, data: str | Path | Sequence[str], **options: Any) -> Evaluation:
        """Likelihood on held-out text; arguments and result are those of `ar2diff.evaluate`.

        Args:
            data: a file of rows, or texts.
        """
        return evaluate(self._checkpoint, data, **options)


def load(model: str | Path, dtype: str = "auto") -> DiffusionModel:
    """Load a model, or an adapter on its base, on the accelerator if there is one.

    Args:
        model: a folder, or a Hub id with an optional `@revision`; a model that is not converted has
            its AR mode.
        dtype: of the weights in memory: `auto` is the stored one, or float32, bfloat16, float16.

    Raises:
        Ar2DiffError: there is no such model, it is damaged, or it does not do what its config says.
    """
    checkpoint = load_checkpoint(str(model), device="auto", dtype=dtype)
    if checkpoint.spec is not None:
        check_model(checkpoint.model, checkpoint.spec)
    return DiffusionModel(checkpoint)
