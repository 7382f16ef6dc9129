"""The model `ar2diff` of lm-evaluation-harness: a converted model, an adapter, a draft adapter or
an unconverted base, decoded and scored at a setting that its arguments name.

Importing this file needs the extra `eval`. In a mode that writes the AR mode's text (`ar`,
`speculative`), log-likelihoods are exact. In mode `diffusion` they are minus the upper bound of
`diffusion.likelihood`, an estimate from masked copies, and `bounds` has the error of each; the
harness calls both "loglikelihood".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..core.errors import Ar2DiffError, option
from ..core.generate import room_of
from ..core.options import Options
from ..diffusion.estimate import Estimate, total_of
from ..diffusion.likelihood import ar_nll, bound
from ..generation.complete import decode_rows, infill, settings_of
from .harness_model import LoadedModel

MAX_GEN_TOKS = 256  # where neither the task nor the settings say, as in the harness's own models
GAP = re.compile(r"\{mask:(\d+(?:,\d+)*)\}")  # in a prompt, with the lengths to try

# A request to score: what it is cached under, the ids of the context and those of what follows.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


class Harness(LoadedModel):
    """A model that lm-evaluation-harness can evaluate; arguments and attributes are those of
    `LoadedModel`."""

    # Scoring

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations given contexts, without bars where nobody sees them."""
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy decoding writes them; for bounds,
        minus the bound and False."""
        answers = []
        for (key, *_), found in zip(requests, self._score(requests, disable_tqdm), strict=True):
            greedy = found.greedy is not None and bool(found.greedy.all())
            answers.append((-found.nats.item(), greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[-1])
                self._keep(key, found)
        return answers

    def _score(self, requests: list[Scored], disable_tqdm: bool) -> list[Estimate]:
        """An estimate of each continuation; the longest rows are read first."""
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1] + requests[n][2]))
        found: dict[int, Estimate] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Scoring") as bar:
            for first in range(0, len(order), self.batch_size):
                part = order[first : first + self.batch_size]
                batch = self.estimate([requests[number][1:] for number in part])
                found |= {number: batch.row(place) for place, number in enumerate(part)}
                bar.update(len(part))
        return [found[number] for number in range(len(requests))]

    def _keep(self, key: tuple[str, ...], found: Estimate) -> None:
        if not self.exact:
            self.bounds[key] = found

    def estimate(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Estimate:
        """Likelihoods of continuations given contexts, in token ids, read in one batch. The
        rightmost tokens count: a row that is too long loses the beginning of its context.

        Raises:
            Ar2DiffError: a continuation is empty, or does not fit into the model's context.
        """
        most = self.max_length + self.exact  # the last token is predicted, but not read
        rows, starts = [], []
        for context, continuation in pairs:
            if not 0 < len(continuation) < most:
                raise Ar2DiffError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: it must have "
                    f"at least 1, and at most {most - 1}",
                    "use other answers, or a model with a longer context",
                )
            row = ((context or [self.prefix_token_id]) + continuation)[-most:]
            rows.append(row)
            starts.append(len(row) - len(continuation))
        model, suppressed = self.checkpoint.model, self.checkpoint.suppressed
        if self.exact:
            window = self.checkpoint.spec_or_causal.local_window
            return ar_nll(model, rows, suppressed, window, self.batch_size, starts)
        size = max(self.batch_size, self.samples)
        return bound(model, self.spec, rows, suppressed, self.samples, self.seed, size, starts)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, cut into windows that do not overlap; each window sees
        the token before it."""
        longest = self.max_length - (not self.exact)  # a bound reads that token in the same row
        windows: list[Scored] = []
        ends = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, longest, 1):
                windows.append((None, *make_disjoint_window(pair)))
            ends.append(len(windows))
        scored, answers = self._score(windows, disable_tqdm), []
        for request, first, end in zip(requests, [0, *ends], ends, strict=False):
            found = total_of(scored[first:end])
            answers.append(-found.nats.item())
            self._keep(request.args, found)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    # Writing

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before its first stop string.

        A context with a gap, `{mask:8}` or `{mask:4,8}` with several lengths to try, is filled
        in mode diffusion; the answer is then the whole text of the gap. The other modes, which
        write from left to right, continue what stands before the gap.
        """
        ordered = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        answers: list[str] = []
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Writing") as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                until, settings = self._asked(batch[0][1])
                texts = self._write([context for context, _ in batch], settings, until)
                for args, text in zip(batch, texts, strict=True):
                    answers.append(text)
                    self.cache_hook.add_partial("generate_until", args, text)
                bar.update(len(batch))
        return ordered.get_original(answers)

    def _asked(self, given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """The stop strings of a request, and the settings of the sampler: the model's own come
        before what the task says."""
        asked = dict(normalize_gen_kwargs(given, MAX_GEN_TOKS))
        end = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(asked.pop("until"), end)
        asked["max_new_tokens"] = asked.pop("max_gen_toks")
        if not asked.pop("do_sample") or not asked.get("temperature"):
            asked.pop("temperature", None)
        asked["stop_strings"] = [text for text in until if text and text != end]
        return until, {**asked, **self.settings}

    def _write(
        self, contexts: Sequence[str], settings: dict[str, Any], until: list[str]
    ) -> list[str]:
        """The answers of a batch."""
        spec, options = settings_of(self.checkpoint, settings)
        answers: dict[int, str] = {}
        prompts: dict[int, list[int]] = {}
        for place, context in enumerate(contexts):
            gap = GAP.search(context)
            if gap is not None and options.mode == "diffusion":
                answers[place] = self._fill(context, gap, settings)
            else:
                text = context[: gap.start()].rstrip(" ") if gap else context
                prompts[place] = self._prompt(text, options)
        rows = list(prompts.values())
        results = decode_rows(self.checkpoint, spec, options, rows) if rows else []
        for place, result in zip(prompts, results, strict=True):
            text = self.tokenizer.decode(result.token_ids, skip_special_tokens=True)
            answers[place] = postprocess_generated_text(text, until, None)
        return [answers[place] for place in range(len(contexts))]

    def _prompt(self, context: str, options: Options) -> list[int]:
        """Ids of a context without its beginning, if that has no room beside the answer."""
        room = self._room(options) - options.max_new_tokens
        if room < 1:
            raise Ar2DiffError(
                f"answers of {options.max_new_tokens} tokens leave no room for a prompt in a "
                f"context of {self._room(options)}",
                "lower max_gen_toks of the task (lm_eval: --gen_kwargs max_gen_toks=N), or set "
                f"{option('max_new_tokens')}",
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return ids[-room:]

    def _room(self, options: Options) -> int:
        """The longest row in tokens, of whole blocks where blocks are denoised."""
        room = room_of(self.checkpoint.model, self.spec, options)
        return self.max_length if room is None else min(room, self.max_length)

    def _fill(self, context: str, gap: re.Match[str], settings: dict[str, Any]) -> str:
        """The text of a gap. Of what stands beside it, as much is read as there is room for."""
        lengths = [int(length) for length in gap[1].split(",")]
        settings = {**settings, "max_new_tokens": 0, "stop_strings": None}
        room = self._room(settings_of(self.checkpoint, settings, gaps=True)[1]) - max(lengths) - 2
        prefix, suffix = context[: gap.start()], context[gap.end() :]
        before, after = self.tok_encode(prefix), self.tok_encode(suffix, False)
        kept = min(len(after), max(room // 2, room - len(before)))
        if len(after) > kept:
            suffix = self.tokenizer.decode(after[:kept], skip_special_tokens=True)
        if len(before) > room - kept:
            prefix = self.tokenizer.decode(before[kept - room :], skip_special_tokens=True)
        return infill(self.checkpoint, prefix, suffix, lengths, **settings).filled[0]
