"""What every trainer of ours shares: whole checkpoints, an end by SIGTERM, learning rates by kind
of parameter. A mixin over `transformers.Trainer`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.output import disk_errors, sync
from ..distributed.ranks import STOPPED
from ..distributed.sharding import check_engine
from .callbacks import Stopping


class Running:
    """Checkpoints are whole or absent; needs `self.recipe`."""

    def save_rank(self, folder: Path) -> None:
        """What a rank adds to a checkpoint that is being written."""

    def shown(self, logs: dict[str, float]) -> dict[str, float]:
        """What of the logs a line has room for."""
        return logs

    def facts(self) -> dict[str, Any]:
        """What the run's record says besides its tokens."""
        return {}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, with the recipe's factors on the learning rate of kinds of parameters."""
        optimizer = super().create_optimizer(model)
        scales = self.recipe.train.lr_scale.model_dump()
        if len(optimizer.param_groups) and any(scale != 1 for scale in scales.values()):
            kinds = parameter_kinds(self.model)
            groups = []
            for group in optimizer.param_groups:
                for scale in sorted({scales.get(kinds[p], 1.0) for p in group["params"]}):
                    params = [p for p in group["params"] if scales.get(kinds[p], 1.0) == scale]
                    groups.append({**group, "params": params, "lr": group["lr"] * scale})
            optimizer.param_groups[:] = groups
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. A SIGTERM saves a checkpoint and ends the process, with exit code 143."""
        check_engine(self.accelerator)
        stopping = Stopping(self.accelerator)
        self.add_callback(stopping)
        with stopping.listening():
            result = super().train(*args, **kwargs)
        if stopping.agreed and self.state.global_step < self.state.max_steps:
            if self.is_world_process_zero():
                print(
                    f"stopped by SIGTERM after step {self.state.global_step}, which is saved: "
                    "go on with --resume",
                    file=sys.stderr,
                )
            raise SystemExit(STOPPED)
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint beside and rename it: whatever is called checkpoint-N is whole."""
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
    """Around the `__init__` of a trainer of trl's, which rounds adapters of quantised models to
    bfloat16: updates below its 8 bits would be lost, and the mask token's row begin elsewhere."""
    kept = [(p, p.data) for p in model.parameters() if p.requires_grad]
    yield
    for parameter, data in kept:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


def publish_checkpoint(run_dir: Path, step: int, keep: int) -> None:
    """Move `.partial/checkpoint-<step>` into place and retire all but the newest `keep`."""
    stage, name = run_dir / ".partial", f"checkpoint-{step}"
    for file in (stage / name).rglob("*"):
        if file.is_file():
            sync(file)
    if (run_dir / name).exists():
        (run_dir / name).replace(stage / f"old-{name}")
    (stage / name).replace(run_dir / name)
    for old in checkpoints(run_dir)[:-keep]:
        old.replace(stage / f"old-{old.name}")  # renamed first: never half there by its name
    shutil.rmtree(stage)


def checkpoints(run_dir: Path) -> list[Path]:
    """Training checkpoints of a run, oldest first."""
    found = run_dir.glob("checkpoint-*") if run_dir.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def parameter_kinds(model: Any) -> dict[Tensor, str]:
    """Kind of each parameter: attention, mlp, embeddings or other (norms, biases).

    Attention modules are those that say whether they are causal, as all of transformers' do.
    """
    kinds: dict[Tensor, str] = {}
    attention = [m for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    for kind, modules in (
        ("embeddings", [*embeddings, model.get_input_embeddings(), model.get_output_embeddings()]),
        ("attention", attention),
    ):
        for module in modules:
            for parameter in module.parameters():
                kinds.setdefault(parameter, kind if parameter.ndim > 1 else "other")
    for parameter in model.parameters():
        kinds.setdefault(parameter, "mlp" if parameter.ndim > 1 else "other")
    return kinds
