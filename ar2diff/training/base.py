"""What all our trainers share: checkpoints that are either complete or absent, an orderly end on
SIGTERM, and learning rates by kind of parameter. A mixin over `transformers.Trainer`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PrinterCallback

from ..checkpoint.model import Checkpoint
from ..checkpoint.output import disk_errors, sync
from ..checkpoint.stored import stored_tensors
from ..checkpoint.towers import trains_images
from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError, option
from ..distributed.ranks import STOPPED
from ..distributed.sharding import check_engine
from .callbacks import Stopping
from .modules import disable_dropout, parameter_kinds, unwrapped


class Running:
    """Trains a checkpoint as a recipe says. A mixin, listed before the trainer class.

    `figures` are the logs that matter most: how the line of a step shows each, by its name. It
    shows the first three of those that a run has.

    Args:
        checkpoint: the checkpoint whose model is trained.
        args: training arguments for the trainer class; see `arguments.training_arguments`.
        module: what is trained; None means the checkpoint's model.
        kwargs: other keyword arguments of the trainer class.
    """

    figures: ClassVar[dict[str, str]]
    notes: tuple[str, ...] = ()  # on the data, shown before the first step

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, args: Any, module: Any = None, **kwargs: Any
    ):
        self.checkpoint, self.recipe, self.spec = checkpoint, recipe, checkpoint.spec_or_causal
        self._uncounted: Tensor | None = None  # tokens that `state` does not know of yet
        disable_dropout(checkpoint.model)
        # A batch may hold no image, and then the parts that see images have no gradient.
        args.ddp_find_unused_parameters = trains_images(unwrapped(checkpoint.model))
        with weights_kept(checkpoint.model):
            super().__init__(model=module or checkpoint.model, args=args, **kwargs)
        self.remove_callback(PrinterCallback)  # it writes to stdout, which is for results

    def save_rank(self, folder: Path) -> None:
        """Write what this rank adds to a checkpoint; by default, nothing."""

    def details(self) -> list[str]:
        """Lines that say more of the data, below its size."""
        return []

    def sample(self) -> str | None:
        """A line that shows what the model does now, beside the line of a step; None: there is
        none."""
        return None

    def facts(self) -> dict[str, Any]:
        """What the run's record says about the data, besides the number of tokens."""
        return {}

    def count_tokens(self, tokens: Tensor) -> None:
        """Add the tokens of an optimizer step, a scalar on the device, which is read later: to read
        it now, the host would have to wait for the device."""
        self._uncounted = tokens if self._uncounted is None else self._uncounted + tokens

    def tokens_seen(self) -> int:
        """The number of tokens trained on so far, over all ranks."""
        if self._uncounted is not None:
            self.state.num_input_tokens_seen += int(self._uncounted)
            self._uncounted = None
        return self.state.num_input_tokens_seen

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and end the run if the loss is not a number.

        Raises:
            Ar2DiffError: it is not, and neither are the weights after such a step.
        """
        super().log(logs, start_time)
        self._check_loss(logs.get("loss", 0.0))

    def _check_loss(self, loss: float) -> None:
        if not isfinite(loss):
            raise Ar2DiffError(
                f"the loss is {loss} at step {self.state.global_step}: training has diverged, and "
                "the weights are no longer usable",
                f"start over with a lower {option('train.learning_rate')}, or with "
                f"{option('train.precision', 'fp32')}",
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, with the recipe's learning-rate factor for each kind of parameter."""
        if self.optimizer is not None:  # DeepSpeed asks twice, and the factors must act once
            return self.optimizer
        optimizer = super().create_optimizer(model)
        scales = self.recipe.train.lr_scale.model_dump()
        kinds = parameter_kinds(self.model)
        if any(scales.get(kind, 1) != 1 for kind in kinds.values()):
            groups = []
            for group in optimizer.param_groups:
                for scale in sorted({scales.get(kinds[p], 1.0) for p in group["params"]}):
                    params = [p for p in group["params"] if scales.get(kinds[p], 1.0) == scale]
                    groups.append({**group, "params": params, "lr": group["lr"] * scale})
            optimizer.param_groups[:] = groups
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. On SIGTERM, save a checkpoint and end the process with exit code 143."""
        check_engine(self.accelerator)
        stopping = Stopping(self.accelerator)
        self.add_callback(stopping)
        with stopping.listening():
            result = super().train(*args, **kwargs)
        self.tokens_seen()
        if stopping.agreed and self.state.global_step < self.state.max_steps:
            if self.is_world_process_zero():
                print(
                    f"stopped by SIGTERM after step {self.state.global_step}, which was saved; "
                    "resume the run to continue",
                    file=sys.stderr,
                )
            raise SystemExit(STOPPED)
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a training checkpoint. Some classes are stored under other names than
        those that they have in memory; transformers' trainer would find none of these, and go on
        with the weights that the run began with."""
        inner, folder = self.checkpoint.model, Path(resume_from_checkpoint)
        whole = self.accelerator.unwrap_model(self.model) is inner and not self.is_fsdp_enabled
        if whole and not hasattr(inner, "get_base_model"):
            own = inner.state_dict().keys()
            if not all(tensor.name in own for tensor in stored_tensors(folder)):
                found = type(inner).from_pretrained(
                    folder, config=inner.config, dtype=inner.dtype, trust_remote_code=False
                )
                inner.load_state_dict(found.state_dict())
                return
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint under another name and then rename it, so that any folder called
        checkpoint-N is complete."""
        self.tokens_seen()
        self._check_loss(float(self.accelerator.reduce(self._tr_loss.detach().clone(), "sum")))
        run_dir = Path(self.args.output_dir)
        stage = run_dir / ".partial"
        self.args.output_dir = str(stage)
        try:
            with disk_errors(run_dir):
                super()._save_checkpoint(model, trial)
                self.save_rank(stage / f"checkpoint-{self.state.global_step}")
        finally:
            self.args.output_dir = str(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(run_dir, self.state.global_step, self.recipe.train.save_total_limit)
        self.accelerator.wait_for_everyone()


@contextmanager
def weights_kept(model: Any) -> Iterator[None]:
    """Undo what the `__init__` of trl's trainers does to adapters on quantized models: it rounds
    them to bfloat16, whose 8 bits of precision lose small updates and change the mask token's
    row."""
    kept = [(p, p.data) for p in model.parameters() if p.requires_grad]
    yield
    for parameter, data in kept:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


def publish_checkpoint(run_dir: Path, step: int, keep: int) -> None:
    """Move `.partial/checkpoint-<step>` into place and remove all but the newest `keep`."""
    stage, name = run_dir / ".partial", f"checkpoint-{step}"
    for file in (stage / name).rglob("*"):
        if file.is_file():
            sync(file)
    if (run_dir / name).exists():
        (run_dir / name).replace(stage / f"old-{name}")
    (stage / name).replace(run_dir / name)
    for old in checkpoints(run_dir)[:-keep]:
        old.replace(stage / f"old-{old.name}")  # so that no checkpoint-N is ever incomplete
    shutil.rmtree(stage)


def checkpoints(run_dir: Path) -> list[Path]:
    """The training checkpoints of a run, oldest first."""
    found = run_dir.glob("checkpoint-*") if run_dir.is_dir() else []
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a training checkpoint was saved."""
    return int(checkpoint.name.split("-")[1])
