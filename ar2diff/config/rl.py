"""The sections of a recipe on reinforcement learning; those of the other verbs are in config.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A mapping of a recipe: strict, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# What each method's paper sets; a recipe's own values stand above them.
PRESETS: dict[str, dict[str, Any]] = {
    # diffu-GRPO (Zhao et al. 2025)
    "d1": {
        "estimator": "one_step", "prompt_mask": 0.15, "num_iterations": 12, "epsilon": 0.5,
        "beta": 0.04, "loss_type": "bnpo", "scale_rewards": "none",
    },
    # coupled-GRPO (Gong et al. 2025)
    "coupled": {
        "estimator": "coupled", "num_iterations": 2, "epsilon": 0.5, "beta": 0.01,
        "loss_type": "bnpo", "scale_rewards": "none",
    },
    # ESPO (Ou et al. 2025): the ratio of sequences' bounds
    "espo": {
        "estimator": "elbo", "samples": 2, "level": "sequence", "num_iterations": 8,
        "epsilon": 0.2, "beta": 1e-3, "kl": "k2", "loss_type": "grpo", "scale_rewards": "none",
    },
    # SPG (Wang et al. 2025): without a ratio, and without KL
    "spg": {
        "estimator": "spg", "samples": 2, "num_iterations": 4, "beta": 0.0,
        "loss_type": "bnpo", "scale_rewards": "none",
    },
}  # fmt: skip


class Reward(Section):
    """A function that judges completions."""

    name: str = Field(description="of ours; or module:function, or file.py:function")
    weight: float = 1.0
    args: dict[str, Any] = Field({}, description="keywords that it gets beside the columns")
    time_limit: float = Field(60.0, gt=0, description="seconds for a batch")


class Rl(Section):
    """Diffusion-GRPO. Names are those of trl.GRPOConfig where it has one."""

    preset: Literal["d1", "coupled", "espo", "spg"] | None = Field(
        None, description="the settings of a published method, for what is not set here"
    )
    rewards: tuple[Reward, ...] = ()
    chat: bool = Field(False, description="a prompt is what a user says: the chat template asks")
    num_generations: int = Field(8, gt=1, description="completions of a prompt")
    max_completion_length: int = Field(64, gt=0, description="tokens")
    sampler: dict[str, Any] = Field({}, description="options of generate for the rollouts")
    estimator: Literal["one_step", "coupled", "elbo", "spg", "trajectory", "ar"] = Field(
        "trajectory", description="of the log-likelihood of a completion"
    )
    samples: int = Field(1, gt=0, description="coupled, elbo, spg: draws of the noise")
    segments: int | None = Field(
        None, gt=0, description="trajectory: at most so many passes, steps merged; null: each step"
    )
    prompt_mask: float = Field(0.0, ge=0, lt=1, description="one_step, full: of prompt tokens")
    num_iterations: int = Field(1, gt=0, description="updates on the same completions")
    steps_per_generation: int | None = Field(
        None, gt=0, description="micro-batches of a generation; null: of an update"
    )
    level: Literal["token", "sequence"] = Field("token", description="of the importance ratio")
    loss_type: Literal[
        "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"
    ] = "dapo"  # fmt: skip
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(None, gt=0, description="null: epsilon")
    scale_rewards: Literal["group", "batch", "none"] = "group"
    beta: float = Field(0.0, ge=0, description="weight of the KL to the model as it began")
    kl: Literal["k3", "k2"] = Field("k3", description="k2: of sequences, divided by their length")
    mask_truncated_completions: bool = Field(
        False, description="completions without an end token do not count"
    )
    rollout_batch_size: int = Field(32, gt=0, description="rows that are decoded together")
    show_steps: int = Field(0, ge=0, description="print completions every so many steps; 0: never")

    @model_validator(mode="before")
    @classmethod
    def _preset_fills(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("preset") in PRESETS:
            return {**PRESETS[tree["preset"]], **tree}
        return tree

    @model_validator(mode="after")
    def _parts_agree(self) -> Rl:
        if self.prompt_mask and self.estimator != "one_step":
            raise ValueError("prompt_mask belongs to estimator one_step")
        if self.samples > 1 and self.estimator not in ("coupled", "elbo", "spg"):
            raise ValueError(f"samples belongs to coupled, elbo and spg, not to {self.estimator}")
        if self.segments is not None and self.estimator != "trajectory":
            raise ValueError("segments belongs to estimator trajectory")
        temperature = self.sampler.get("temperature", 1.0)
        if not isinstance(temperature, (int, float)) or temperature <= 0:
            raise ValueError("sampler.temperature must be above 0: equal completions teach nothing")
        for name in ("max_new_tokens", "seed", "num_return_sequences", "repetition_penalty"):
            if name in self.sampler:
                raise ValueError(f"sampler.{name} is not for rollouts")
        return self
