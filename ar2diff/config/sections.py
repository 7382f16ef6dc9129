"""The sections of a recipe, except `rl` (in rl.py). `ar2diff config schema` prints the fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .section import MOST_ROWS, MOST_SAMPLES, Section


class Convert(Section):
    """What the converted model is. Becomes the `diffusion` block of config.json."""

    attention: Literal["causal_context", "block_causal", "full"] = Field(
        "causal_context",
        description="which tokens attend to which: causal up to the block being denoised, "
        "causal over blocks, or bidirectional",
    )
    block_length: int | None = Field(
        8, gt=0, description="tokens denoised together; null for attention full"
    )
    prediction: Literal["same", "shift"] = Field(
        "shift", description="a token is predicted at its own position, or at the one before it"
    )
    local_window: Literal["kept", "dropped"] | None = Field(
        None,
        description="what happens to the base's sliding window; null keeps it where rows are "
        "longer than the window",
    )
    mask_token: str | None = Field(
        None, description="text of the special token to use as the mask; null chooses or adds one"
    )
    reconvert: bool = Field(
        False, description="allow a converted model to be given another attention or prediction"
    )

    @model_validator(mode="after")
    def _full_has_no_blocks(self) -> Convert:
        if (self.attention == "full") != (self.block_length is None):
            raise ValueError("block_length is null for attention full, and a number otherwise")
        return self


class Anneal(Section):
    """How the attention moves from causal to its goal during training."""

    kind: Literal["none", "reveal", "grow", "wsd"] = Field(
        "none",
        description="reveal look-ahead edges at random, grow the block length, or warm it up, "
        "hold it and decay it (wsd)",
    )
    steps: int = Field(0, ge=0, description="optimizer steps until the goal is reached")
    lengths: tuple[int, ...] = Field(
        (),
        description="block lengths to go through before the goal, for an equal number of steps "
        "each; only wsd may exceed the goal",
    )

    @model_validator(mode="after")
    def _needs_steps(self) -> Anneal:
        if (self.kind == "none") != (self.steps == 0):
            raise ValueError("steps is 0 for kind none, and at least 1 otherwise")
        by_length = self.kind in ("grow", "wsd")
        if by_length != bool(self.lengths) or any(n < 1 for n in self.lengths):
            raise ValueError(
                "kinds grow and wsd need lengths of at least 1, and no other kind has them"
            )
        return self


class Noise(Section):
    """The forward process: how tokens are masked."""

    time: Literal["block", "document", "sequence"] = Field(
        "block",
        description="which tokens share a noise level; document or sequence for attention full",
    )
    complementary: bool = Field(
        False, description="add a second view of each row, with exactly the other tokens masked"
    )


class Objective(Section):
    """The loss: weight(t) * cross-entropy of masked tokens / divisor + ar_weight * AR loss."""

    kind: Literal["diffusion", "ar"] = Field(
        "diffusion", description="sft, rl: ar tunes an unconverted model, as a control"
    )
    weight: Literal["uniform", "1/t", "cart"] = Field(
        "uniform", description="weight of a masked token as a function of the noise level"
    )
    cart_p: float = Field(0.3, gt=0, lt=1, description="cart: decay of the geometric weights")
    normaliser: Literal["tokens", "masked", "sequence"] = Field(
        "tokens", description="what the summed loss is divided by"
    )
    ar_weight: float = Field(0.3, ge=0, description="weight of the AR loss on the clean copy")


class Source(Section):
    """One data source: a file, `-` for standard input, or a Hub data set."""

    path: str = Field(description="file, - for standard input, or id of a Hub data set")
    weight: float | None = Field(
        None, gt=0, description="share of the documents; null: in proportion to the source's size"
    )
    name: str | None = Field(None, description="configuration of a Hub data set")
    split: str = Field("train", description="split of a Hub data set")


class Columns(Section):
    """Which columns of a row hold what: a column's name, or a text with columns in {braces}."""

    prompt: str | None = Field(
        None, description="sft, rl: a column, or a text with {columns}; null: column prompt"
    )
    completion: str | None = Field(
        None, description="sft: a column, or a text with {columns}; null: column completion"
    )
    messages: str | None = Field(
        None, description="sft: a column of messages; null: column messages or conversations"
    )


class Data(Section):
    """The rows that are trained on."""

    sources: tuple[Source, ...] = Field((), description="files, standard input, Hub data sets")
    text_field: str = Field("text", description="the column that holds a row's text")
    columns: Columns = Columns()
    max_length: int = Field(512, gt=1, description="tokens in a row")
    overlong: Literal["split", "truncate", "drop"] = Field(
        "split", description="what happens to longer documents; sft never splits, it truncates"
    )
    cut_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="adapt with attention full: share of documents that is cut to a random length",
    )
    packing: bool = Field(
        True, description="put several documents into a row, isolated from each other"
    )
    streaming: bool = Field(False, description="adapt: stream Hub data sets, do not download them")
    assistant_only: bool = Field(
        True, description="sft: learn only the assistant's messages of a conversation"
    )
    chat_template: str | None = Field(
        None,
        description="sft, rl: name of a shipped template, or a .jinja file; null: the tokenizer's",
    )

    @model_validator(mode="before")
    @classmethod
    def _paths_may_be_bare(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("sources"), (list, tuple)):
            rows = [{"path": s} if isinstance(s, str) else s for s in value["sources"]]
            value = {**value, "sources": rows}
        return value


class LrScale(Section):
    """Factors on the learning rate by kind of parameter; norms and biases keep 1."""

    attention: float = Field(1.0, ge=0, description="weights of the attention layers")
    mlp: float = Field(1.0, ge=0, description="weights of all other layers")
    embeddings: float = Field(1.0, ge=0, description="embeddings and output head")


class Train(Section):
    """Optimization. Fields are named after transformers.TrainingArguments where it has them."""

    max_steps: int = Field(1000, ge=0, description="optimizer steps; 0 converts without training")
    per_device_train_batch_size: int = Field(
        8, gt=0, le=MOST_ROWS, description="rows in a micro-batch"
    )
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="micro-batches in an optimizer step"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="torch.optim's AdamW or SGD")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scale: LrScale = LrScale()
    schedule: Literal["cosine", "warmup_stable_decay", "constant"] = Field(
        "cosine", description="learning rate after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    decay_steps: int = Field(0, ge=0, description="warmup_stable_decay: steps of the final decay")
    weight_decay: float = Field(0.1, ge=0, description="decay of weights, not of norms and biases")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="adamw: decay of the second moment")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 disables it")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass to save memory"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the forward and backward passes; master weights are float32"
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = Field(
        "auto", description="auto: sdpa, or eager for models that lack it"
    )
    compile: bool = Field(
        False, description="compile the layers with torch.compile; the first steps are slow"
    )
    seed: int = Field(0, ge=0, description="seed of data order, noise and initialization")
    logging_steps: int = Field(25, gt=0, description="steps between log lines")
    save_steps: int = Field(500, gt=0, description="steps between training checkpoints")
    save_total_limit: int = Field(2, gt=0, description="training checkpoints to keep")
    report_to: str = Field("none", description="tracker: wandb, tensorboard, trackio, none ...")


class Eval(Section):
    """The likelihood bound of fixed rows under fixed noise, during training."""

    data: str | None = Field(None, description="file; null: rows held out of the training data")
    rows: int = Field(16, gt=0, description="evaluation rows")
    length: int = Field(128, gt=1, description="tokens of an evaluation row")
    samples: int = Field(4, gt=0, le=MOST_SAMPLES, description="noise draws per row")
    steps: int = Field(0, ge=0, description="training steps between evaluations; 0: never")
    panel_steps: int = Field(
        0, ge=0, description="training steps between samples shown while denoised; 0: never"
    )


class Peft(Section):
    """Adapters instead of full tuning: the model is frozen, and small matrices are trained."""

    method: Literal["lora", "dora"] = Field("lora", description="kind of adapter")
    r: int = Field(16, gt=0, description="rank")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="all-linear, or names of linear layers: [q_proj, v_proj]"
    )
    mask_row: bool = Field(True, description="also train the embedding of the mask token")

    @model_validator(mode="after")
    def _names_are_a_list(self) -> Peft:
        if self.targets == () or (isinstance(self.targets, str) and self.targets != "all-linear"):
            raise ValueError("targets is all-linear, or a list of names")
        return self


class Quantization(Section):
    """How the frozen weights under an adapter are stored (QLoRA)."""

    bits: Literal[4] = Field(4, description="bits of a weight")
    kind: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type")
    double: bool = Field(True, description="quantize the quantization scales as well")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a GPU that supports it, float32 otherwise"
    )
