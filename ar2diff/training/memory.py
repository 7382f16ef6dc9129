"""How much memory each process of a run needs, estimated from the model's config and the recipe. No
weights are loaded: the model is built without storage and converted, one micro-batch is run through
it, and the tensors that it saves are counted.

A recipe with an `rl` section is estimated by its update, which needs the most: canvases of
`data.max_length` tokens that end with completions of `rl.max_completion_length`, in all views that
the estimator scores. Not counted are the caches of rollouts, reward models and, under ZeRO-3, the
full weights that each process gathers for the rollouts.

Rows of a vision-language model are taken to hold one small image each. What its tower keeps is
counted but for classes whose tensors take their shapes from the images.

A recipe with a `draft` section is estimated for a draft adapter beside a frozen model, which stays
whole and in float32 in each process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch

from ..checkpoint.files import find_checkpoint, is_adapter, read_spec, refuse_draft
from ..checkpoint.kinds import model_from
from ..checkpoint.model import Checkpoint, check_rows, load_config, load_tokenizer
from ..config.recipe import Recipe
from ..conversion.convert import convert
from ..core.errors import Ar2DiffError, first_line
from ..core.noises import Uniform
from ..diffusion.cross_entropy import PART, rows_at_once
from ..diffusion.distillation import LEAST
from ..distributed.precision import computes_in_bf16
from .activations import Books, forward_errors, image_inputs, on_cpu, saved
from .drafting import add_draft, drafting_for
from .plan import continued, fitted

ESTIMATED = ("one", "ddp", "zero1", "zero2", "zero3")  # strategies; `one` is a single process
LEAST_8_BIT, BLOCK_8_BIT = 4096, 256  # bitsandbytes: smaller tensors stay in 32 bits; per scale
PERSISTENT = 10  # ZeRO-3 does not shard tensors with fewer elements than this times the hidden size


@dataclass(frozen=True)
class MemoryParts:
    """Bytes that one process needs, by what they hold.

    Attributes:
        weights: the weights in float32; under ZeRO in bfloat16, if the recipe computes in it.
        gradients: the gradients that are kept until the optimizer step.
        masters: ZeRO's float32 copies of the weights, which the optimizer updates.
        optimizer: the two moments of AdamW, in 8 bits if asked for; nothing for SGD.
        temporaries: what the optimizer's step needs at a time, beyond `activations` and `logits`,
            which are free by then.
        buckets: communication buffers.
        activations: what one micro-batch keeps for the backward pass. Under autocast that includes
            a bfloat16 copy of each weight that multiplies; norms and the residual stream are kept
            in float32.
        logits: those of the masked tokens and of the AR loss, since no others reach the head.
            Either a part at a time, with the head's gradient, or, with heads that have a soft cap
            or an adapter, and for distillation under ZeRO-3, all of them.
        reference: the initial model: the teacher of a distillation; in rl, if there is a KL term
            and no adapter to switch off.
        total: the sum of all these.
    """

    weights: int
    gradients: int
    masters: int
    optimizer: int
    temporaries: int
    buckets: int
    activations: int
    logits: int
    reference: int
    total: int


@dataclass(frozen=True)
class MemoryEstimate:
    """How much memory each process of a run needs.

    Attributes:
        parameters, trainable_parameters: those of the converted model.
        processes: how many processes the sharded parts are divided over.
        loading: bytes of main memory with which each process holds all weights before they are
            sharded, since the conversion and its probe need them whole, even under ZeRO-3 and
            FSDP2.
        bytes: what each process needs, by strategy; `one` is a single process.
    """

    parameters: int
    trainable_parameters: int
    processes: int
    loading: int
    bytes: dict[str, MemoryParts]


@dataclass(frozen=True)
class Shape:
    """What has to be kept in memory: elements of each weight, and bytes of one micro-batch.

    Attributes:
        frozen, trained: elements of each tensor; the trained ones by whether they are matrices.
        in_8_bits: how many of the trained elements have moments in 8 bits, if that is asked for.
        quantized: how many of the frozen elements are held in 4 bits.
        hidden: the hidden size. element: bytes per number in the forward pass.
        sharded: the same under ZeRO, which computes in bfloat16 without autocast.
        logits, parts: bytes of all logits and their loss, and of one part at a time.
    """

    frozen: list[int]
    trained: list[tuple[int, bool]]
    in_8_bits: int
    quantized: int
    hidden: int
    element: int
    activations: int
    sharded: int
    logits: int
    parts: int


def estimate(model: str, recipe: Recipe, processes: int = 1) -> MemoryEstimate:
    """Estimate the memory that each of `processes` processes needs, by strategy.

    Raises:
        Ar2DiffError: the model cannot be found, or cannot run as the recipe says.
    """
    shape = measure(find_checkpoint(model, weights=False), recipe)
    parts = {
        name: held(shape, recipe, name, 1 if name == "one" else processes)
        for name in ESTIMATED
        if recipe.draft is None or name != "zero3"  # which draft refuses
    }
    trainable = sum(n for n, _ in shape.trained)
    return MemoryEstimate(
        parameters=sum(shape.frozen) + trainable,
        trainable_parameters=trainable,
        processes=processes,
        loading=parts["one"]["weights"],
        bytes={
            name: MemoryParts(**{"reference": 0} | part, total=sum(part.values()))
            for name, part in parts.items()
        },
    )


def held(shape: Shape, recipe: Recipe, strategy: str, processes: int) -> dict[str, int]:
    """The bytes of each part in one process."""
    sizes, count = [n for n, _ in shape.trained], processes
    frozen, trained = sum(shape.frozen), sum(sizes)
    # Under ZeRO-3 the head is whole during the forward alone, and distillation reads it after it.
    late = strategy == "zero3" and recipe.objective.distil is not None
    zero = strategy not in ("one", "ddp")
    batch = {
        "activations": shape.sharded if zero else shape.activations,
        "logits": shape.logits if late else shape.parts,
    }
    if has_teacher(recipe):
        batch["reference"] = 4 * (frozen + trained) - saved_by_bits(shape, recipe, 4)
    if not zero:
        if has_reference(recipe):
            batch["reference"] = 4 * (frozen + trained)
        return {
            "weights": 4 * (frozen + trained) - saved_by_bits(shape, recipe, 4),
            "gradients": 4 * trained,
            "masters": 0,
            "optimizer": moments(shape, recipe, trained),
            "temporaries": temporaries(recipe, max(sizes, default=0), batch),
            "buckets": 4 * trained if strategy == "ddp" else 0,
            **batch,
        }
    element = shape.element
    if strategy == "zero3":
        few = PERSISTENT * shape.hidden
        whole = sum(n for n in [*sizes, *shape.frozen] if n < few)
        part = sum(ceil(n / count) for n in sizes)
        weights = sum(ceil(n / count) for n in shape.frozen) + part + whole
        live = 2 * max([*sizes, *shape.frozen])  # the tensor in use and the next one
    else:  # each group is padded so that every process gets the same amount
        groups = [sum(n for n, matrix in shape.trained if matrix is kind) for kind in (True, False)]
        part = sum(2 * ceil(n / (2 * count)) for n in groups)
        weights, live = frozen + trained, 0
    if has_reference(recipe):
        batch["reference"] = element * weights
    saved = saved_by_bits(shape, recipe, element) // (count if strategy == "zero3" else 1)
    whole = 4 if recipe.draft is not None else element  # DeepSpeed does not see the frozen model
    return {
        "weights": element * weights + (whole - element) * frozen - saved,
        "gradients": element * part,
        "masters": 4 * part,
        "optimizer": moments(shape, recipe, part),
        "temporaries": temporaries(recipe, part, batch),  # they are flat: one tensor
        "buckets": element * (live + shape.hidden**2),
        **batch,
    }


def moments(shape: Shape, recipe: Recipe, held: int) -> int:
    """Bytes of the optimizer's state for `held` of the trained elements."""
    kind = recipe.train.optimizer
    if kind == "sgd":
        return 0
    share = shape.in_8_bits / max(1, sum(n for n, _ in shape.trained)) if kind != "adamw" else 0
    scales = 2 * 4 / BLOCK_8_BIT  # a float32 for each block of each moment
    return ceil(held * (8 - share * (6 - scales)))


def temporaries(recipe: Recipe, largest: int, batch: dict[str, int]) -> int:
    """Bytes that the optimizer's step needs at a time beyond what the micro-batch needed, which is
    free by then. On a CPU AdamW makes two tensors of the size of each weight in turn; a GPU's is
    fused and makes none, and neither does one in 8 bits.

    Args:
        largest: elements of the largest tensor that is updated. batch: bytes of the micro-batch.
    """
    fused = torch.cuda.is_available() or recipe.train.optimizer == "adamw8bit"
    count = 0 if fused else 2 if recipe.train.optimizer == "adamw" else 1
    return max(0, 4 * count * largest - batch["activations"] - batch["logits"])


def has_reference(recipe: Recipe) -> bool:
    """Whether the initial model is held alongside the one being trained."""
    return recipe.rl is not None and recipe.rl.beta > 0 and recipe.peft is None


def has_teacher(recipe: Recipe) -> bool:
    """Whether each process holds a whole float32 copy of the initial model."""
    distil = recipe.objective.distil
    return distil is not None and distil.target == "teacher"


def saved_by_bits(shape: Shape, recipe: Recipe, element: int) -> int:
    """Bytes that quantization saves: each weight shrinks to half a byte, and every 64 weights need
    a scale of one byte or four."""
    if recipe.quantization is None:
        return 0
    scale = (1 + 4 / 256) / 64 if recipe.quantization.double else 4 / 64
    return int(shape.quantized * (element - recipe.quantization.bits / 8 - scale))


def measure(path: Path, recipe: Recipe) -> Shape:
    """Build the model of a folder without storage, convert it, run a micro-batch, and count."""
    refuse_draft(path, "which is not trained further")
    if is_adapter(path):
        raise Ar2DiffError(
            f"model {path} is an adapter",
            "give its base model instead, and a recipe with a peft section",
        )
    recipe, bf16 = continued(recipe, read_spec(path)), computes_in_bf16(recipe.train.precision)
    if recipe.draft is not None:
        with torch.device("meta"):
            dtype = torch.bfloat16 if bf16 else torch.float32
            checkpoint = _without_weights(path, recipe, dtype)
        return _beside_frozen(checkpoint, fitted(recipe, checkpoint), bf16)
    checkpoint, (activations, logits, parts) = _run(path, recipe, torch.float32, bf16)
    sharded = activations  # DeepSpeed computes in bfloat16 without autocast
    if bf16:
        _, (sharded, _, _) = _run(path, recipe, torch.bfloat16, False)
    model = checkpoint.model
    parameters = list(model.parameters())
    trained = [(p.numel(), p.ndim > 1) for p in parameters if p.requires_grad]
    frozen = [p.numel() for p in parameters if not p.requires_grad]
    embedded = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    in_8_bits = sum(
        p.numel()
        for p in parameters
        if p.requires_grad and p.numel() >= LEAST_8_BIT and all(p is not end for end in embedded)
    )
    ends = [
        parameter
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        for parameter in module.parameters()  # the mask-row layers may wrap the weight
    ]
    quantized = sum(
        p.numel()
        for p in parameters
        if not p.requires_grad and p.ndim > 1 and all(p is not end for end in ends)
    )
    if recipe.quantization is not None:
        # 4-bit layers are unpacked where they are used, and no copy is kept.
        activations -= 2 * quantized * bf16
    hidden, element = model.config.get_text_config().hidden_size, 2 if bf16 else 4
    return Shape(
        frozen, trained, in_8_bits, quantized, hidden, element, activations, sharded, logits, parts
    )


def _run(
    path: Path, recipe: Recipe, dtype: torch.dtype, autocast: bool
) -> tuple[Checkpoint, tuple[int, int, int]]:
    """A model without weights, and what a micro-batch keeps, as `saved` has it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        checkpoint = _without_weights(path, recipe, dtype)
    checkpoint.model.train()
    image = image_inputs(checkpoint)
    # As on a CPU: on meta, attention saves tensors that no device saves.
    with FakeTensorMode(allow_non_fake_inputs=True):  # such as the pixels of an image
        on_cpu(checkpoint.model)
        with forward_errors(path):
            return checkpoint, saved(checkpoint, fitted(recipe, checkpoint), autocast, image)


def _without_weights(path: Path, recipe: Recipe, dtype: torch.dtype) -> Checkpoint:
    from ..checkpoint.adapters import add_adapter

    config, tokenizer = load_config(path), load_tokenizer(path)
    kind = recipe.train.attn_implementation
    try:
        model = model_from(
            config, attn_implementation=None if kind == "auto" else kind, dtype=dtype
        )
    except Exception as error:  # anything from a badly typed config to a class without sdpa
        raise Ar2DiffError(
            f"model {path} cannot be built ({first_line(error)})", "correct its config.json"
        ) from error
    spec, process = read_spec(path), recipe.noise.process
    # A fitted noise is fitted to weights and texts, and needs about as much as this one.
    alike = Uniform("free")
    if spec is not None and spec.noise.fits:
        spec = replace(spec, noise=alike)
    check_rows(path, model, tokenizer, spec)
    checkpoint = Checkpoint(path, model, tokenizer, spec, {})
    if recipe.draft is not None:
        return checkpoint
    recipe = fitted(recipe, checkpoint)
    if spec is not None or recipe.objective.kind == "diffusion":
        convert(
            checkpoint,
            recipe.convert,
            recipe.data.max_length,
            False,
            recipe.train.seed,
            alike if process is not None and process.fits else process,
        )
    if recipe.peft is not None:
        add_adapter(checkpoint, recipe)
    return checkpoint


def _beside_frozen(checkpoint: Checkpoint, recipe: Recipe, bf16: bool) -> Shape:
    """What a draft adapter and a micro-batch of its training need."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, length = checkpoint.model.eval().requires_grad_(False), recipe.data.max_length
    size, rows = recipe.draft.block_length, recipe.train.per_device_train_batch_size
    with FakeTensorMode(), forward_errors(checkpoint.path):
        on_cpu(model)
        add_draft(checkpoint, recipe, known=False)
        drafting = drafting_for(checkpoint, recipe, plain=True)
        ids = torch.zeros(rows, length, dtype=torch.long)
        noisy = torch.zeros(rows, -(-length // size) * size, dtype=torch.long)
        batch = dict.fromkeys(("x0", "doc", "pos"), ids)
        batch |= dict.fromkeys(("noisy_ids", "noisy_doc", "noisy_pos", "start"), noisy)
        wanted = torch.zeros(noisy.numel() // size * (size - 1), dtype=torch.long)
        with Books(model, *checkpoint.draft.parameters()) as books, torch.enable_grad():
            drafting.read(batch, wanted, wanted)
        vocabulary, hidden = model.get_input_embeddings().weight.shape
    # Logits of both distributions, their probabilities and gradients, for one part at a time.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    at_once = min(len(wanted), rows_at_once(vocabulary, device, PART, LEAST))
    numbers = 8 * at_once * vocabulary + 3 * len(wanted) * hidden
    trained = [(p.numel(), p.ndim > 1) for p in checkpoint.draft.parameters()]
    frozen = [p.numel() for p in model.parameters()]
    kept, element = books.bytes["body"], 2 if bf16 else 4
    # Frozen weights are copied to bfloat16 wherever they multiply, and the copies are kept.
    copied = 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1) * bf16
    in_8_bits = sum(n for n, _ in trained if n >= LEAST_8_BIT)
    numbers *= 4
    return Shape(
        frozen, trained, in_8_bits, 0, hidden, element, kept + copied, kept, numbers, numbers
    )
