"""How training is sharded over processes: DeepSpeed and FSDP settings, and gathering the
weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError, option
from .launch import strategy_of
from .ranks import chosen, is_main, world_size


def training_kwargs() -> dict[str, Any]:
    """TrainingArguments keywords for the strategy that this process was launched with."""
    how = chosen()
    if how is None or how == "ddp" or how.endswith((".yaml", ".yml")):
        return {}
    if how == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    if how.endswith(".json"):
        return {"deepspeed": strategy_of(how)[1]}
    return {"deepspeed": deepspeed_config(int(how.removeprefix("zero")))}


def deepspeed_config(stage: int) -> dict[str, Any]:
    """The settings of a ZeRO stage. transformers fills in each `auto` from the training arguments
    and the size of the model.

    Weights are float32, or bfloat16 with float32 masters if the recipe computes in bfloat16.
    Offloading needs a .json of the user's own, passed as the launch file.
    """
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": "auto"}  # not 500M elements
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",  # 10 x the hidden size: norms stay whole
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # SGD
    }


def sharding() -> str | None:
    """How this run's optimizer state is sharded; its checkpoints only fit the same sharding."""
    how = chosen()
    if how in (None, "ddp"):
        return None
    if how.endswith(".json"):
        how = strategy_of(how)[0]
    return f"{Path(how).name} x {world_size()}"


def check_engine(accelerator: Any) -> None:
    """Refuse to train under a strategy other than the requested one: some launchers silently run a
    single process, or plain DDP."""
    how = chosen()
    if how is None:
        return
    got = accelerator.distributed_type.value
    wanted = {"zero": "DEEPSPEED", "fsdp": "FSDP"}.get(how[:4], None)
    if how.endswith(".json"):
        wanted = "DEEPSPEED"
    if accelerator.num_processes != world_size() or wanted not in (None, got):
        raise Ar2DiffError(
            f"{option('launch', how)} was requested, but accelerate runs {got} in "
            f"{accelerator.num_processes} of {world_size()} processes",
            "unset any ACCELERATE_* environment variables, and remove accelerate's "
            "default_config.yaml",
        )


def join_deepspeed(args: Any) -> None:
    """Tell DeepSpeed about the processes before a model is loaded: ZeRO-3 shards it while it is
    built, by default for a single process."""
    if args.deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend=None if args.device.type == "cuda" else "gloo")


def holds_shards(trainer: Any) -> bool:
    """Whether each process holds only a shard of each weight, so that a forward pass needs them
    all."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return trainer.is_fsdp_enabled or (
        trainer.is_deepspeed_enabled and is_deepspeed_zero3_enabled()
    )


def whole_weights(trainer: Any) -> dict[str, Any] | None:
    """The trained weights, gathered on the main process (every process must call this), or None if
    the model holds them whole. Float32 masters are preferred to rounded copies."""
    if getattr(trainer, "deepspeed", None) is not None:
        return _gather_deepspeed(trainer.model)
    if trainer.is_fsdp_enabled:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return None


def _gather_deepspeed(model: Any) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    state, adapted = {}, hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        if adapted and not parameter.requires_grad:
            continue  # part of the base, which an adapter folder does not contain
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:  # not trained, so it has no master copy
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        if is_main():
            state[name] = whole.detach().cpu()
    for name, buffer in model.named_buffers() if not adapted else ():
        module, _, last = name.rpartition(".")
        if is_main() and last not in model.get_submodule(module)._non_persistent_buffers_set:
            state[name] = buffer.detach().cpu()
    return state
