"""A checkpoint in memory: model, tokenizer and spec, loaded from a folder after every check."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
)

from ..core.attention import layer_windows
from ..core.draft import Draft
from ..core.errors import Ar2DiffError, first_line, is_panic, option, shortened
from ..core.fitted import NOISE_FILE, read_fitted
from ..core.forward import context_length
from ..core.head import ATTRIBUTE, BigramHead, read_head
from ..core.images import image_token_of, marks_of, prepare
from ..core.masked_lm import is_masked_lm
from ..core.noise import Noise
from ..core.options import MODES, RULE, SAFE_THRESHOLD, THRESHOLD
from ..core.spec import CAUSAL, HEAD_FILE, Spec
from ..data.album import Album
from ..data.template_trial import check_cost, templates_of
from ..diffusion.objective import suppressed_ids
from .files import (
    CONFIG,
    IDS,
    check_counts,
    check_ids,
    inside,
    read_config,
    read_json,
    read_spec,
)
from .four_bit import bits_and_bytes, check_four_bit_shapes, keep_unpacked
from .kinds import loader_of, outline_of, refuse_other_kinds
from .processor import load_processor, take_tokenizer
from .stored import StoredTensor, stored_tensors

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
MOST_NUMBERS = 16  # most numbers per stored byte: 8 at 1 bit each, and some to spare
SMALL = 10_000_000  # numbers that cost nothing, whatever is stored
MOST_EXTRA = 16  # tokens that a tokenizer may have more than the weights have rows
MOST_TOKENS = 10_000_000
DROPOUT = re.compile(r"dropout|pdrop")  # in keys of configs


@dataclass
class Checkpoint:
    """A loaded checkpoint: model (float32 unless asked), tokenizer, spec (None: still an AR model).

    `stored` maps a tensor's name to the dtype in which the files hold it; `base` is the converted
    model under an adapter (`adapters.Base`), None where there is none; `draft` is a draft adapter
    beside the model, or None; `notes` are what its user should know of the conversion;
    `processor_path` is the folder of the processor, if that is another one (under an adapter).
    """

    path: Path
    model: Any
    tokenizer: Any
    spec: Spec | None
    stored: dict[str, str]
    commit: str | None = None
    base: Any = None
    draft: Draft | None = None
    notes: list[str] = field(default_factory=list)
    processor_path: Path | None = None
    _token_ids: frozenset[int] = field(default=frozenset(), repr=False)
    _suppressed: tuple[Any, Tensor | None] = field(default=(None, None), repr=False)

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends a text; training ends documents with the first."""
        for holder in (self.model.generation_config, self.model.config, self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            if ids is not None and ids != []:
                return ids if isinstance(ids, list) else [ids]
        separator = self.tokenizer.sep_token_id  # with which BERT's texts end
        return [separator] if self.is_masked_lm and separator is not None else []

    @property
    def is_masked_lm(self) -> bool:
        """Whether the class of the model is one for masked language modelling."""
        return is_masked_lm(self.model.config.architectures)

    @property
    def sees_images(self) -> bool:
        """Whether it is a vision-language model."""
        return image_token_of(self.model.config) is not None

    @property
    def processor(self) -> Any:
        """The processor of a vision-language model, around its tokenizer; errors as of
        `load_processor`."""
        take_tokenizer(self._processor, self.tokenizer)
        return self._processor

    @cached_property
    def _processor(self) -> Any:
        # Of an adapter, that of its base, which is where the tower is.
        return load_processor(self.processor_path or self.path)

    @cached_property
    def album(self) -> Album | None:
        """The images of a run; None for a model of text."""
        return Album(self.processor, self.model) if self.sees_images else None

    def words_of(self, ids: Sequence[int]) -> list[int]:
        """Ids as its tokenizer knows them: placeholders for those of images, below 0."""
        token = image_token_of(self.model.config)
        return [token if one < 0 else one for one in ids]

    @property
    def token_ids(self) -> frozenset[int]:
        """Ids that the tokenizer has a token for; a vocabulary may have holes."""
        if len(self._token_ids) != len(self.tokenizer):
            self._token_ids = frozenset(self.tokenizer.get_vocab().values())
        return self._token_ids

    @property
    def suppressed(self) -> Tensor:
        """[V] bool: ids that the model can never mean. It is kept, and must not be written to."""
        mask_token_id = self.spec.mask_token_id if self.spec else None
        rows = self.model.config.get_text_config().vocab_size  # weights may be cut to shards
        key = mask_token_id, rows, len(self.tokenizer)
        if self._suppressed[0] != key:
            meant = self.token_ids - marks_of(self.model.config)
            self._suppressed = key, suppressed_ids(mask_token_id, meant, rows)
        return self._suppressed[1]

    @property
    def noise(self) -> Noise:
        """The noise of the spec, over the model's vocabulary."""
        spec = self.spec_or_causal
        return spec.noise.on(spec.mask_token_id, self.suppressed)

    @property
    def spec_or_causal(self) -> Spec:
        """The spec; of an unconverted model that of its AR mode, where no token is a mask.

        Raises:
            Ar2DiffError: it is an unconverted masked language model, which has no AR mode.
        """
        refuse_unconverted(self)
        return self.spec or causal_spec(self.model)

    @property
    def read_as(self) -> Spec:
        """The spec with which it is decoded: with a draft adapter, that of its AR mode and of the
        masks that the adapter reads."""
        return self.draft.spec_for(self.spec) if self.draft else self.spec_or_causal


def load_model(
    path: Path,
    attn_implementation: str = "auto",
    device: str | None = None,
    quantization: Any = None,
    dtype: str = "float32",
) -> Checkpoint:
    """Load the whole model in a folder, after every check that costs nothing. No code in the folder
    is run.

    Args:
        attn_implementation: `auto` is sdpa, or eager if the class lacks it.
        device: None leaves the model on the CPU; `auto` puts it on the accelerator if there is one.
        quantization: a recipe's section: linear layers in 4 bits, all else as it is stored.
        dtype: `float32` (float64 if the weights are stored so), `stored`, `auto`: as stored on a
            GPU and float32 on a CPU, or another dtype of torch by name.

    Raises:
        Ar2DiffError: it is no language model of a kind that can be converted, its weights are
            incomplete, its tokenizer does not match, its spec is not one that this version honours,
            its diffusion head is not the one that the spec names, or its layers cannot be held in
            4 bits on a CPU.
    """
    values = read_config(path)
    spec = read_spec(path)
    refuse_other_kinds(path, values)
    check_ids(path)  # and that there is JSON: transformers ignores a generation config without
    tensors = stored_tensors(path)
    stored = {tensor.name: tensor.dtype for tensor in tensors}
    config = load_config(path, len(tensors))
    tokenizer = load_tokenizer(path)
    if quantization is not None:
        kind, quantized = "auto", {"quantization_config": bits_and_bytes(quantization)}
    else:
        on_gpu = device == "auto" and torch.cuda.is_available()
        kind, quantized = _dtype(dtype, stored, on_gpu), {}
    try:
        outline = outline_of(config)
        _refuse_size(path, outline, tensors)
        if quantization is not None:
            check_four_bit_shapes(path, outline)
        model, report = loader_of(config).from_pretrained(
            path,
            config=config,
            dtype=kind,
            attn_implementation=None if attn_implementation == "auto" else attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **quantized,
        )
    except Ar2DiffError:
        raise
    except Exception as error:  # from a config of the wrong type to a class without sdpa
        raise Ar2DiffError(
            f"model {path} cannot be loaded ({first_line(error)})",
            "check that config.json and the weights belong together",
        ) from error
    keep_unpacked(model)
    if report["missing_keys"] or report.get("mismatched_keys"):
        names = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", [])]))
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        raise Ar2DiffError(
            f"model {path}: the weights lack {names[0]}{more}",
            "check that config.json and the weights belong together",
        )
    check_rows(path, model, tokenizer, spec)
    embeddings = model.get_input_embeddings()
    if len(tokenizer) > (rows := len(embeddings.weight)):
        embeddings.register_forward_pre_hook(partial(_refuse_extra, rows))
    if spec is not None and spec.head is not None:
        rows = model.config.get_text_config().vocab_size
        put_head(model, read_head(inside(path, HEAD_FILE), rows, spec.head))
    if spec is not None and spec.noise.fitted is not None:
        read_fitted(model, spec.noise, inside(path, NOISE_FILE))
    prepare(model)
    if device == "auto" and quantization is None:  # bitsandbytes puts it there by itself
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    commit = path.name if path.parent.name == "snapshots" else None
    return Checkpoint(path, model.eval(), tokenizer, spec, stored, commit)


def load_config(path: Path, tensors: int | None = None) -> Any:
    """The config of a folder, as a stock class of transformers.

    Args:
        tensors: the number of stored tensors; None if there are no weights to go by.

    Raises:
        Ar2DiffError: its counts are far too high, it needs code of its own, or a value has
            the wrong type.
    """
    values = read_config(path)
    check_counts(path, values, tensors)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        foreign = "auto_map" in values
        raise Ar2DiffError(
            f"{path / CONFIG}: model_type is {shortened(kind)}, which transformers "
            f"{transformers.__version__} does not know"
            f"{'; ar2diff never runs the code in the folder' if foreign else ''}",
            "if it is a diffusion model of another family, run 'ar2diff import' on it first"
            if foreign
            else "upgrade transformers, or use another checkpoint",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        described = config.get_text_config().to_dict()
    except Exception as error:  # of any class: from a wrong type to heads that do not divide
        raise Ar2DiffError(
            f"{path / CONFIG}: it does not describe a {kind} model ({first_line(error)})",
            "correct it, or download the checkpoint again",
        ) from error
    window = described.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise Ar2DiffError(
            f"{path / CONFIG}: sliding_window is {shortened(window)}, but must be a number of "
            "tokens",
            "correct it, or download the checkpoint again",
        )
    for name, value in described.items():
        if DROPOUT.search(name) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise Ar2DiffError(
                f"{path / CONFIG}: {shortened(name)} is {value}, but must lie between 0 and 1",
                "correct it, or download the checkpoint again",
            )
    return config


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, as a stock class of transformers. Its chat templates have been
    tried, so none of them runs forever.

    Raises:
        Ar2DiffError: it needs code of its own, does not load, cannot tokenize, or has a chat
            template that costs too much.
    """
    settings = path / "tokenizer_config.json"
    values = read_json(settings, "") if settings.is_file() else {}
    for name, value in values.items():
        if type(value) is int and value > MOST_TOKENS and "len" not in name:
            raise Ar2DiffError(
                f"{settings}: {shortened(name)} is {value}, which is more than {MOST_TOKENS} "
                "tokens",
                "download the checkpoint again, or correct the file",
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.decode(tokenizer("a b").input_ids)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise _no_tokenizer(path, values, error) from error
    for template in templates_of(tokenizer):
        try:
            check_cost(template, tokenizer.special_tokens_map)
        except Ar2DiffError as error:
            raise error.about(f"model {path}") from None
    return tokenizer


def _no_tokenizer(path: Path, values: dict[str, Any], error: BaseException) -> Ar2DiffError:
    """The error for a tokenizer that does not load, with what to do about it."""
    model, whole = path / "tokenizer.model", (path / "tokenizer.json").is_file()
    if model.is_file() and not whole:
        with model.open("rb") as stream:
            pieces = stream.read(1) == b"\n"  # a protobuf; tiktoken's files begin with base64
        library = "sentencepiece" if pieces else "tiktoken"
        if importlib.util.find_spec(library) is None:
            return Ar2DiffError(
                f"model {path}: its tokenizer is a {library} model, {model.name}, and {library} is "
                "not installed",
                f"pip install {library}, or add a tokenizer.json to the folder",
            )
    if "auto_map" in values and "trust_remote_code" in str(error):
        return Ar2DiffError(
            f"model {path}: its tokenizer needs code from the folder, which ar2diff never runs",
            "add a tokenizer.json to the folder, and remove auto_map from tokenizer_config.json",
        )
    return Ar2DiffError(
        f"model {path}: its tokenizer cannot be loaded ({first_line(error)})",
        "add the files of its tokenizer to the folder, or download them again",
    )


def _dtype(name: str, stored: dict[str, str], on_gpu: bool) -> Any:
    if name == "auto":
        name = "stored" if on_gpu else "float32"
    if name == "stored":
        return DTYPES.get(_most_common(stored), torch.float32)
    if name == "float32" and "F64" in stored.values():
        return torch.float64
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise Ar2DiffError(
            f"{option('dtype')} {shortened(name)} is not a floating-point type of torch",
            f"set {option('dtype')} to auto, stored, float32, bfloat16 or float16",
        )
    return found


def refuse_unconverted(checkpoint: Checkpoint) -> None:
    """Refuse a masked language model as it came, which has no AR mode to use instead.

    Raises:
        Ar2DiffError: it is one.
    """
    if checkpoint.spec is None and checkpoint.is_masked_lm:
        raise no_ar_mode(checkpoint.path)


def no_ar_mode(path: Path) -> Ar2DiffError:
    """The error for the use of an unconverted masked language model as an AR model."""
    return Ar2DiffError(
        f"model {path} is a masked language model: it writes and scores no text before it is "
        "converted",
        f"convert it with 'ar2diff adapt {path} --output-dir DIR'",
    )


def _refuse_size(path: Path, outline: Any, tensors: list[StoredTensor]) -> None:
    """Refuse a config whose model would be far larger than the weights: the libraries would
    allocate memory for missing weights before reporting them."""
    held = {id(t): t.numel() for t in (*outline.parameters(), *outline.buffers())}
    wanted, there = sum(held.values()), sum(t.size for t in tensors)
    if wanted > MOST_NUMBERS * there + SMALL:
        raise Ar2DiffError(
            f"model {path}: config.json describes a model with {wanted} parameters, but the "
            f"weights have only {there} bytes",
            "check that config.json and the weights belong together",
        )


def check_rows(path: Path, model: Any, tokenizer: Any, spec: Spec | None) -> None:
    """Check that the ids of the tokenizer, but for a few, and those in the configs have rows.

    The official tokenizers of some models have a token or two more than the weights have rows, for
    models of the same family that take images too. No text ever means them.

    Raises:
        Ar2DiffError: the tokenizer or the mask token does not belong to the weights.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    # Vocabularies are padded to a round number of rows, not by a tenth of their size.
    if len(tokenizer) - rows > MOST_EXTRA or rows - len(tokenizer) > max(1024, rows // 10):
        raise Ar2DiffError(
            f"model {path}: the tokenizer has {len(tokenizer)} tokens, but the weights have "
            f"{rows} rows",
            "use the tokenizer that the model was trained with",
        )
    if spec is not None and spec.mask_token_id >= rows:
        raise Ar2DiffError(
            f"model {path}: mask_token_id {spec.mask_token_id} is out of range: the weights have "
            f"{rows} rows",
            "convert the base model again",
        )
    generation = model.generation_config
    for config in (model.config, model.config.get_text_config(), generation):
        _drop_ids(config, rows)
    extra = range(rows, len(tokenizer))
    if extra:
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *extra})


def put_head(model: Any, head: BigramHead) -> None:
    """Have a model carry a diffusion head: as a module of its own, which optimizers and training
    checkpoints include."""
    setattr(model, ATTRIBUTE, head.to(model.device))


def _refuse_extra(rows: int, embeddings: Any, args: tuple[Tensor, ...]) -> None:
    """Refuse a text that spells a token which has no row; a conversion adds the missing rows."""
    if embeddings.weight.shape[0] == rows and args[0].numel() and args[0].max() >= rows:
        raise Ar2DiffError(
            f"a text contains token id {int(args[0].max())}, but the weights have only {rows} rows",
            "remove that special token from the text",
        )


def _drop_ids(config: Any, rows: int) -> None:
    """Take ids that have no row out of a config: nothing can ever mean them. Many configs carry the
    defaults of their class, or the ids of a base with more tokens."""
    for name in IDS:
        given = getattr(config, name, None)
        ids = given if isinstance(given, list) else [] if given is None else [given]
        kept = [value for value in ids if 0 <= value < rows]
        if len(kept) < len(ids):
            setattr(config, name, kept or None if isinstance(given, list) else None)


def count_parameters(checkpoint: Checkpoint) -> tuple[int, int]:
    """The numbers of trainable and of all parameters; quantized weights count unpacked."""
    model, draft = checkpoint.model, checkpoint.draft
    if draft is not None:
        trained, whole = (sum(p.numel() for p in m.parameters()) for m in (draft, model))
        return trained, whole + trained
    if hasattr(model, "get_nb_trainable_parameters"):  # an adapter of peft
        return model.get_nb_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def stored_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype in which a parameter is written: as in the base, or, if it is new, the base's most
    common one."""
    found = checkpoint.stored.get(name) or _most_common(checkpoint.stored)
    return DTYPES.get(found, torch.float32)


def _most_common(stored: dict[str, str]) -> str:
    found = Counter(stored.values()).most_common(1)
    return found[0][0] if found else "F32"


def write_spec(checkpoint: Checkpoint, spec: Spec) -> None:
    """Put the spec into the model's config, and what depends on it into the generation config."""
    config, generation = checkpoint.model.config, checkpoint.model.generation_config
    config.diffusion = spec.to_dict()
    config.mask_token_id = spec.mask_token_id
    if spec.attention == "causal_context":
        config.get_text_config().__dict__.pop("is_causal", None)  # plain engines run the AR model
    else:
        config.get_text_config().is_causal = False  # where vision-language models read it, too
    # A file marked as made from a model's config loses its sampler settings when it is read.
    generation._from_model_config = None
    ends = checkpoint.end_ids
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    rows = config.get_text_config().vocab_size  # weights may be cut to shards
    suppressed = {*(generation.suppress_tokens or ())}  # the base's own, or of a conversion before
    if checkpoint.spec is not None:  # since when a row may have become an end token
        suppressed -= {*ends}
    # Of a padded vocabulary, or of one with holes; and what stands for images.
    unused = {*range(rows)} - checkpoint.token_ids | marks_of(config)
    generation.suppress_tokens = sorted({*suppressed, *unused, spec.mask_token_id})
    _choose_mode(generation, spec, checkpoint.spec)
    generation.pad_token_id = checkpoint.tokenizer.pad_token_id
    generation.max_new_tokens = None
    checkpoint.spec = spec


def _choose_mode(generation: Any, spec: Spec, old: Spec | None) -> None:
    """Put the mode in which a model decodes by default into its generation config: lossless where
    there is an AR mode, else diffusion. Which tokens a forward of that mode decides is left as it
    is, but where no AR mode stands behind it, the threshold is the safe one until the text at the
    default threshold has been measured (`evaluation.quality`).

    Args:
        old: the spec until now; None for a model that is being converted.
    """
    gained = old is not None and spec.lossless and not old.lossless  # by another noise
    if not spec.lossless or gained or getattr(generation, "mode", None) not in MODES:
        generation.mode = "speculative" if spec.lossless else "diffusion"
    if spec.noise.free:  # which has steps alone
        generation.threshold = generation.entropy_bound = None
        return
    rule = {name: getattr(generation, name, None) for name in RULE}
    rule = {name: value for name, value in rule.items() if value is not None}
    lost = old is not None and old.lossless and not spec.lossless
    if not rule or (lost and rule == {"threshold": THRESHOLD}):
        generation.threshold = THRESHOLD if spec.lossless else SAFE_THRESHOLD


def causal_spec(model: Any) -> Spec:
    """An unconverted model as a spec: its AR mode alone, with a mask id that no token has."""
    config = model.config.get_text_config()
    return replace(
        CAUSAL,
        mask_token_id=model.get_input_embeddings().weight.shape[0],
        local_window="kept" if any(layer_windows(config, "kept").values()) else None,
        max_length=context_length(model) or 0,
    )
