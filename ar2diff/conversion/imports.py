"""Checkpoints of other diffusion families, written as converted folders of ours: the config of the
stock class, the same bytes under its tensor names, and the spec. None of their code runs, and no
tensor is loaded.

Weights are copied from file to file, so the dtype stays and the memory needed does not depend on
the size of the model. `ar2diff check` tells whether the result does what its spec says.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from .. import __version__
from ..checkpoint.files import (
    check_counts,
    find_checkpoint,
    is_adapter,
    read_config,
    read_json,
    refuse_draft,
    weight_files,
)
from ..checkpoint.io import check_saving, save_beside
from ..checkpoint.model import Checkpoint, load_tokenizer, write_spec
from ..checkpoint.output import check_output, claimed, write_json
from ..checkpoint.stored import stored_dtypes, stored_tensors
from ..core.errors import Ar2DiffError, first_line, option, shortened
from ..core.noises import Mask
from ..core.spec import FORMAT, Spec
from .convert import MASK_TOKEN, set_pad
from .families import Family, family_of
from .tensors import check_tensors, renamed_tensors, same_bytes, write_shards

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "*.model", "chat_template.jinja",
)  # fmt: skip
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# What no shape of a tensor reveals: a wrong default would go unnoticed.
REQUIRED = (
    "num_attention_heads", "rms_norm_eps", "num_experts_per_tok", "routed_scaling_factor",
    "n_group", "topk_group",
)  # fmt: skip
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        model: the model as it was given. family: the family it belongs to.
        loads_as: the stock class. dtype: the dtype of most tensors. parameters: their number.
        diffusion: the spec.
    """

    model: str
    family: str
    loads_as: str
    dtype: str
    parameters: int
    diffusion: dict[str, Any]


def import_checkpoint(
    reference: str,
    output_dir: str | Path,
    *,
    block_length: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Imported:
    """Write a foreign diffusion checkpoint as a converted folder of ours.

    Args:
        reference: folder or Hub id.
        output_dir: a new or empty folder.
        block_length: the length of the blocks it was trained on; None: as its config says, else
            as is usual for its family.
        overwrite: replace the model that ar2diff wrote to `output_dir`.
        dry_run: check everything, but write nothing.

    Raises:
        Ar2DiffError: the family is not known; no stock class computes what the config asks for; the
            tensors are not those of the class; no mask token is found; as `claimed`.
    """
    path, output_dir = find_checkpoint(reference, weights=False), Path(output_dir)
    refuse_draft(path, "not a diffusion model of another family")
    if is_adapter(path):
        raise Ar2DiffError(
            f"model {path} is an adapter",
            "merge it into its base with the code that it was published with, and import the "
            "result",
        )
    theirs = read_config(path)
    family = family_of(theirs, path)
    check_output(output_dir, [path], overwrite=overwrite)
    path = find_checkpoint(reference)
    stored = stored_dtypes(path)
    check_counts(path, theirs, len(stored))
    model = _stock_model(family, theirs, path)
    common = max(stored.values(), key=list(stored.values()).count)
    model.config.dtype = DTYPES.get(common, "float32")
    _untie_other_head(path, family, model)
    tokenizer = _tokenizer(path, model.config, family)
    model.generation_config = GenerationConfig(**_ends(path, theirs, tokenizer))
    checkpoint = Checkpoint(path, model, tokenizer, None, stored)
    mask_token_id = _set_mask(checkpoint, theirs, family)
    _set_pad(checkpoint, mask_token_id)
    shards = [[*renamed_tensors(file, family, model)] for file in weight_files(path)]
    tensors = [tensor for shard in shards for tensor in shard]
    check_tensors(tensors, model, path)
    write_spec(checkpoint, _spec(family, theirs, path, model.config, mask_token_id, block_length))
    result = Imported(
        model=reference,
        family=family.name,
        loads_as=type(model).__name__,
        dtype=str(model.config.dtype).removeprefix("torch."),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        diffusion=checkpoint.spec.to_dict(),
    )
    check_saving(checkpoint)
    if dry_run:
        return result
    needed, record = sum(tensor.size for tensor in tensors), _record(reference, path)
    with (
        claimed(output_dir, [path], overwrite=overwrite, needed=needed) as output,
        output.staged(record | asdict(result)) as folder,
    ):
        write_shards(folder, shards)
        save_beside(checkpoint, folder)
    return result


def _record(reference: str, path: Path) -> dict[str, Any]:
    commit = path.name if path.parent.name == "snapshots" else None
    return {
        "ar2diff": __version__,
        "base_model": reference.rstrip("/"),
        "base_commit": commit,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _stock_model(family: Family, theirs: Mapping[str, Any], path: Path) -> Any:
    """The stock class without storage, made from those values of their config that it knows."""
    stock = CONFIG_MAPPING[family.stock]
    known = {*stock().to_dict(), *stock.attribute_map, "head_dim", *ROPE}
    known -= {"architectures", "model_type", "transformers_version", "_name_or_path", "dtype"}
    values = {name: theirs.get(name) for name in known}
    for name, key in family.keys.items():
        values[name] = values.get(name) if theirs.get(key) is None else theirs[key]
    values = {n: v for n, v in (values | family.values).items() if v is not None}
    rope = values.get("rope_parameters")
    rope = {**values, **(rope if isinstance(rope, dict) else {})}
    missing = [name for name in REQUIRED if name in known and name not in values]
    missing += [] if "rope_theta" in rope else ["rope_theta"]
    if missing:
        raise Ar2DiffError(
            f"model {path}: {family.keys.get(missing[0], missing[0])} is missing from its "
            "config.json",
            "add it, with the value that the code of the model uses",
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(stock(**values), trust_remote_code=False)
    except Exception as error:  # a value of the wrong type, heads that do not divide
        raise Ar2DiffError(
            f"model {path}: its config.json does not describe a {family.stock} model "
            f"({first_line(error)})",
            "download it again, or correct the value",
        ) from error
    model.config.architectures = [type(model).__name__]
    return model


def _untie_other_head(path: Path, family: Family, model: Any) -> None:
    """Keep a head that differs from the embeddings although the config ties the two."""
    if not model.config.tie_word_embeddings:
        return
    stored = {family.rename(tensor.name): tensor for tensor in stored_tensors(path)}
    for head, source in model.all_tied_weights_keys.items():
        if head in stored and source in stored and not same_bytes(stored[head], stored[source]):
            model.config.tie_word_embeddings = False


def _tokenizer(path: Path, config: Any, family: Family) -> Any:
    """Their tokenizer, loaded as a stock one: code that comes with it is not copied."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for pattern in TOKENIZER:
            for file in path.glob(pattern):
                if file.is_file() and file.suffix != ".py":
                    shutil.copy(file, folder)
        settings = folder / "tokenizer_config.json"
        values = read_json(settings, "put it beside the weights") if settings.is_file() else {}
        values.pop("auto_map", None)
        if not hasattr(transformers, str(values.get("tokenizer_class"))):
            whole = (folder / "tokenizer.json").is_file()
            values["tokenizer_class"] = "PreTrainedTokenizerFast" if whole else family.tokenizer
        write_json(settings, {name: value for name, value in values.items() if value is not None})
        config.save_pretrained(folder)
        try:
            tokenizer = load_tokenizer(folder)
        except Ar2DiffError as error:
            what = error.what.replace(str(folder), str(path))
            raise Ar2DiffError(what, error.fix) from error
    tokenizer.name_or_path = ""
    return tokenizer


def _ends(path: Path, theirs: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Their end tokens: those of the generation config, else of the config, and the tokenizer's.
    The other settings belong to another sampler."""
    file = path / "generation_config.json"
    said = read_json(file, "") if file.is_file() else {}
    ends = said.get("eos_token_id", theirs.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    ends = [end for end in [*ends, tokenizer.eos_token_id] if end is not None]
    ends = [end for number, end in enumerate(ends) if end not in ends[:number]]
    if any(type(end) is not int for end in ends):
        raise Ar2DiffError(
            f"model {path}: eos_token_id is {shortened(ends)}, but must be token ids",
            "correct it in its config.json or generation_config.json",
        )
    return {
        "bos_token_id": said.get("bos_token_id", tokenizer.bos_token_id),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }


def _set_mask(checkpoint: Checkpoint, theirs: Mapping[str, Any], family: Family) -> int:
    """Make the trained mask token the mask token of the tokenizer; it must not be a word."""
    tokenizer, path = checkpoint.tokenizer, checkpoint.path
    wanted = theirs.get("mask_token_id")
    if wanted is None and tokenizer.mask_token is None:
        wanted = family.mask_token_id
    token = tokenizer.mask_token or MASK_TOKEN
    if wanted is not None and type(wanted) is not int:
        raise Ar2DiffError(
            f"model {path}: mask_token_id is {shortened(wanted)} in its config.json, but must "
            "be an integer",
            "set it to the id that the code of the model uses for the mask",
        )
    if wanted is not None and wanted != tokenizer.mask_token_id:
        if tokenizer.mask_token is not None:
            raise Ar2DiffError(
                f"model {path}: mask_token_id is {wanted} in its config.json, but the tokenizer's "
                f"mask token {token} is {tokenizer.mask_token_id}",
                "make the two equal; the code that the model came with shows which one is right",
            )
        if wanted < len(tokenizer):
            token = tokenizer.convert_ids_to_tokens(wanted)
    known = tokenizer.get_vocab().get(token)
    if known is not None and known not in tokenizer.added_tokens_decoder:
        raise Ar2DiffError(
            f"model {path}: its mask token {token!r} ({known}) is an ordinary token of the "
            "vocabulary",
            "correct mask_token_id in its config.json",
        )
    tokenizer.add_special_tokens({"mask_token": token})
    rows = checkpoint.model.config.vocab_size
    if tokenizer.mask_token_id >= rows or wanted not in (None, tokenizer.mask_token_id):
        raise Ar2DiffError(
            f"model {path}: mask_token_id {wanted or tokenizer.mask_token_id} is out of range: the "
            f"tokenizer has {len(tokenizer) - (known is None)} tokens, and the weights have "
            f"{rows} rows",
            "use the tokenizer that the model was trained with",
        )
    return tokenizer.mask_token_id


def _set_pad(checkpoint: Checkpoint, mask_token_id: int) -> None:
    rows = checkpoint.model.config.vocab_size
    set_pad(checkpoint, mask_token_id)
    if checkpoint.tokenizer.pad_token_id >= rows:
        raise Ar2DiffError(
            f"model {checkpoint.path}: the pad token is an end token, and there is no free "
            "row for another one",
            "give its tokenizer a pad token that is not an end token",
        )


def _spec(
    family: Family,
    theirs: Mapping[str, Any],
    path: Path,
    config: Any,
    mask_token_id: int,
    block_length: int | None,
) -> Spec:
    attention = family.attention
    if block_length is not None and not family.blocks:
        blocks = "whole rows" if attention == "full" else f"blocks of {family.block_length}"
        raise Ar2DiffError(
            f"model {path}: {family.name} models are always trained on {blocks}",
            f"leave out {option('block_length')}",
        )
    if block_length is not None:
        attention = "block_causal"
    elif attention == "block_causal":
        said = theirs.get("block_size") if family.blocks else None
        block_length = said if type(said) is int and said > 0 else family.block_length
    context = config.get_text_config().max_position_embeddings
    return Spec(
        format=FORMAT,
        noise=Mask(),
        mask_token_id=mask_token_id,
        attention=attention,
        block_length=block_length,
        prediction=family.prediction,
        ar_mode=False,
        local_window=None,
        max_length=min(family.max_length or context, context),
    )
