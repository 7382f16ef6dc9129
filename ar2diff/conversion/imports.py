"""Checkpoints of other diffusion families, brought into the contract: the stock class's config,
its names for the same bytes, and the spec. None of their code runs, and no tensor is loaded.

Weights are copied from file to file, so the dtype stays what it is and memory does not depend on
the size of the model. Whether the result does what its spec says is for `ar2diff check`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from .. import __version__
from ..checkpoint.custom_generate import write_custom_generate
from ..checkpoint.files import (
    RUN_FILE,
    check_counts,
    find_checkpoint,
    is_adapter,
    read_config,
    read_json,
    stored_dtypes,
    weight_files,
)
from ..checkpoint.model import Checkpoint, load_tokenizer, write_spec
from ..checkpoint.output import check_disk, check_output, clear_output, staged, write_json
from ..core.errors import Ar2DiffError, first_line
from ..core.forward import context_length
from ..core.spec import FORMAT, Spec
from .convert import MASK_TOKEN, set_pad
from .families import Family, family_of
from .tensors import check_pieces, pieces_of, write_shards

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "*.model", "chat_template.jinja",
)  # fmt: skip
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# What no shape of a tensor tells, so that a default would go unseen.
REQUIRED = (
    "num_attention_heads", "rms_norm_eps", "num_experts_per_tok", "routed_scaling_factor",
    "n_group", "topk_group",
)  # fmt: skip
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def import_checkpoint(
    reference: str,
    output_dir: str | Path,
    *,
    block_length: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write a foreign diffusion checkpoint as a converted folder of ours.

    Args:
        reference: folder or Hub id.
        block_length: it was trained on blocks of this length; None: what its config says, else
            what its family is known for.

    Returns:
        model, family, loads_as (the stock class), dtype, parameters, diffusion (the spec).

    Raises:
        Ar2DiffError: its family is not known, no stock class computes what its config asks for,
            its tensors are not those of the class, its mask token is not to be found.
    """
    path, output_dir = find_checkpoint(reference, weights=False), Path(output_dir)
    if is_adapter(path):
        raise Ar2DiffError(
            f"model {path} is an adapter", "merge it into its base with the code it came from"
        )
    theirs = read_config(path)
    family = family_of(theirs, path)
    check_output(output_dir, [path], False, overwrite)
    path = find_checkpoint(reference)
    stored = stored_dtypes(path)
    check_counts(path, theirs, len(stored))
    model = _stock_model(family, theirs, path)
    common = max(stored.values(), key=list(stored.values()).count)
    model.config.dtype = DTYPES.get(common, "float32")
    tokenizer = _tokenizer(path, model.config, family)
    model.generation_config = GenerationConfig(**_ends(path, theirs, tokenizer))
    checkpoint = Checkpoint(path, model, tokenizer, None, stored)
    mask_token_id = _set_mask(checkpoint, theirs, family)
    _set_pad(checkpoint, mask_token_id)
    shards = [[*pieces_of(file, family, model)] for file in weight_files(path)]
    check_pieces(shards, model, path)
    write_spec(checkpoint, _spec(family, theirs, path, model.config, mask_token_id, block_length))
    result = {
        "model": reference,
        "family": family.name,
        "loads_as": type(model).__name__,
        "dtype": str(model.config.dtype).removeprefix("torch."),
        "parameters": sum(math.prod(piece.shape) for shard in shards for piece in shard),
        "diffusion": checkpoint.spec.to_dict(),
    }
    if dry_run:
        return result
    check_disk(output_dir, sum(piece.size for shard in shards for piece in shard))
    if overwrite and output_dir.is_dir():
        clear_output(output_dir)
    with staged(output_dir) as folder:
        write_shards(folder, shards)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_custom_generate(folder)
        write_json(folder / RUN_FILE, _record(reference, path) | result)
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
    """The stock class without storage, of their config's values: those that it knows, under its
    names."""
    stock = CONFIG_MAPPING[family.stock]
    known = {*stock().to_dict(), *stock.attribute_map, "head_dim", *ROPE}
    known -= {"architectures", "model_type", "transformers_version", "_name_or_path", "dtype"}
    values = {name: theirs.get(name) for name in known}
    for name, key in family.keys.items():
        values[name] = values.get(name) if theirs.get(key) is None else theirs[key]
    values = {n: v for n, v in (values | family.values).items() if v is not None}
    rope = {**values, **(values.get("rope_parameters") or {})}
    missing = [name for name in REQUIRED if name in known and name not in values]
    missing += [] if "rope_theta" in rope else ["rope_theta"]
    if missing:
        raise Ar2DiffError(
            f"model {path}: its config.json does not say {family.keys.get(missing[0], missing[0])}",
            "add what its own code takes for it",
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(stock(**values), trust_remote_code=False)
    except Exception as error:  # a value of the wrong type, heads that do not divide
        raise Ar2DiffError(
            f"model {path}: its config.json makes no {family.stock} model ({first_line(error)})",
            "download it again, or mend it",
        ) from error
    model.config.architectures = [type(model).__name__]
    return model


def _tokenizer(path: Path, config: Any, family: Family) -> Any:
    """Their tokenizer, loaded as a stock one: code of its own is left where it is."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for pattern in TOKENIZER:
            for file in path.glob(pattern):
                if file.is_file() and file.suffix != ".py":
                    shutil.copy(file, folder)
        settings = folder / "tokenizer_config.json"
        values = read_json(settings, "put it beside the weights") if settings.is_file() else {}
        values.pop("auto_map", None)
        if not hasattr(transformers, values.get("tokenizer_class") or ""):
            whole = (folder / "tokenizer.json").is_file()
            values["tokenizer_class"] = "PreTrainedTokenizerFast" if whole else family.tokenizer
        write_json(settings, {name: value for name, value in values.items() if value is not None})
        config.save_pretrained(folder)
        try:
            tokenizer = load_tokenizer(folder)
        except Ar2DiffError as error:
            raise Ar2DiffError(error.what.replace(str(folder), str(path)), error.fix) from error
    tokenizer.name_or_path = ""
    return tokenizer


def _ends(path: Path, theirs: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Their end tokens: those of the generation config, or the config, and the tokenizer's. Other
    settings are those of another sampler."""
    file = path / "generation_config.json"
    said = read_json(file, "") if file.is_file() else {}
    ends = said.get("eos_token_id", theirs.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    ends = [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id]) if end is not None]
    return {
        "bos_token_id": said.get("bos_token_id", tokenizer.bos_token_id),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }


def _set_mask(checkpoint: Checkpoint, theirs: Mapping[str, Any], family: Family) -> int:
    """Name the mask token in the tokenizer: it has a trained row, and must be no word."""
    tokenizer, path = checkpoint.tokenizer, checkpoint.path
    wanted = theirs.get("mask_token_id")
    if wanted is None and tokenizer.mask_token is None:
        wanted = family.mask_token_id
    token = tokenizer.mask_token or MASK_TOKEN
    if wanted is not None and type(wanted) is not int:
        raise Ar2DiffError(
            f"model {path}: mask_token_id is {wanted!r} in its config.json, wanted a whole number",
            "set it to the id that its own code masks with",
        )
    if wanted is not None and wanted != tokenizer.mask_token_id:
        if tokenizer.mask_token is not None:
            raise Ar2DiffError(
                f"model {path}: mask_token_id is {wanted} in its config.json, the tokenizer's mask "
                f"token {token} is {tokenizer.mask_token_id}",
                "make the two equal; the code that it came with tells which is right",
            )
        if wanted < len(tokenizer):
            token = tokenizer.convert_ids_to_tokens(wanted)
    known = tokenizer.get_vocab().get(token)
    if known is not None and known not in tokenizer.added_tokens_decoder:
        raise Ar2DiffError(
            f"model {path}: its mask token {token!r} ({known}) is a word of the vocabulary",
            "check mask_token_id in its config.json",
        )
    tokenizer.add_special_tokens({"mask_token": token})
    rows = checkpoint.model.config.vocab_size
    if tokenizer.mask_token_id >= rows or wanted not in (None, tokenizer.mask_token_id):
        raise Ar2DiffError(
            f"model {path}: mask_token_id {wanted or tokenizer.mask_token_id} is none of the "
            f"{len(tokenizer) - (known is None)} tokens of the tokenizer and {rows} rows of the "
            "weights",
            "use the tokenizer that the model was trained with",
        )
    return tokenizer.mask_token_id


def _set_pad(checkpoint: Checkpoint, mask_token_id: int) -> None:
    rows = checkpoint.model.config.vocab_size
    set_pad(checkpoint.model, checkpoint.tokenizer, mask_token_id)
    if checkpoint.tokenizer.pad_token_id >= rows:
        raise Ar2DiffError(
            f"model {checkpoint.path}: its pad token ends texts, and no row is left for another",
            "give its tokenizer a pad token that is no end token",
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
            f"model {path}: {family.name} models are trained on {blocks}",
            "leave --block-length out",
        )
    if block_length is not None:
        attention = "block_causal"
    elif attention == "block_causal":
        said = theirs.get("block_size") if family.blocks else None
        block_length = said if type(said) is int and said > 0 else family.block_length
    context = context_length(config)
    return Spec(
        format=FORMAT,
        noise="mask",
        mask_token_id=mask_token_id,
        attention=attention,
        block_length=block_length,
        prediction=family.prediction,
        ar_mode=False,
        local_window=None,
        max_length=min(family.max_length or context, context),
    )
