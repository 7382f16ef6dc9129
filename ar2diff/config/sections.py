"""The sections of a recipe, except `rl` (in rl.py). `ar2diff config schema` prints the fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..core.errors import Ar2DiffError, shortened
from ..core.noise import Noise as Process
from ..core.noises import noise_of
from .section import MOST_ROWS, MOST_SAMPLES, Section


class Convert(Section):
    """What the converted model is. Becomes the `diffusion` block of config.json."""

    attention: Literal["causal_context", "block_causal", "full"] = Field(
        "causal_context",
        description="which tokens attend to which: causal up to the block being denoised, "
        "causal over blocks, or bidirectional",
    )
    block_length: int | None = Field(
        8, gt=0, description="number of tokens denoised together; null for attention full"
    )
    prediction: Literal["same", "shift"] = Field(
        "shift", description="whether a token is predicted at its own position or at the one before"
    )
    local_window: Literal["kept", "dropped"] | None = Field(
        None,
        description="whether the sliding window of the base is kept or dropped; null keeps it "
        "where rows are longer than the window",
    )
    head_rank: int | None = Field(
        None,
        gt=0,
        le=1024,
        description="adapt: rank of a diffusion head, a bias on the logits of a token given the "
        "one before it, for tokens that are decided in one step; null: none, or the model's own",
    )
    mask_token: str | None = Field(
        None, description="the special token to use as the mask; null chooses or adds one"
    )
    reconvert: bool = Field(
        False, description="allow changing the attention or prediction of a converted model"
    )

    @model_validator(mode="after")
    def _full_has_no_blocks(self) -> Convert:
        if (self.attention == "full") != (self.block_length is None):
            raise ValueError("block_length must be null for attention full, and a number otherwise")
        return self


class Anneal(Section):
    """How the attention moves from causal to its goal during training."""

    kind: Literal["none", "reveal", "grow", "wsd"] = Field(
        "none",
        description="reveal look-ahead edges at random, grow the block length, or warm up, "
        "hold and decay the block length (wsd)",
    )
    steps: int = Field(0, ge=0, description="optimizer steps until the final attention is reached")
    lengths: tuple[int, ...] = Field(
        (),
        description="block lengths to go through before the final one, with an equal number of "
        "steps each; only those of wsd may exceed the final one",
    )

    @model_validator(mode="after")
    def _needs_steps(self) -> Anneal:
        if (self.kind == "none") != (self.steps == 0):
            raise ValueError("steps must be 0 for kind none, and at least 1 otherwise")
        by_length = self.kind in ("grow", "wsd")
        if by_length != bool(self.lengths) or any(n < 1 for n in self.lengths):
            raise ValueError(
                "lengths must be set for kinds grow and wsd, to values of at least 1, and for "
                "no other kind"
            )
        return self


class Edits(Section):
    """Correcting whole texts: beside the noise, a copy of each row in which a few tokens are
    replaced by any others, and all tokens are scored (Seed Diffusion)."""

    after: float = Field(
        0.8, ge=0, lt=1, description="adapt: share of the steps after which this begins"
    )
    most: float = Field(
        0.1, gt=0, le=1, description="the largest share of a text's tokens that is replaced"
    )


class Noise(Section):
    """The forward process: what tokens are replaced by, and how many of them."""

    kind: str | None = Field(
        None,
        description="what open slots show: mask; uniform, any token; mask_uniform, a mask or, "
        "halfway, any token (GIDD); self, the model's own guesses; spindle, masks on informative "
        "tokens first (DiffusionBERT); gaussian and nearest, tokens near the right one in an order "
        "or by their embeddings (D3PM); or embedding, its embedding among Gaussian noise "
        "(Diffusion-LM, SED). null: mask, or that of a converted model",
    )
    form: Literal["tracked", "free"] | None = Field(
        None,
        description="whether the sampler knows which slots are open (tracked) or any token may "
        "still change (free); null: the first that the kind has",
    )
    parameters: dict[str, float | str] = Field(
        {},
        description="of the kind. uniform: schedule (linear, cosine); mask_uniform: p_u, gamma; "
        "self and embedding: guessed; spindle: strength; gaussian: order (component, ids), width; "
        "nearest: neighbours; in the free form also logits (others, posterior)",
    )
    time: Literal["block", "document", "sequence"] = Field(
        "block",
        description="which tokens share a noise level; document or sequence with attention full",
    )
    law: Literal["uniform", "bell", "all"] = Field(
        "uniform",
        description="distribution of the noise level: uniform; bell, mostly medium levels "
        "(Beta(2, 2)); or all, in which a share of the blocks is masked whole",
    )
    all_share: float = Field(
        0.5, ge=0, le=1, description="law all: share of the blocks that are masked whole"
    )
    on_policy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="adapt: share of the steps that train on blocks as the sampler leaves them "
        "halfway, in texts that the model writes itself",
    )
    best_of: int = Field(
        1,
        gt=0,
        le=64,
        description="with on_policy: texts that the model writes of each document, of which the "
        "likeliest one, by its bound, is learned",
    )
    spans: int = Field(
        1,
        ge=1,
        le=64,
        description="adapt: most spans that a text is divided into; of a number drawn from 1 to "
        "this, every other span is given, and not scored (SED); 1: nothing is given",
    )
    dropped: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="with spans: share of the texts whose given spans show masks, for guidance by "
        "cfg_scale",
    )
    edits: Edits | None = None
    complementary: bool = Field(
        False,
        description="add a second view of each row, in which exactly the other tokens are masked",
    )

    @property
    def of_adapt(self) -> list[str]:
        """The keys that are set of those that only adapt uses."""
        asked = {"on_policy": self.on_policy, "edits": self.edits, "spans": self.spans > 1}
        return [f"noise.{name}" for name, value in asked.items() if value]

    @property
    def process(self) -> Process | None:
        """The noise that is named; None if none is."""
        if self.kind is None:
            return None
        form = {} if self.form is None else {"form": self.form}
        return noise_of({"kind": self.kind, **form, **self.parameters})

    @field_validator("parameters", mode="before")
    @classmethod
    def _are_numbers_or_words(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        found = {}
        for name, given in value.items():
            if name in ("kind", "form", "sha256"):
                raise ValueError(f"{name} is not a parameter; set noise.{name}")
            if not isinstance(name, str) or type(given) not in (int, float, str):
                shown = f"{shortened(name)} is {shortened(given)}"
                raise ValueError(f"{shown}, but must be a number or a word")
            try:
                found[name] = float(given)  # YAML takes 1e-1 for a word
            except (ValueError, OverflowError):
                found[name] = given
        return found

    @model_validator(mode="after")
    def _is_known(self) -> Noise:
        if self.kind is None and (self.form is not None or self.parameters):
            raise ValueError("form and parameters belong to a kind, which is not set")
        try:
            self.process  # noqa: B018
        except Ar2DiffError as error:
            what = error.what.removeprefix("diffusion.noise").lstrip(".")
            if what.startswith(" has a key"):
                what = f"parameters have{what.removeprefix(' has')}"
                what += "" if "did you mean" in what else f"; {error.fix}"
            raise ValueError(what) from None
        return self

    @model_validator(mode="after")
    def _complements_have_the_same_law(self) -> Noise:
        if self.best_of > 1 and not self.on_policy:
            raise ValueError("best_of needs on_policy above 0")
        if self.dropped and self.spans == 1:
            raise ValueError("dropped needs spans above 1")
        if self.edits is not None and self.complementary:
            raise ValueError("edits cannot be used with complementary: each adds a copy of a row")
        if self.complementary and self.on_policy:
            raise ValueError(
                "complementary cannot be used with on_policy, whose states have no second view"
            )
        if self.complementary and self.law == "all":
            raise ValueError(
                "complementary cannot be used with law all, because the second view of a block "
                "that is masked whole masks nothing"
            )
        return self


class Distil(Section):
    """Learning from the predictions of an AR model: the loss of a masked token becomes
    (1 - weight) * cross-entropy + weight * divergence."""

    target: Literal["teacher", "clean"] = Field(
        "clean",
        description="whose prediction is the target: that of the model before training (teacher), "
        "or of the AR mode being trained (clean)",
    )
    weight: float = Field(1.0, gt=0, le=1, description="share of the divergence in the loss")
    loss: Literal["kl", "tv", "lk"] = Field(
        "kl",
        description="divergence from the target: Kullback-Leibler, total variation (the L1 "
        "distance), or a mixture weighted by their overlap (lk)",
    )
    visible: Literal["left", "any"] = Field(
        "left",
        description="which masked tokens are distilled: only those without a visible token after "
        "them in their block, for which the AR prediction is a valid target, or any",
    )


class Objective(Section):
    """The loss: weight(t) * cross-entropy of masked tokens / divisor + ar_weight * AR loss."""

    kind: Literal["diffusion", "ar"] = Field(
        "diffusion", description="ar trains an AR model without converting it, as a control"
    )
    weight: Literal["uniform", "1/t", "cart", "bound"] = Field(
        "uniform",
        description="how the noise level determines the weight of a masked token; bound, of a free "
        "noise: its bound in place of the cross-entropy",
    )
    cart_p: float = Field(0.3, gt=0, lt=1, description="cart: decay rate of the geometric weights")
    normaliser: Literal["tokens", "masked", "sequence", "masked+ar"] = Field(
        "tokens",
        description="what the summed loss is divided by; masked+ar divides both losses by the "
        "number of masked tokens plus that of tokens in the AR loss",
    )
    ar_weight: float = Field(0.3, ge=0, description="weight of the AR loss on the clean copy")
    distil: Distil | None = None


class Source(Section):
    """One data source: a file, `-` for standard input, or a Hub data set."""

    path: str = Field(description="file, - for standard input, or id of a Hub data set")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the documents; null: in proportion to the size of the source",
    )
    name: str | None = Field(None, description="configuration of a Hub data set")
    split: str = Field("train", description="split of a Hub data set")


class Columns(Section):
    """Which columns of a row hold what: a column's name, or a text with columns in {braces}."""

    prompt: str | None = Field(
        None,
        description="sft, rl: a column, or a text with {column} in it; null: the column prompt",
    )
    completion: str | None = Field(
        None,
        description="sft: a column, or a text with {column} in it; null: the column completion",
    )
    messages: str | None = Field(
        None, description="sft: a column of messages; null: the column messages or conversations"
    )


class SelfData(Section):
    """Text that the model itself writes in AR mode before it is trained, as further training data,
    or the only one: what a draft adapter must guess in use, and what a conversion should still
    know. It is kept in the user's cache for later runs."""

    prompts: str | None = Field(
        None,
        description="file of prompts: rows with a prompt, with messages up to an answer, or with "
        "a text, whose beginning is given, which are learned along with what follows; null: the "
        "start token alone",
    )
    prompt_tokens: int = Field(8, gt=0, description="how many tokens the beginning of a text has")
    tokens: int = Field(1_000_000, gt=0, description="how many tokens to write")
    temperature: float = Field(
        1.0, ge=0, description="temperature of the draws; at 0 each prompt is continued once"
    )
    max_new_tokens: int = Field(
        256,
        gt=0,
        description="tokens after a prompt, unless the model ends the text earlier, or "
        "prompt and answer do not fit into its context",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the documents beside data.sources; null: in proportion to the "
        "number of texts",
    )

    @model_validator(mode="after")
    def _greedy_text_needs_prompts(self) -> SelfData:
        if not self.temperature and self.prompts is None:
            raise ValueError("temperature 0 needs prompts, or every text would be the same")
        return self


class Data(Section):
    """The training data."""

    sources: tuple[Source, ...] = Field(
        (), description="files, standard input or Hub data sets to train on"
    )
    self: SelfData | None = Field(
        None, description="draft: text that the model itself writes, beside or instead of sources"
    )
    text_field: str = Field("text", description="the column that holds the text of a row")
    columns: Columns = Columns()
    max_length: int = Field(512, gt=1, description="maximum tokens in a row")
    overlong: Literal["split", "truncate", "drop"] = Field(
        "split", description="what to do with longer documents; sft truncates instead of splitting"
    )
    cut_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="adapt with attention full: share of documents to cut to a random length",
    )
    packing: bool = Field(
        True, description="put several documents into a row, isolated from each other"
    )
    streaming: bool = Field(
        False, description="adapt: stream Hub data sets instead of downloading them"
    )
    assistant_only: bool = Field(
        True, description="sft: learn only the assistant's messages in a conversation"
    )
    chat_template: str | None = Field(
        None,
        description="sft, rl: name of a built-in template, or a .jinja file; null: the tokenizer's",
    )

    @model_validator(mode="before")
    @classmethod
    def _paths_may_be_bare(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("sources"), (list, tuple)):
            rows = [{"path": s} if isinstance(s, str) else s for s in value["sources"]]
            value = {**value, "sources": rows}
        return value


class LrScale(Section):
    """Factors on the learning rate by kind of parameter; norms and biases keep 1, but for those of
    a tower or projector."""

    attention: float = Field(1.0, ge=0, description="factor for weights of attention layers")
    mlp: float = Field(1.0, ge=0, description="factor for weights of all other layers")
    embeddings: float = Field(
        1.0, ge=0, description="factor for the embeddings and the output head"
    )
    diffusion_head: float = Field(
        1.0, ge=0, description="factor for a diffusion head (convert.head_rank), which starts anew"
    )
    tower: float = Field(
        0.2, ge=0, description="factor for the tower of a vision-language model, which sees images"
    )
    projector: float = Field(
        1.0, ge=0, description="factor for what turns the tower's features into embeddings"
    )


class Train(Section):
    """Optimization. Fields are named after transformers.TrainingArguments where it has them."""

    max_steps: int = Field(1000, ge=0, description="optimizer steps; 0 converts without training")
    per_device_train_batch_size: int = Field(
        8, gt=0, le=MOST_ROWS, description="rows per micro-batch on each device"
    )
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="micro-batches per optimizer step"
    )
    optimizer: Literal["adamw", "adamw8bit", "sgd"] = Field(
        "adamw",
        description="AdamW or SGD; adamw8bit holds AdamW's two moments in 8 bits (bitsandbytes)",
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scale: LrScale = LrScale()
    frozen: tuple[Literal["tower", "projector", "language_model"], ...] = Field(
        (), description="parts of a vision-language model that are not trained"
    )
    schedule: Literal["cosine", "warmup_stable_decay", "constant"] = Field(
        "cosine", description="learning rate schedule after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="number of linear warm-up steps")
    decay_steps: int = Field(
        0, ge=0, description="warmup_stable_decay: number of final decay steps"
    )
    weight_decay: float = Field(0.1, ge=0, description="weight decay, except for norms and biases")
    adam_beta2: float = Field(
        0.95, gt=0, lt=1, description="adamw, adamw8bit: decay rate of the second moment"
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="gradient norm to clip at; 0 disables clipping"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass to save memory"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="precision of forward and backward passes; master weights are float32; auto: "
        "bf16 on a GPU that supports it and on a CPU that has it natively",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = Field(
        "auto",
        description="attention implementation; auto: flex_attention for training on a GPU with "
        "rows of 1024 tokens or more, else sdpa, or eager for models without it",
    )
    compile: bool = Field(
        False, description="compile the layers with torch.compile; the first steps are slow"
    )
    seed: int = Field(0, ge=0, description="random seed for data order, noise and initialization")
    logging_steps: int = Field(25, gt=0, description="steps between log lines")
    save_steps: int = Field(500, gt=0, description="steps between training checkpoints")
    save_total_limit: int = Field(2, gt=0, description="number of training checkpoints to keep")
    report_to: str = Field(
        "none", description="where to report metrics: wandb, tensorboard, trackio, none ..."
    )


class Eval(Section):
    """The likelihood bound of fixed rows under fixed noise, during training."""

    data: str | None = Field(
        None, description="evaluation file; null: rows held out of the training data"
    )
    rows: int = Field(16, gt=0, description="number of evaluation rows")
    length: int = Field(128, gt=1, description="tokens in an evaluation row")
    samples: int = Field(4, gt=0, le=MOST_SAMPLES, description="noise draws per row")
    steps: int | None = Field(
        None,
        ge=0,
        description="training steps between evaluations; 0: never; null: only before and after "
        "training, if there are enough data to hold some out",
    )
    panel_steps: int = Field(
        0, ge=0, description="training steps between displays of a sample being denoised; 0: never"
    )


class Peft(Section):
    """Adapters instead of full tuning: the model is frozen, and small matrices are trained."""

    method: Literal["lora", "dora"] = Field("lora", description="kind of adapter")
    r: int = Field(16, gt=0, description="rank")
    alpha: float = Field(
        32.0, gt=0, description="scale of the update, which is multiplied by alpha / r"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the adapter")
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="all-linear, or a list of linear layers, for example [q_proj, v_proj]; of a "
        "vision-language model those of the language model, unless a name is found nowhere else",
    )
    mask_row: bool = Field(True, description="also train the embedding of the mask token")

    @model_validator(mode="after")
    def _names_are_a_list(self) -> Peft:
        if self.targets == () or (isinstance(self.targets, str) and self.targets != "all-linear"):
            raise ValueError("targets must be all-linear or a list of names")
        return self


class Quantization(Section):
    """How the frozen weights under an adapter are stored (QLoRA)."""

    bits: Literal[4] = Field(4, description="bits per weight")
    kind: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type")
    double: bool = Field(True, description="quantize the quantization scales too")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="type to compute in; auto: bfloat16 on a GPU that supports it, else float32",
    )
