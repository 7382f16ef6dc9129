"""How much memory each process of a run needs, estimated from the model's config and the recipe. No
weights are loaded: the model is built without storage and converted, one micro-batch is run through
it, and the tensors that it saves are counted.

A recipe with an `rl` section is estimated by its update, which needs the most: canvases of
`data.max_length` tokens that end with completions of `rl.max_completion_length`, in all views that
the estimator scores. Not counted are the caches of rollouts, reward models and, under ZeRO-3, the
full weights that each process gathers for the rollouts.

A recipe with a `draft` section is estimated for a draft adapter beside a frozen model, which stays
whole and in float32 in each process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import find_checkpoint, is_adapter, read_spec, refuse_draft
from ..checkpoint.model import Checkpoint, check_rows, load_config, load_tokenizer
from ..config.recipe import Recipe
from ..conversion.convert import convert
from ..core.attention import Slots, lay_out
from ..core.errors import Ar2DiffError, first_line
from ..core.forward import output_at
from ..data.documents import law_of
from ..diffusion.cross_entropy import PART, cross_entropy
from ..diffusion.task import Task
from ..distributed.precision import computes_in_bf16
from .drafting import add_draft, drafting_for
from .modules import layers_of
from .plan import continued, fitted

ESTIMATED = ("one", "ddp", "zero1", "zero2", "zero3")  # strategies; `one` is a single process
PERSISTENT = 10  # ZeRO-3 does not shard tensors with fewer elements than this times the hidden size


@dataclass(frozen=True)
class MemoryParts:
    """Bytes that one process needs, by what they hold.

    Attributes:
        weights: the weights in float32; under ZeRO in bfloat16, if the recipe computes in it.
        gradients: the gradients that are kept until the optimizer step.
        masters: ZeRO's float32 copies of the weights, which the optimizer updates.
        optimizer: the two moments of AdamW; nothing for SGD.
        buckets: communication buffers.
        activations: what one micro-batch keeps for the backward pass.
        logits: those of the masked tokens and of the AR loss, since no others reach the head.
            Either a part at a time, with the head's gradient, or, under ZeRO-3 and with heads that
            have a soft cap or an adapter, all of them.
        reference: the initial model: the teacher of a distillation; in rl, if there is a KL term
            and no adapter to switch off.
        total: the sum of all these.
    """

    weights: int
    gradients: int
    masters: int
    optimizer: int
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
        quantized: how many of the frozen elements are held in 4 bits.
        hidden: the hidden size. element: bytes per number in the forward pass.
        logits, parts: bytes of all logits and their loss, and of one part at a time.
        copies: bytes of the bfloat16 copies of float32 weights that autocast makes.
    """

    frozen: list[int]
    trained: list[tuple[int, bool]]
    quantized: int
    hidden: int
    element: int
    activations: int
    logits: int
    parts: int
    copies: int


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
    moments = 2 if recipe.train.optimizer == "adamw" else 0
    logits = shape.logits if strategy == "zero3" else shape.parts
    batch = {"activations": shape.activations, "logits": logits}
    if has_teacher(recipe):
        batch["reference"] = 4 * (frozen + trained) - saved_by_bits(shape, recipe, 4)
    if strategy in ("one", "ddp"):
        batch["activations"] += shape.copies
        if has_reference(recipe):
            batch["reference"] = 4 * (frozen + trained)
        return {
            "weights": 4 * (frozen + trained) - saved_by_bits(shape, recipe, 4),
            "gradients": 4 * trained,
            "masters": 0,
            "optimizer": 4 * moments * trained,
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
        "optimizer": 4 * moments * part,
        "buckets": element * (live + shape.hidden**2),
        **batch,
    }


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
    from torch._subclasses.fake_tensor import FakeTensorMode

    refuse_draft(path, "which is not trained further")
    if is_adapter(path):
        raise Ar2DiffError(
            f"model {path} is an adapter",
            "give its base model instead, and a recipe with a peft section",
        )
    recipe, bf16 = continued(recipe, read_spec(path)), computes_in_bf16(recipe.train.precision)
    with torch.device("meta"):
        checkpoint = _without_weights(path, recipe, torch.bfloat16 if bf16 else torch.float32)
    if recipe.draft is not None:
        return _beside_frozen(checkpoint, fitted(recipe, checkpoint), bf16)
    model = checkpoint.model.train()
    parameters = list(model.parameters())
    trained = [(p.numel(), p.ndim > 1) for p in parameters if p.requires_grad]
    frozen = [p.numel() for p in parameters if not p.requires_grad]
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
    with FakeTensorMode():  # as on a CPU: on meta, attention saves tensors that no device saves
        _on_cpu(model)
        with _forward_errors(path):
            saved = _saved(checkpoint, fitted(recipe, checkpoint))
    # 4-bit layers are unpacked where they are used, and no copy is kept.
    matrices = sum(p.numel() for p in parameters if p.ndim > 1)
    copied = matrices - (quantized if recipe.quantization is not None else 0)
    hidden = model.config.get_text_config().hidden_size
    return Shape(frozen, trained, quantized, hidden, 2 if bf16 else 4, *saved, 2 * copied * bf16)


def _without_weights(path: Path, recipe: Recipe, dtype: torch.dtype) -> Checkpoint:
    from transformers import AutoModelForCausalLM

    from ..checkpoint.adapters import add_adapter

    config, tokenizer = load_config(path), load_tokenizer(path)
    kind = recipe.train.attn_implementation
    try:
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=None if kind == "auto" else kind,
            dtype=dtype,
            trust_remote_code=False,
        )
    except Exception as error:  # anything from a badly typed config to a class without sdpa
        raise Ar2DiffError(
            f"model {path} cannot be built ({first_line(error)})", "correct its config.json"
        ) from error
    spec = read_spec(path)
    check_rows(path, model, tokenizer, spec)
    checkpoint = Checkpoint(path, model, tokenizer, spec, {})
    if recipe.draft is not None:
        return checkpoint
    recipe = fitted(recipe, checkpoint)
    convert(checkpoint, recipe.convert, recipe.data.max_length, False, recipe.train.seed)
    if recipe.peft is not None:
        add_adapter(checkpoint, recipe)
    return checkpoint


def _beside_frozen(checkpoint: Checkpoint, recipe: Recipe, bf16: bool) -> Shape:
    """What a draft adapter and a micro-batch of its training need."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, length = checkpoint.model.eval().requires_grad_(False), recipe.data.max_length
    size, rows = recipe.draft.block_length, recipe.train.per_device_train_batch_size
    with FakeTensorMode(), _forward_errors(checkpoint.path):
        _on_cpu(model)
        add_draft(checkpoint, recipe, known=False)
        drafting = drafting_for(checkpoint, recipe, plain=True)
        ids = torch.zeros(rows, length, dtype=torch.long)
        noisy = torch.zeros(rows, -(-length // size) * size, dtype=torch.long)
        batch = dict.fromkeys(("x0", "doc", "pos"), ids)
        batch |= dict.fromkeys(("noisy_ids", "noisy_doc", "noisy_pos", "start"), noisy)
        wanted = torch.zeros(noisy.numel() // size * (size - 1), dtype=torch.long)
        with _Books(model, *checkpoint.draft.parameters()) as books, torch.enable_grad():
            drafting.read(batch, wanted, wanted)
        vocabulary, hidden = model.get_input_embeddings().weight.shape
    # Logits of both distributions, their probabilities and gradients, for one part at a time.
    numbers = 8 * min(len(wanted) * vocabulary, PART) + 3 * len(wanted) * hidden
    trained = [(p.numel(), p.ndim > 1) for p in checkpoint.draft.parameters()]
    frozen = [p.numel() for p in model.parameters()]
    copied = sum(p.numel() for p in model.parameters() if p.ndim > 1) * bf16
    kept, element = books.bytes["body"], 2 if bf16 else 4
    return Shape(frozen, trained, 0, hidden, element, kept, 4 * numbers, 4 * numbers, 2 * copied)


@contextmanager
def _forward_errors(path: Path) -> Iterator[None]:
    """Refuse a model whose forward fails."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise Ar2DiffError(
            f"model {path}: its forward pass fails ({first_line(error)})",
            "correct its config.json",
        ) from error


def _on_cpu(model: Any) -> None:
    """Replace the tensors of a model by fake ones that claim to be on the CPU."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        grad = tensor.requires_grad
                        made[id(tensor)] = torch.nn.Parameter(made[id(tensor)], grad)
                held[name] = made[id(tensor)]


def _saved(checkpoint: Checkpoint, recipe: Recipe) -> tuple[int, int, int]:
    """Bytes that a micro-batch keeps for the backward pass: in the layers; for all logits and their
    loss; and for logits and loss a part at a time."""
    model, spec = checkpoint.model, checkpoint.spec
    rows = recipe.train.per_device_train_batch_size * (2 if recipe.noise.complementary else 1)
    length = recipe.data.max_length
    if recipe.rl is None:
        ids, doc = torch.ones(2, rows, length, dtype=torch.long), torch.zeros(rows, length).long()
        pos = torch.arange(length).expand(rows, length)
        input_ids, slots = lay_out(ids[0], ids[1], doc, pos, spec.attention)
        masked = int(rows * length * law_of(recipe).mean)  # on average
        # The AR loss reads the whole clean copy.
        wanted = masked + (rows * length if recipe.objective.ar_weight > 0 else 0)
    else:
        input_ids, slots, wanted = _rollouts(recipe, spec)
    none = torch.zeros(wanted).long()
    task = Task(input_ids, slots, spec.attention, spec.block_length, none, none)
    inputs = task.inputs(model, spec.local_window)
    books, head, made = _Books(model), model.get_output_embeddings(), []
    head.register_forward_hook(lambda _module, _args, output: made.append(output))
    with books, torch.enable_grad():
        output = output_at(model, task.index, **inputs)
        logits, books.account = output.logits[0], "logits"
        suppressed = torch.zeros(logits.shape[-1], dtype=torch.bool)
        if recipe.rl is None:
            cross_entropy(logits, task.target, suppressed).sum()
        else:
            (logits / 1.0).masked_fill(suppressed, 0.0).log_softmax(-1).sum()
    states = input_ids.numel() * model.config.get_text_config().hidden_size
    kept, layers = books.bytes["body"], books.layers
    if recipe.train.gradient_checkpointing and layers:
        # Each layer keeps its input, and one layer at a time is recomputed.
        element = next(model.parameters()).element_size()
        kept = kept - sum(layers) + max(layers) + len(layers) * element * states
    # The backward pass needs the gradient of the logits on top of what the loss keeps. In rl the
    # logits are kept separately, and computing the entropies needs as much again.
    distils = recipe.objective.distil is not None  # a second loss, with gradients of its own
    copies = 1 + distils if recipe.rl is None else 3
    whole = parts = books.bytes["logits"] + copies * 4 * logits.numel()
    if recipe.rl is None and type(head) is torch.nn.Linear and output.logits is made[0]:
        gradient = head.weight.numel() * head.weight.requires_grad + wanted * head.in_features
        parts = 4 * ((1 + distils) * gradient + 2 * min(logits.numel(), PART))
    return kept, whole, parts


def _rollouts(recipe: Recipe, spec: Any) -> tuple[Any, Slots, int]:
    """Ids, layout and number of scored tokens in an rl micro-batch."""
    rl, rows = recipe.rl, recipe.train.per_device_train_batch_size
    length = max(recipe.data.max_length, rl.max_completion_length + 1)
    answer, block = rl.max_completion_length, spec.block_length or rl.max_completion_length
    views, scored = {
        "coupled": (2 * rl.samples + 1, rl.samples + 1),
        "elbo": (2 * rl.samples, rl.samples),
        "spg": (2 * rl.samples, rl.samples),
        "trajectory": (min(block, rl.segments or block), 1),
    }.get(rl.estimator, (1, 1))
    if rl.estimator == "ar":
        shape = (rows, length)
    elif spec.attention == "full":
        shape = (rows * views, length)
    else:  # all views of the answer in one row, before the clean canvas
        shape = (rows, views * answer + length)
    zeros = torch.zeros(shape, dtype=torch.long)
    return zeros, Slots(zeros, zeros, zeros.bool(), zeros, zeros), rows * scored * answer


class _Books:
    """Counts the bytes of tensors saved for the backward pass, each storage once, without the
    weights of the model and `others`."""

    def __init__(self, model: Any, *others: torch.Tensor):
        self.account, self.bytes = "body", {"body": 0, "logits": 0}
        self.layers: list[int] = []
        self.known = {p.untyped_storage()._cdata for p in (*model.parameters(), *others)}
        self.keep: list[Any] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        for layer in layers_of(model):
            layer.register_forward_pre_hook(lambda *_: self.layers.append(-self.bytes["body"]))
            layer.register_forward_hook(lambda *_: self._close())

    def _close(self) -> None:
        self.layers[-1] += self.bytes["body"]

    def _pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.keep.append(storage)  # so that no address is reused
            self.bytes[self.account] += storage.nbytes()
        return tensor

    def __enter__(self) -> _Books:
        self.hooks.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.hooks.__exit__(*details)
