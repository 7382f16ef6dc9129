"""The `rl` section of a recipe: reinforcement learning."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .section import MOST_SAMPLES, Section

# The settings of each method's paper. Values that a recipe sets itself take precedence.
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
    # ESPO (Ou et al. 2025): the ratio of the sequences' bounds
    "espo": {
        "estimator": "elbo", "samples": 2, "level": "sequence", "num_iterations": 8,
        "epsilon": 0.2, "beta": 1e-3, "kl": "k2", "loss_type": "grpo", "scale_rewards": "none",
    },
    # SPG (Wang et al. 2025): neither a ratio nor a KL term
    "spg": {
        "estimator": "spg", "samples": 2, "num_iterations": 4, "beta": 0.0,
        "loss_type": "bnpo", "scale_rewards": "none",
    },
    # UniGRPO (Yang et al. 2025): the ratio of each masked token
    "unigrpo": {
        "estimator": "unigrpo", "level": "token", "num_iterations": 5, "epsilon": 0.2,
        "beta": 0.01, "kl": "k3", "loss_type": "grpo", "scale_rewards": "group",
    },
}  # fmt: skip


class Reward(Section):
    """A function that scores completions."""

    name: str = Field(description="a built-in reward, module:function, or file.py:function")
    weight: float = Field(1.0, description="weight of the reward in the sum of all rewards")
    args: dict[str, Any] = Field({}, description="keyword arguments in addition to the columns")
    time_limit: float = Field(60.0, gt=0, description="seconds that a batch may take")


class Rl(Section):
    """Diffusion-GRPO. Fields are named after trl.GRPOConfig where it has them."""

    preset: Literal["d1", "coupled", "espo", "spg", "unigrpo"] | None = Field(
        None, description="use the settings of a published method, except for fields set here"
    )
    rewards: tuple[Reward, ...] = Field((), description="functions that score completions")
    chat: bool = Field(
        False, description="treat each prompt as a user message, and apply the chat template"
    )
    num_generations: int = Field(8, gt=1, description="completions per prompt")
    max_completion_length: int = Field(64, gt=0, description="maximum tokens in a completion")
    sampler: dict[str, Any] = Field(
        {},
        description="generate options for the rollouts; regex, json_schema (a mapping or a file) "
        "or choice holds them to a form",
    )
    estimator: Literal["one_step", "coupled", "elbo", "spg", "unigrpo", "trajectory", "ar"] = Field(
        "trajectory", description="how to estimate the log-likelihood of a completion"
    )
    draft: str | None = Field(
        None,
        description="ar: folder or Hub id of a draft adapter, with which the model writes its "
        "completions in fewer forwards; it is not trained",
    )
    samples: int = Field(
        1, gt=0, le=MOST_SAMPLES, description="coupled, elbo, spg: noise draws per completion"
    )
    segments: int | None = Field(
        None,
        gt=0,
        description="trajectory: merge the steps of a block into at most this many passes; "
        "null: one pass per step",
    )
    prompt_mask: float = Field(
        0.0, ge=0, lt=1, description="one_step with attention full: share of prompt tokens to mask"
    )
    fewer_forwards: float = Field(
        0.0,
        ge=0,
        description="weight of a further reward, 1 - forwards / tokens, for completions to which "
        "every other reward gives at least 1",
    )
    num_iterations: int = Field(1, gt=0, description="updates on each set of completions")
    steps_per_generation: int | None = Field(
        None, gt=0, description="micro-batches per generation step; null: as many as one update has"
    )
    level: Literal["token", "sequence"] = Field(
        "token", description="whether importance ratios are per token or per sequence"
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = (
        Field("dapo", description="how the loss is clipped and normalized, as in trl")
    )
    epsilon: float = Field(0.2, gt=0, description="clipping range of the ratio")
    epsilon_high: float | None = Field(
        None, gt=0, description="upper clipping range; null: epsilon"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="over what to take the standard deviation that advantages are divided by",
    )
    beta: float = Field(0.0, ge=0, description="weight of the KL divergence from the initial model")
    kl: Literal["k3", "k2"] = Field(
        "k3", description="estimator of the KL; k2 is per sequence, divided by its length"
    )
    mask_truncated_completions: bool = Field(
        False, description="leave completions without an end token out of the loss"
    )
    rollout_batch_size: int = Field(32, gt=0, description="rows decoded together")
    show_steps: int = Field(0, ge=0, description="steps between printed completions; 0: never")

    @model_validator(mode="before")
    @classmethod
    def _preset_fills(cls, tree: Any) -> Any:
        preset = tree.get("preset") if isinstance(tree, dict) else None
        if isinstance(preset, str) and preset in PRESETS:
            return {**PRESETS[preset], **tree}
        return tree

    @model_validator(mode="after")
    def _parts_agree(self) -> Rl:
        if self.prompt_mask and self.estimator != "one_step":
            raise ValueError("prompt_mask can only be set with estimator one_step")
        if self.draft is not None and self.estimator != "ar":
            raise ValueError(f"draft can only be set with estimator ar, not {self.estimator}")
        if self.samples > 1 and self.estimator not in ("coupled", "elbo", "spg"):
            raise ValueError(
                f"samples can only be set with estimator coupled, elbo or spg, not {self.estimator}"
            )
        if self.segments is not None and self.estimator != "trajectory":
            raise ValueError("segments can only be set with estimator trajectory")
        if self.fewer_forwards and (
            self.estimator == "ar" or self.sampler.get("steps_per_block") is not None
        ):
            raise ValueError(
                "fewer_forwards needs a sampler that takes as many forwards as the model needs: "
                "another estimator than ar, and no sampler.steps_per_block"
            )
        temperature = self.sampler.get("temperature", 1.0)
        if not isinstance(temperature, (int, float)) or temperature <= 0:
            raise ValueError(
                "sampler.temperature must be above 0: identical completions teach nothing"
            )
        for name in ("max_new_tokens", "seed", "num_return_sequences", "repetition_penalty"):
            if name in self.sampler:
                raise ValueError(f"sampler.{name} cannot be set for rollouts")
        return self
