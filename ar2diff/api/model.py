"""A loaded checkpoint in Python, which generates, streams, fills gaps, chats and evaluates."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError, option
from ..core.spec import Spec
from ..evaluation.evaluate import Evaluation, evaluate
from ..generation.chat import complete_chat
from ..generation.complete import complete, complete_all, infill
from ..generation.complete import load as load_checkpoint
from ..generation.results import Completion
from ..generation.tokens import opened
from ..generation.writing import stream


class DiffusionModel:
    """A model with its tokenizer, as `load` returns it.

    Attributes:
        checkpoint: the checkpoint, as the lower layers take it.

    Every method takes the options of `ar2diff generate` as keywords: `mode`, `max_new_tokens`,
    `threshold`, `temperature`, `seed` and so on. An unconverted model only has the mode `ar`.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def __repr__(self) -> str:
        spec = self.spec
        kind = f"{spec.attention}, blocks of {spec.block_length}" if spec else "not converted"
        name = type(self.model).__name__
        return f"DiffusionModel({str(self.checkpoint.path)!r}, {name}, {kind})"

    @property
    def model(self) -> Any:
        """The stock transformers model or, for an adapter, the PEFT model around it."""
        return self.checkpoint.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, which knows the mask token."""
        return self.checkpoint.tokenizer

    @property
    def spec(self) -> Spec | None:
        """What a logit means, according to config.json; None for an unconverted model."""
        return self.checkpoint.spec

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: Sequence[Any] | None = None,
        batch_size: int = 8,
        progress: Callable[[], None] | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Complete a prompt, or several.

        Args:
            prompt: a text, or a sequence of texts. `{mask:N}` in a text is a gap of N tokens to
                fill.
            images: what stands at each `{image}` of a text, or before a text without any: files,
                bytes, data URIs or images of PIL. For a sequence of texts, as many sequences.
            batch_size: number of prompts decoded together, which does not change the results.
            progress: called after each prompt.

        Returns:
            One result for a text; for a sequence, a list of results in the same order.

        Raises:
            Ar2DiffError: an option is wrong, or a prompt is too long.
        """
        several = not isinstance(prompt, str)
        prompts = list(prompt) if several else [prompt]
        given = list(images or ())
        seen = given if several else [given]
        if several and given and len(given) != len(prompts):
            raise Ar2DiffError(
                f"{option('images')} has {len(given)} entries for {len(prompts)} prompts",
                "give one sequence of images for each prompt, which may be empty",
            )
        found: dict[int, Completion] = {}
        for number, completion in complete_all(
            self.checkpoint, prompts, images=seen, batch_size=batch_size, **options
        ):
            found[number] = completion
            if progress is not None:
                progress()
        return [found[number] for number in range(len(prompts))] if several else found[0]

    def stream(
        self, prompt: str, *, images: Sequence[Any] = (), **options: Any
    ) -> Generator[str, None, Completion]:
        """Complete a prompt, yielding pieces of text as soon as everything before them is decided.
        Concatenated, the pieces are the prompt and its completion.

        Args:
            images: as of `generate`, for a text.

        Returns:
            The result, for callers that drive the generator themselves (`StopIteration.value`).
        """
        for text, result in stream(self.checkpoint, prompt, images=images, **options):
            if text:
                yield text
            if result is not None:
                return result

    def infill(
        self,
        prefix: str,
        suffix: str = "",
        *,
        length: int | Sequence[int],
        images: Sequence[Any] = (),
        **options: Any,
    ) -> Completion:
        """Fill the gap between two texts.

        Args:
            length: tokens in the gap. Of several lengths, the one with the likeliest text is
                chosen, and the result has all of them in `candidates`.
            images: as of `generate`, in prefix and suffix.
        """
        lengths = [length] if isinstance(length, int) else list(length)
        return infill(self.checkpoint, prefix, suffix, lengths, images=images, **options)

    def revise(self, text: str, *parts: str, **options: Any) -> Completion:
        """Write parts of a text anew, each in as many tokens as it has, reading what stands on both
        sides.

        Args:
            parts: texts that occur in `text` once.
        """
        return complete(self.checkpoint, opened(self.tokenizer, text, parts), **options)

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> Completion:
        """Answer a conversation, using the tokenizer's chat template.

        Args:
            messages: dictionaries with `role` and `content`; the last message is the user's. A
                content may be a list of parts: `{"type": "text", "text": ...}` and
                `{"type": "image", "image": ...}`, an image as of `generate`.
        """
        return complete_chat(self.checkpoint, messages, **options)

    def evaluate(self, data: str | Path | Sequence[str], **options: Any) -> Evaluation:
        """Likelihood on held-out text. Arguments and result are those of `ar2diff.evaluate`.

        Args:
            data: a file of rows, or texts.
        """
        return evaluate(self.checkpoint, data, **options)


def load(model: str | Path, dtype: str = "stored") -> DiffusionModel:
    """Load a model, or an adapter on its base, on the accelerator if there is one.

    Args:
        model: a folder, or a Hub id with an optional `@revision`. An unconverted model only has its
            AR mode.
        dtype: type of the weights in memory: `stored`; `auto` for the stored one on a GPU and
            float32 on a CPU; or float32, bfloat16 or float16.

    Raises:
        Ar2DiffError: the model does not exist, is damaged, or does not do what its config says.
    """
    return DiffusionModel(load_checkpoint(str(model), dtype))
