"""The `draft` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .section import Section

Divergence = Literal["ce", "kl", "tv", "lk"]


class Draft(Section):
    """A draft adapter: how large it is, and what it learns from the frozen model."""

    rank: int = Field(32, gt=0, description="rank of the branch beside each layer")
    head_rank: int = Field(
        256, ge=0, description="rank of the head, which knows the drafts before; 0: no head"
    )
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="layers with a branch: all-linear, attention-output (the last layer of each "
        "attention module), or a list of linear layers, for example [o_proj, down_proj]",
    )
    block_length: int = Field(
        8, gt=1, description="masks that follow the newest token; one fewer are drafted"
    )
    loss: dict[Divergence, float] = Field(
        {"kl": 0.3, "tv": 0.7},
        description="weights of the divergences between the draft and the model: ce (of the text "
        "itself), kl, tv (whose half is the rejection rate), lk (kl and tv by the acceptance)",
    )
    decay: float | Literal["dpace"] | None = Field(
        4.0,
        description="the weight of the k-th draft is exp(-(k-1)/decay); dpace: by the probability "
        "that the drafts before it are right; null: all weigh the same",
    )
    visible: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="a block shows its first l tokens with a probability proportional to "
        "visible^l; 0: never more than masks",
    )

    @model_validator(mode="after")
    def _parts_make_sense(self) -> Draft:
        named = ("all-linear", "attention-output")
        if self.targets == () or (isinstance(self.targets, str) and self.targets not in named):
            raise ValueError(f"targets must be {', '.join(named)} or a list of names")
        if not self.loss or not all(weight > 0 for weight in self.loss.values()):
            raise ValueError("loss must name at least one divergence, with weights above 0")
        if isinstance(self.decay, float) and not self.decay > 0:
            raise ValueError("decay must be above 0, dpace or null")
        return self
