"""Checkpoints on disk and on the Hub: found, checked before they are loaded, written whole or not
at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Ar2DiffError, first_line
from .spec import Spec, SpecError

RUN_FILE = "ar2diff.json"  # provenance; its presence marks a folder as ours to overwrite
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSION = "diffusion.json"  # of an adapter: what config.json's block is to a whole model
LAST = ("config.json", ADAPTER_CONFIG)  # what a folder is known by is put there last
FOUR_BIT_BLOCK = 64  # weights that share a scale; the only size that recipes can ask for
FULL = 1 << 22  # bytes free under which a failed write is put down to a full disk
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # what a Hub id is asked for
CODE = ["custom_generate/*"]  # and what is read, never run, by those who compare it
OURS = [  # what a run of ours leaves in its folder, and --overwrite takes away
    RUN_FILE, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates", "custom_generate", "checkpoints",
    ADAPTER_CONFIG, DIFFUSION, "configuration_*.py",
    "*.partial",
]  # fmt: skip


@dataclass
class Checkpoint:
    """A loaded checkpoint: model (float32 unless asked), tokenizer, spec (None: still an AR model).

    `stored` maps a tensor's name to the dtype in which the files hold it; `base` is the converted
    model under an adapter (`adapters.Base`), None where there is none.
    """

    path: Path
    model: Any
    tokenizer: Any
    spec: Spec | None
    stored: dict[str, str]
    commit: str | None = None
    base: Any = None

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends a text; training ends documents with the first."""
        for holder in (self.model.generation_config, self.model.config, self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            if ids is not None and ids != []:
                return ids if isinstance(ids, list) else [ids]
        return []


def find_checkpoint(reference: str, code: bool = False, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local folder, or a Hub id with an optional `@revision`.

    Args:
        code: download the decoding code too. weights: and the weights.

    Raises:
        Ar2DiffError: neither is there.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() or reference.startswith(("/", ".", "~")) or reference.count("/") > 1:
        raise Ar2DiffError(f"model {reference}: no such folder", "give a folder or a Hub id")
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=FILES + (CODE if code else []),
                ignore_patterns=[*([] if code else CODE), *([] if weights else ["*.safetensors"])],
            )
        )
    except Exception as error:  # huggingface_hub, httpx and OS errors alike mean: not to be had
        raise Ar2DiffError(
            f"model {reference}: no folder, and not to be had from the Hub ({first_line(error)})",
            "check the name and the connection, or give a local folder",
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder."""
    return read_json(path / "config.json", "a checkpoint folder has a config.json")


def read_spec(path: Path) -> Spec | None:
    """The spec of a folder; None where it is an unconverted model.

    Raises:
        Ar2DiffError: the spec is not one that this version honours.
    """
    if is_adapter(path):
        return adapter_spec(path)
    try:
        return Spec.from_config(read_config(path))
    except SpecError as error:
        raise Ar2DiffError(f"{path}: {error.what}", error.fix) from None


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter; the libraries take one with a config.json for one too."""
    return (path / ADAPTER_CONFIG).is_file()


def adapter_spec(path: Path) -> Spec:
    """What an adapter folder makes of its base.

    Raises:
        Ar2DiffError: it is not an adapter of ours, or its spec is not one we honour.
    """
    if not (path / DIFFUSION).is_file():
        raise Ar2DiffError(
            f"adapter {path}: it has no {DIFFUSION}, so it is none of a diffusion model",
            "train one with a peft section, on a converted model",
        )
    block = read_json(path / DIFFUSION, "").get("diffusion") or {"format": 0}
    try:
        return Spec.from_config({"diffusion": block, "mask_token_id": block.get("mask_token_id")})
    except SpecError as error:
        what = error.what.replace("config.json", DIFFUSION)
        raise Ar2DiffError(f"adapter {path}: {what}", error.fix) from None


def stored_dtypes(path: Path) -> dict[str, str]:
    """Dtype of each stored tensor, read from the safetensors headers; checks that no file is cut.

    Raises:
        Ar2DiffError: as `weight_files`; a missing shard, a cut file.
    """
    dtypes: dict[str, str] = {}
    for file in weight_files(path):
        dtypes |= tensor_dtypes(file)
    return dtypes


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names.

    Raises:
        Ar2DiffError: there are none (pickles are never opened).
    """
    index = path / f"{WEIGHTS}.index.json"
    if index.is_file():
        names = read_json(index, "").get("weight_map")
        if not isinstance(names, dict) or not names:
            raise Ar2DiffError(f"{index}: it has no weight_map", "download the checkpoint again")
        shards = sorted(set(names.values()))
    else:
        shards = [WEIGHTS]
    if not (path / shards[0]).is_file():
        pickled = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickled:
            raise Ar2DiffError(
                f"model {path}: its weights are pickled ({pickled[0]}), which can run code",
                "convert them to safetensors first",
            )
        raise Ar2DiffError(
            f"model {path}: config.json is there but {shards[0]} is not",
            "download the checkpoint again",
        )
    return [path / shard for shard in shards]


def tensor_dtypes(file: Path) -> dict[str, str]:
    """Dtype of each tensor of a safetensors file.

    Raises:
        Ar2DiffError: it is missing, or cut.
    """
    cut = Ar2DiffError(f"model {file}: the file is cut short or damaged", "download it again")
    if not file.is_file():
        raise Ar2DiffError(f"model {file}: this shard is missing", "download it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise cut
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise cut from None
    try:
        header.pop("__metadata__", None)
        ends = [8 + length + entry["data_offsets"][1] for entry in header.values()]
        dtypes = {name: entry["dtype"] for name, entry in header.items()}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise cut from None
    if any(end > size for end in ends):
        raise cut
    return dtypes


def load_checkpoint(
    reference: str,
    attn_implementation: str = "auto",
    device: str | None = None,
    quantization: Any = None,
) -> Checkpoint:
    """Load a checkpoint, or an adapter on its base, in float32 (float64 if stored so), after every
    check that costs nothing.

    Args:
        attn_implementation: `auto` is sdpa, or eager where the class lacks it.
        device: None leaves the model on the CPU; `auto` puts it on the accelerator if there is one.
        quantization: a recipe's section: linear layers in 4 bits, all else as it is stored.

    Raises:
        Ar2DiffError: it is not a decoder, its weights are incomplete, its tokenizer does not match,
            its spec is not one we honour, or its layers cannot be held in 4 bits on a CPU.
    """
    path = find_checkpoint(reference)
    if is_adapter(path):
        from .adapters import load_adapter

        return load_adapter(path, attn_implementation, device, quantization)
    config = read_config(path)
    spec = read_spec(path)
    _refuse_non_decoder(path, config)
    stored = stored_dtypes(path)

    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path)
    dtype = torch.float64 if "F64" in stored.values() else torch.float32
    quantized: dict[str, Any] = {}
    if quantization is not None:
        quantized["quantization_config"] = _bits_and_bytes(quantization)
        _check_four_bit_shapes(path)
        dtype = "auto"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=None if attn_implementation == "auto" else attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **quantized,
        )
    except Exception as error:  # from a config of the wrong type to a class without sdpa
        raise Ar2DiffError(
            f"model {path}: does not load ({first_line(error)})",
            "check that config.json and the weights belong together",
        ) from error
    _keep_unpacked(model)
    if report["missing_keys"] or report.get("mismatched_keys"):
        names = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", [])]))
        raise Ar2DiffError(
            f"model {path}: the weights lack {names[0]} and {len(names) - 1} more tensors",
            "check that config.json and the weights belong together",
        )
    rows = model.get_input_embeddings().weight.shape[0]
    # Vocabularies are padded to a round number of rows, not by a tenth of their size.
    if len(tokenizer) > rows or rows - len(tokenizer) > max(1024, rows // 10):
        raise Ar2DiffError(
            f"model {path}: the tokenizer has {len(tokenizer)} tokens, the weights {rows} rows",
            "use the tokenizer that the model was trained with",
        )
    if spec is not None and spec.mask_token_id >= rows:
        raise Ar2DiffError(
            f"model {path}: mask_token_id {spec.mask_token_id} is out of range, {rows} rows",
            "convert the base model again",
        )
    if device == "auto" and quantization is None:  # which puts it there by itself
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    commit = path.name if path.parent.name == "snapshots" else None
    return Checkpoint(path, model.eval(), tokenizer, spec, stored, commit)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        Ar2DiffError: it does not load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise Ar2DiffError(
            f"model {path}: its tokenizer does not load ({first_line(error)})",
            "put the tokenizer's files beside the weights",
        ) from error


def _bits_and_bytes(quantization: Any) -> Any:
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise Ar2DiffError(
            "quantization needs bitsandbytes, which is not installed",
            "pip install 'ar2diff[qlora]', or set quantization=null",
        )
    dtype = quantization.compute_dtype
    if dtype == "auto":
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if gpu else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=quantization.bits == 4,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_four_bit_shapes(path: Path) -> None:
    """Refuse a model whose layers a CPU cannot hold in 4 bits, before its weights are read.

    bitsandbytes quantises blocks of 64 weights. Its CPU kernels take each row of a layer for whole
    blocks: of other rows they apply the wrong scales without a word, or fail, depending on the CPU.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    if torch.cuda.is_available():
        return
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # from a config of the wrong type to a class without sdpa
        raise Ar2DiffError(
            f"model {path}: does not load ({first_line(error)})",
            "check that config.json and the weights belong together",
        ) from error
    head = model.get_output_embeddings()  # it is never quantised
    for name, module in model.named_modules():
        if module is head or not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        inputs = module.nx if isinstance(module, Conv1D) else module.in_features
        if inputs % FOUR_BIT_BLOCK:
            raise Ar2DiffError(
                f"model {path}: layer {name} has {inputs} inputs; on a CPU, 4-bit layers need a "
                f"multiple of {FOUR_BIT_BLOCK}",
                "leave out the quantization section, or train on a GPU",
            )


def _keep_unpacked(model: Any) -> None:
    """Keep 4-bit layers in the form that trains, on every CPU.

    On a CPU with avx512_bf16, the first forward in eval mode would repack a layer for inference.
    That rounds its scales to bfloat16, and no gradient passes through it any more, so that the
    training that follows would silently go wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _refuse_non_decoder(path: Path, config: dict[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.get("architectures") or []
    decoders = {
        name
        for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([entry] if isinstance(entry, str) else entry)
    }
    if config.get("is_encoder_decoder") or not any(n in decoders for n in names):
        raise Ar2DiffError(
            f"model {path}: {', '.join(names) or 'it'} is not a decoder-only causal LM",
            "bring it in with 'ar2diff import', if it is a diffusion model of another family"
            if "auto_map" in config
            else "give an autoregressive checkpoint (LLaMA, Qwen, Mistral, GPT-2 ...)",
        )


@contextmanager
def staged(output_dir: Path) -> Iterator[Path]:
    """A folder inside `output_dir` to write a checkpoint into. On success its files move into
    place, each by one rename and those of `LAST` last; on failure nothing of it stays.

    Raises:
        Ar2DiffError: the disk is full, or not writable.
    """
    partial = output_dir / ".partial"
    mask = os.umask(0)
    os.umask(mask)
    existed = output_dir.is_dir()
    try:
        with disk_errors(output_dir):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    file.chmod(0o666 & ~mask)  # safetensors' are readable by their owner alone
                    sync(file)
            for entry in sorted(partial.iterdir(), key=lambda f: f.name in LAST):
                if (output_dir / entry.name).is_dir():
                    shutil.rmtree(output_dir / entry.name)
                entry.replace(output_dir / entry.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed and output_dir.is_dir() and not any(output_dir.iterdir()):
            output_dir.rmdir()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what an error of the file system means to the user.

    safetensors and torch wrap a full disk in classes of their own, so the disk is asked too.
    """
    full = Ar2DiffError(f"{path}: the disk is full", "free some space; a run goes on with --resume")
    try:
        yield
    except Ar2DiffError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
            raise full from error
        if isinstance(error, OSError):
            fix = "give another --output-dir"
            raise Ar2DiffError(f"{path}: {error.strerror or error}", fix) from error
        if shutil.disk_usage(_existing(path.resolve())).free < FULL:
            raise full from error
        raise


def check_output(output_dir: Path, inputs: list[Path], resume: bool, overwrite: bool) -> None:
    """Refuse a folder that a run must not write to. Changes nothing.

    Args:
        inputs: what the run reads: never to be overwritten.

    Raises:
        Ar2DiffError: it holds something, holds an input, is no folder, or is not writable.
    """
    target = output_dir.resolve()
    for path in inputs:
        if target == path.resolve() or target in path.resolve().parents:
            raise Ar2DiffError(
                f"output folder {output_dir} holds the input {path}", "give another --output-dir"
            )
    if output_dir.exists() and not output_dir.is_dir():
        raise Ar2DiffError(f"output folder {output_dir} is a file", "give another --output-dir")
    # A run killed while it wrote its first file leaves a .partial one, which is nobody's loss.
    if output_dir.is_dir() and any(p.suffix != ".partial" for p in output_dir.iterdir()):
        ours = (output_dir / RUN_FILE).is_file()
        if not (resume or overwrite):
            raise Ar2DiffError(
                f"output folder {output_dir} is not empty",
                "go on with --resume, replace it with --overwrite, or give another --output-dir",
            )
        if not ours:
            raise Ar2DiffError(
                f"output folder {output_dir} holds files that ar2diff did not write",
                "give another --output-dir",
            )
    if not os.access(_existing(target), os.W_OK):
        raise Ar2DiffError(f"{_existing(target)}: not writable", "give another --output-dir")


def check_disk(output_dir: Path, needed: int) -> None:
    """Refuse a disk that has fewer bytes free than a run will write."""
    parent = _existing(output_dir.resolve())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise Ar2DiffError(
            f"{parent}: the disk is full ({free / 1e6:,.0f} of {needed / 1e6:,.0f} MB free)",
            "free some space, or give another --output-dir",
        )


def _existing(path: Path) -> Path:
    return next(p for p in [path, *path.parents] if p.is_dir())


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside and rename, so that no reader sees half a file."""
    beside = path.with_name(path.name + ".partial")
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(value, indent=2) + "\n")
            sync(beside)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def clear_output(output_dir: Path) -> None:
    """Remove what a run of ours left in a folder, and nothing else."""
    with disk_errors(output_dir):
        for pattern in OURS:
            for entry in output_dir.glob(pattern):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def sync(file: Path) -> None:
    """Have the system write a file to the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def read_json(file: Path, fix: str) -> Any:
    """The JSON object in a file.

    Raises:
        Ar2DiffError: it is not there, or none.
    """
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise Ar2DiffError(f"{file}: no such file", fix) from None
    except (OSError, ValueError) as error:
        raise Ar2DiffError(f"{file}: {error}", "download the checkpoint again") from None
    if not isinstance(value, dict):
        raise Ar2DiffError(f"{file}: not a JSON object", "download the checkpoint again")
    return value
