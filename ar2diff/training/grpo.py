"""Diffusion-GRPO: trl's GRPOTrainer with our own rollouts and log-probabilities. Advantages,
ratios, clipping, KL, rewards, reference models and logs come from trl."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers.trainer_utils import PredictionOutput
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..core.draft import Draft
from ..core.errors import Ar2DiffError
from ..core.images import prepare
from ..core.seeds import content_key, keyed_generator
from ..data.parts import PLACEHOLDER
from ..data.rows import as_dataset
from ..distributed.sharding import join_deepspeed
from .base import Running
from .constraint import barred_tokens
from .estimators import score
from .modules import unwrapped
from .pictures import Pictures
from .prompts import IMAGES, coded_ids, with_placeholders
from .rollouts import Rollout, sample, sampler_settings
from .wording import WIDTH

PROMPT = 24  # characters of a prompt's end beside a sample
STATE = "rollouts-{}"  # name of the files that a rank adds to a checkpoint


class DiffusionGRPOTrainer(Running, GRPOTrainer):
    """Group-relative policy optimization of a converted model or, with `objective.kind: ar`, of an
    AR model as a control.

    Args:
        rows: rows with `prompt` (a text or messages) and the columns that the rewards read; those
            with images as of `Prompts.of`.
        rewards: functions with the signature that trl expects, or reward models.
        draft: the draft adapter that rollouts are written with. The model moves away from the one
            that it was trained for, which only costs acceptance: its drafts are verified.
    """

    figures: ClassVar[dict[str, str]] = {
        "reward": "reward {:.3f}", "stop_rate": "stopped {:.0%}", "kl": "KL {:.4f}",
        "entropy": "entropy {:.2f}",
    }  # fmt: skip

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        args: GRPOConfig,
        rows: Dataset,
        rewards: list[Any],
        draft: Draft | None = None,
        **kwargs: Any,
    ):
        self.draft = None if draft is None else draft.to(args.device)
        self.suppressed = checkpoint.suppressed
        self.suppressed[list(recipe.rl.sampler.get("suppress_tokens") or ())] = True
        self.suppressed = self.suppressed.to(args.device)
        self._rollouts: list[Rollout] = []  # the ones to be scored next
        self._good: Tensor | None = None  # [B], for spg
        self._updates = range(0)  # those that rollouts are scored for; none: for the next alone
        self._live: Tensor | None = None  # [B], the rows that can contribute a gradient; None: all
        self._generation_seconds = 0.0
        self._pictures = Pictures(checkpoint)
        self._keys: list[list[int]] = []  # of the images of the prompts that are completed next
        if recipe.rl.fewer_forwards:
            rewards = [*rewards, self.fewer_forwards]
        join_deepspeed(args)  # before the reference model is loaded
        super().__init__(
            checkpoint, recipe, args, reward_funcs=rewards, train_dataset=rows,
            processing_class=checkpoint.tokenizer, **kwargs,
        )  # fmt: skip
        ends = recipe.rl.sampler.get("eos_token_id") or checkpoint.end_ids
        self.eos_token_ids = [ends] if isinstance(ends, int) else list(ends)
        # DeepSpeed's engine, which wraps the model, has a `config` of its own.
        reference = getattr(self.ref_model, "module", self.ref_model)
        check_reference(reference, checkpoint)
        if reference is not None:
            prepare(reference)

    # Rollouts

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], None]:
        start, coded = time.perf_counter(), multimodal_fields["coded"]
        first = self.accelerator.process_index * len(prompt_ids)
        key = (self.args.seed, self._step, int(self.model.training))
        # Keyed by the place in the global batch, so neither ranks nor shuffling change the noise.
        seeds = [content_key([*key, first + n]) % 2**62 for n in range(len(prompt_ids))]
        rl, settings = self.recipe.rl, sampler_settings(self.recipe.rl)
        training = self.model.training
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ),
            torch.no_grad(),
            self.accelerator.autocast(),  # in the precision in which they are scored
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            self.checkpoint.model.eval()
            try:
                self._pictures.hold(list(map(torch.tensor, coded)))
                self._rollouts = sample(
                    self._writer, coded, seeds, settings, rl.rollout_batch_size, self._pictures
                )
            finally:
                self.checkpoint.model.train(training)
        self._note_rollouts(time.perf_counter() - start)
        return [rollout.answer_ids for rollout in self._rollouts], None

    @property
    def _writer(self) -> Checkpoint:
        """What writes completions: the model, with a draft adapter beside it if there is one."""
        if self.draft is None:
            return self.checkpoint
        return replace(self.checkpoint, model=unwrapped(self.checkpoint.model), draft=self.draft)

    def _note_rollouts(self, seconds: float) -> None:
        metrics = self._metrics[self._mode]
        ends = [r.answer_ids[-1] in self.eos_token_ids for r in self._rollouts]
        rates = [r.answer / r.forwards for r in self._rollouts]
        both = torch.tensor([[sum(ends), sum(rates)]], device=self.accelerator.device)
        stops, rate = (self.accelerator.gather(both).sum(0) / len(ends)).tolist()
        world = self.accelerator.num_processes
        metrics["stop_rate"].append(stops / world)
        metrics["tokens_per_forward"].append(rate / world)
        self._generation_seconds += seconds

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Tokenize prompts as `generate` does; trl would keep an EOS that the tokenizer appends,
        and read images itself. It gets placeholders, and hands on what holds their codes."""
        keys = self._keys or [[]] * len(prompts)
        coded = [coded_ids(self.checkpoint, *pair) for pair in zip(prompts, keys, strict=True)]
        return [with_placeholders(self.checkpoint, ids) for ids in coded], None, {"coded": coded}

    # Rewards

    def fewer_forwards(self, completions: list[Any], **_: Any) -> list[float]:
        """The share of forwards that each of the latest completions saved: 1 - forwards / tokens,
        which is 0 where every token took one (on-policy reduction of steps, Seed Diffusion, Song et
        al. 2025, which divides by the mean edit distance of states instead)."""
        return [1 - rollout.forwards / rollout.answer for rollout in self._rollouts]

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> Tensor:
        """[B, F] rewards, of functions that may read the images of the prompts; a completion that
        is not right gets none for being written fast."""
        if (album := self.checkpoint.album) is not None:
            shots = ([album.shots.shots[key] for key in keys] for keys in self._keys)
            inputs = [row | {IMAGES: own} for row, own in zip(inputs, shots, strict=True)]
        rewards = super()._calculate_rewards(inputs, *args)
        if self.recipe.rl.fewer_forwards:
            right = (rewards[:, :-1] >= 1).all(1)  # NaN, a reward that does not apply, is not
            rewards[:, -1] *= right
        return rewards

    # Scores

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, C] log-probabilities of `self._rollouts` by the recipe's estimator. Each rollout is
        scored on its own canvas with the noise of its seed, which the old, new and reference policy
        share. Before the updates, of an estimator that scores a rollout in another way in each:
        [B, U, C]."""
        if self._updates:
            rollouts, each = self._rollouts, []
            for update in self._updates:
                self._rollouts = [replace(rollout, update=update) for rollout in rollouts]
                each.append(self._scores(model, attention_mask, logits_to_keep, batch_size)[0])
            self._rollouts = rollouts
            return torch.stack(each, 1), None, None
        found, entropy = self._scores(
            model, attention_mask, logits_to_keep, batch_size, compute_entropy
        )
        return found, entropy if compute_entropy else None, None

    def _scores(
        self,
        model: Any,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None,
        compute_entropy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """[B, C] log-probabilities and entropies of `self._rollouts`."""
        live = (
            torch.ones(len(attention_mask), dtype=torch.bool) if self._live is None else self._live
        )
        numbers = live.nonzero()[:, 0]
        logps, entropies = [], []
        for rows in numbers.split(batch_size or len(attention_mask)):
            rollouts, rl = [self._rollouts[row] for row in rows], self.recipe.rl
            barred = barred_tokens(self._writer, rl, rollouts, self.suppressed)
            seen = [rollout.ids for rollout in rollouts]
            with self.accelerator.autocast():
                scores = score(
                    model, rollouts, rl, self.spec, barred,
                    self.accelerator.unwrap_model(model), logits_to_keep,
                    self._pictures.of(seen, self._buffered_inputs or ()),
                )  # fmt: skip
            logps.append(scores.per_token(None if self._good is None else self._good[rows]))
            entropies.append(scores.entropies())
            if compute_entropy:
                spread = self.accelerator.gather(scores.spread().detach().mean()).mean().item()
                self._metrics[self._mode]["estimator_spread"].append(spread)
        self._logps, entropy = torch.cat(logps), torch.cat(entropies)
        if not live.all():
            seen = attention_mask[numbers, -logits_to_keep:]
            mean = (entropy * seen).sum() / seen.sum().clamp(min=1)  # trl averages over the same
            whole = self._logps.new_zeros(len(live), logits_to_keep)
            self._logps = whole.index_put((numbers,), self._logps)
            entropy = (whole + mean).index_put((numbers,), entropy)
        return self._logps, entropy

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._good = None
        # trl would put what it calls images into the prompts, and into the forward.
        self._keys = [row.get(IMAGES) or [] for row in inputs]
        if self.recipe.rl.estimator == "unigrpo":
            self._updates = range(self.num_iterations if self._mode == "train" else 1)
        try:
            output = super()._generate_and_score_completions(
                [{name: x for name, x in row.items() if name != IMAGES} for row in inputs]
            )
        finally:
            self._updates = range(0)
        rollouts = self._rollouts
        length = max(len(r.ids) for r in rollouts)
        canvas = torch.zeros(len(rollouts), 2, length, dtype=torch.long)
        for row, rollout in enumerate(rollouts):
            canvas[row, :, : len(rollout.ids)] = torch.stack([rollout.ids, rollout.step])
        numbers = [[len(r.ids), r.prompt, r.answer, r.seed] for r in rollouts]
        output["canvas"], output["canvas_of"] = canvas, torch.tensor(numbers)
        # On the CPU, so that no micro-step has to wait for it.
        live = (output["advantages"] != 0) & output["completion_mask"].any(1)
        output["live"] = live.cpu()
        if self.recipe.rl.estimator == "spg":
            output.pop("old_per_token_logps", None)  # spg has no ratio
        return output

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The policy loss on a batch of completions.

        Returns:
            The loss; with `return_outputs` also a dict of [B, C] `completion_ids`,
            `completion_mask` and `logps`, the estimates of their log-probabilities (0 for a row
            whose advantage is 0, which does not affect the loss), and with `advantages` [B].
        """
        loss = self._compute_loss(model, inputs)
        if not return_outputs:
            return loss
        names = ("completion_ids", "completion_mask", "advantages")
        return loss, {"logps": self._logps} | {name: inputs[name] for name in names}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        rl, inputs = self.recipe.rl, dict(inputs)
        self._rollouts = rollouts_of(inputs.pop("canvas"), inputs.pop("canvas_of"))
        live = inputs.pop("live").cpu()
        if rl.estimator == "unigrpo":
            inputs |= self._of_update(inputs)
        self._good = inputs["advantages"] > 0 if rl.estimator == "spg" else None
        if not self.beta:
            return self._loss_of_live_rows(model, inputs, live)
        if rl.kl == "k3":
            return super()._compute_loss(model, inputs)
        beta, self.beta = self.beta, 0.0
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        steps = self.current_gradient_accumulation_steps if self._mode == "train" else 1
        return loss + beta * self._squared_kl(inputs) / steps

    def _of_update(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The scores [B, C] of the old and the reference policy for the update that is being made,
        out of those for each [B, U, C]; the rollouts will be scored for it, too."""
        update = 0
        if self._mode == "train":
            update = self._step // self.args.steps_per_generation % self.num_iterations
        self._rollouts = [replace(rollout, update=update) for rollout in self._rollouts]
        names = ("old_per_token_logps", "ref_per_token_logps")
        return {n: inputs[n][:, update] for n in names if inputs.get(n) is not None}

    def _loss_of_live_rows(self, model: Any, inputs: dict[str, Any], live: Tensor) -> Tensor:
        """The loss of trl, skipping rows whose advantage is zero, which do not contribute to it.

        Args:
            live: [B] bool, the other rows.
        """
        self._live = live.clone()
        self._live[0] |= ~live.any()  # every rank must take part in the forward pass
        if "old_per_token_logps" in inputs:
            seen = (inputs["advantages"] != 0) & inputs["completion_mask"].any(1)
            seen[0] |= ~seen.any()
            inputs["old_per_token_logps"] = inputs["old_per_token_logps"] * seen[:, None]
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._live = None

    def _squared_kl(self, inputs: dict[str, Any]) -> Tensor:
        """(log p - log p_ref)^2 / 2 for whole sequences, divided by their lengths (ESPO, eq.
        13)."""
        mask = inputs["completion_mask"]
        difference = ((self._logps - inputs["ref_per_token_logps"]) * mask).sum(1)
        kl = (difference.square() / 2 / mask.sum(1).clamp(min=1)).mean()
        self._metrics[self._mode]["kl"].append(self.accelerator.gather(kl.detach()).mean().item())
        return kl

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Run trl's evaluation on our completions, `rl.num_generations` for each prompt:
        `eval_loss`, `eval_reward` and the other metrics that training logs.

        Args:
            eval_dataset: a data set or a list of rows with `prompt` and the columns that the
                rewards read; None means the one that was passed to the trainer.
        """
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Complete prompts.

        Returns:
            `predictions` [prompts * rl.num_generations, C], the ids of the completions padded with
            -100; `label_ids`, None; `metrics`, as from `evaluate`.
        """
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        for name, values in self._metrics["eval"].items():
            output.metrics[f"{metric_key_prefix}_{name}"] = sum(values) / len(values)
        self._metrics["eval"].clear()
        return output

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, None]:
        """The loss and the completion ids for a batch of prompts."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).mean().detach()
        if prediction_loss_only:
            return loss, None, None
        unwritten = inputs["completion_mask"] == 0
        return loss, inputs["completion_ids"].masked_fill(unwritten, -100), None

    def _get_dataloader(
        self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        if not is_training:
            # Repeat rows, not indices: accelerate counts rows to find the end of the last batch.
            each = range(self.num_generations_eval)
            dataset = as_dataset(dataset) if isinstance(dataset, list | tuple) else dataset
            dataset = dataset.select([n for n in range(len(dataset)) for _ in each])
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return SequentialSampler(eval_dataset)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # The run

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        rl, args = self.recipe.rl, self.args
        return Groups(
            len(self.train_dataset),
            groups=args.generation_batch_size // rl.num_generations,
            size=rl.num_generations,
            repeats=rl.num_iterations * args.steps_per_generation,
            seed=args.seed,
            generations=-(-args.max_steps * args.gradient_accumulation_steps
                          // (rl.num_iterations * args.steps_per_generation)),
        )  # fmt: skip

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-step, and record what share of the update's time rollouts take."""
        loss = super().training_step(*args, **kwargs)
        if self._current_train_step_time == 0:  # an update is complete
            metrics = self._metrics["train"]
            metrics["generation_share"].append(self._generation_seconds / metrics["step_time"][-1])
            self._generation_seconds = 0.0
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and print some completions when they are due at this step."""
        every = self.recipe.rl.show_steps
        if every and self.state.global_step % every == 0 and self.is_world_process_zero():
            show_completions(self._logs, self.state.global_step)
        super().log(logs, start_time)

    def sample(self) -> str | None:
        """The best of the latest completions, with its reward."""
        logs = self._logs
        rewards = list(zip(*logs["rewards"].values(), strict=True))
        if not rewards:
            return None
        totals = [sum(r for r in row if r is not None and r == r) for row in rewards]  # or NaN
        best = max(range(len(totals)), key=totals.__getitem__)
        prompt, answer = (_text_of(logs[name][best]) for name in ("prompt", "completion"))
        line = f"  reward {totals[best]:.2f} for {prompt[-PROMPT:]!r}: {answer!r}"
        return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing: a training checkpoint has no card."""

    def save_rank(self, folder: Path) -> None:
        """Write the rollouts that this rank is using, and how far it has got with them."""
        name = STATE.format(self.accelerator.process_index)
        batches = self._buffered_inputs or []
        tensors = {}
        for number, batch in enumerate(batches):
            for key, value in batch.items():
                tensors[f"{number}.{key}"] = value.contiguous().clone()
        save_file(tensors, folder / f"{name}.safetensors")
        state = {"step": self._step, "batches": len(batches)}
        (folder / f"{name}.json").write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE.format(self.accelerator.process_index)
        state = json.loads(path.with_suffix(".json").read_text())
        self._step = state["step"]
        batches: list[dict[str, Tensor]] = [{} for _ in range(state["batches"])]
        for name, value in load_file(path.with_suffix(".safetensors")).items():
            number, _, key = name.partition(".")
            batches[int(number)][key] = value.to(self.args.device)
        self._buffered_inputs = batches or None


def rollouts_of(canvas: Tensor, numbers: Tensor) -> list[Rollout]:
    """The rollouts in a batch.

    Args:
        canvas: [B, 2, T] ids and steps. numbers: [B, 4] the lengths of the canvas, prompt and
            answer, and the seed.
    """
    rows = zip(canvas.cpu(), numbers.tolist(), strict=True)
    return [
        Rollout(ids[:length], prompt, answer, step[:length], seed)
        for (ids, step), (length, prompt, answer, seed) in rows
    ]


class Groups(Sampler):
    """Indices of prompts: `groups` of them, each repeated `size` times, and the whole batch
    repeated `repeats` times. They depend on the seed alone and have no epochs, so that a resumed
    run continues where it stopped."""

    def __init__(
        self, rows: int, *, groups: int, size: int, repeats: int, seed: int, generations: int
    ):
        self.rows, self.groups, self.size = rows, groups, size
        self.repeats, self.seed, self.generations = repeats, seed, generations

    def __len__(self) -> int:
        return self.generations * self.groups * self.size * self.repeats

    def __iter__(self) -> Iterator[int]:
        stream = self._stream()
        for _ in range(self.generations):
            chosen = [next(stream) for _ in range(self.groups)]
            for _ in range(self.repeats):
                for index in chosen:
                    yield from [index] * self.size

    def _stream(self) -> Iterator[int]:
        epoch = 0
        while True:
            generator = keyed_generator(self.seed, epoch)
            yield from torch.randperm(self.rows, generator=generator).tolist()
            epoch += 1


def show_completions(logs: dict[str, Any], step: int, count: int = 6) -> None:
    """Print a table of the latest completions and their rewards on stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"step {step}", show_lines=True)
    for name in ("prompt", "completion", *logs["rewards"], "advantage"):
        table.add_column(name)
    rewards = list(logs["rewards"].values())
    rows = list(zip(logs["prompt"], logs["completion"], *rewards, logs["advantages"], strict=True))
    for prompt, completion, *numbers in rows[-count:]:
        texts = map(_text_of, (prompt, completion))
        table.add_row(*map(Text, texts), *(f"{number:.2f}" for number in numbers))
    Console(file=sys.stderr).print(table)


def _text_of(message: Any) -> str:
    """A prompt or completion as text: of a conversation, its last message."""
    content = message if isinstance(message, str) else message[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or PLACEHOLDER for part in content)


def check_reference(reference: Any, checkpoint: Checkpoint) -> None:
    """Refuse a reference policy other than the initial model, such as the AR model it was converted
    from.

    Raises:
        Ar2DiffError: the reference is a different model.
    """
    if reference is None:
        return
    own, other = (
        (getattr(m.config, "diffusion", None), getattr(m.config, "is_causal", None))
        for m in (checkpoint.model, reference)
    )
    if own != other:
        raise Ar2DiffError(
            "the reference model is not the converted model that is being trained",
            "pass the folder of the converted model as the model",
        )
