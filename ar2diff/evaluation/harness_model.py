"""A model as lm-evaluation-harness knows it before any request: loaded, at a setting, with its
tokens. Importing this file needs the extra `eval`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jinja2.exceptions import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import resolve_max_length

from ..checkpoint.model import Checkpoint, count_parameters
from ..config.section import MOST_SAMPLES
from ..core.errors import Ar2DiffError, option, shortened
from ..core.options import MODES
from ..diffusion.estimate import Estimate
from ..generation.complete import load, settings_of
from ..generation.tokens import closing_tokens

AUTO_BATCH = 16  # rows of a batch where --batch_size is auto


class LoadedModel(TemplateLM):
    """A model that `Harness` scores with and writes with.

    Attributes:
        checkpoint: the loaded checkpoint.
        settings: options of the sampler that were set, by name.
        options: all of them, as they hold for every request but for its length and stop strings.
        exact: whether log-likelihoods are those of the AR mode; otherwise they are minus bounds.
        bounds: without `exact`, the estimate behind each (context, continuation), or (text,), that
            was scored.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | Checkpoint,
        *,
        samples: int = 8,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ):
        """Load a model for the harness.

        Args:
            pretrained: folder or Hub id of a model, converted or not, of an adapter or of a draft
                adapter; or a loaded checkpoint.
            samples: masked copies of each text from which its bound is estimated.
            seed: of these, and of sampling.
            batch_size: rows per forward; `auto` takes at most `max_batch_size`.
            max_length: longest row in tokens, if less than the model's context.
            device: `cpu`, or the accelerator if there is one.
            dtype, revision: of the weights, for a model that is not loaded yet.
            settings: options of `ar2diff generate` by their names in Python.

        Raises:
            Ar2DiffError: the model does not load, or cannot do what the options ask for.
        """
        super().__init__()
        if trust_remote_code:
            raise Ar2DiffError(
                f"{option('trust_remote_code')} is set, but ar2diff never runs code from a model's "
                "folder",
                f"leave out {option('trust_remote_code')}",
            )
        if not isinstance(samples, int) or not 1 <= samples <= MOST_SAMPLES:
            raise Ar2DiffError(
                f"{option('samples')} is {shortened(samples)}",
                f"set it to an integer from 1 to {MOST_SAMPLES}",
            )
        if not isinstance(pretrained, Checkpoint):
            at = "" if revision in (None, "main") else f"@{revision}"
            pretrained = load(f"{pretrained}{at}", dtype, None if device == "cpu" else "auto")
        self.checkpoint, self.samples, self.seed = pretrained, samples, seed
        self.tokenizer = pretrained.tokenizer
        self._closing = closing_tokens(self.tokenizer)
        self.settings = {"seed": seed, **settings}
        if pretrained.spec is None and pretrained.draft is None:
            self.settings.setdefault("mode", "ar")
        spec, self.options = settings_of(pretrained, self.settings)
        self.spec = replace(spec, block_length=self.options.block_length)
        self.exact = self.options.mode in MODES[1:]
        self.max_length = max_length or resolve_max_length(pretrained.model.config, self.tokenizer)
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.bounds: dict[tuple[str, ...], Estimate] = {}

    # What the harness asks a model about itself

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name under which requests can be cached."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text; without its system message if the template has no place for
        one."""
        settings = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **settings)
        except TemplateError:
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **settings)

    def get_model_info(self) -> dict[str, Any]:
        """What a results file should say about the model and about how it was scored."""
        spec = self.checkpoint.spec
        return {
            "model_num_parameters": count_parameters(self.checkpoint)[1],
            "model_dtype": str(self.checkpoint.model.dtype),
            "model_revision": self.checkpoint.commit,
            "mode": self.options.mode,
            "bound": not self.exact,
            "samples": None if self.exact else self.samples,
            "attention": spec.attention if spec else "causal",
            "block_length": self.options.block_length,
            "settings": self.settings,
        }

    # Tokens

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, with the tokenizer's BOS unless the text begins with one or
        `add_special_tokens` is False, and without an EOS."""
        if add_special_tokens is None:
            own = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not (own and string.startswith(own))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids[: len(ids) - self._closing] if add_special_tokens else ids


def _batch_size(asked: int | str | None, most: int | None) -> int:
    """Rows per forward."""
    if asked is None or str(asked).startswith("auto"):
        return most or AUTO_BATCH
    if not str(asked).isdecimal() or int(asked) < 1:
        raise Ar2DiffError(
            f"{option('batch_size')} {shortened(asked)} is not a number of rows",
            f"set {option('batch_size')} to an integer of 1 or more, or to auto",
        )
    return int(asked)
