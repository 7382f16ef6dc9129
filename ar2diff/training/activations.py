"""What a micro-batch keeps for its backward pass: the model is run on fake tensors, and the tensors
that it saves are counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..conversion.images import image_sample
from ..core.attention import Slots, lay_out
from ..core.errors import Ar2DiffError, first_line
from ..core.forward import output_at
from ..core.images import input_names
from ..data.documents import law_of
from ..diffusion.cross_entropy import PART, cross_entropy, rows_at_once
from ..diffusion.task import Task, clean_task
from .modules import layers_of, sdpa_in_parts


@contextmanager
def forward_errors(path: Path) -> Iterator[None]:
    """Refuse a model whose forward fails."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise Ar2DiffError(
            f"model {path}: its forward pass fails ({first_line(error)})",
            "correct its config.json",
        ) from error


def on_cpu(model: Any) -> None:
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


def saved(
    checkpoint: Checkpoint, recipe: Recipe, autocast: bool, image: dict[str, torch.Tensor]
) -> tuple[int, int, int]:
    """Bytes that a micro-batch keeps for the backward pass: in the layers; for all logits and their
    loss; and for logits and loss a part at a time.

    Args:
        checkpoint: its model is on fake tensors.
        autocast: whether float32 weights compute in bfloat16. What the layers keep then includes a
            bfloat16 copy of each weight that multiplies, while norms and the residual stream stay
            in float32.
        image: of `image_inputs`, one a row.
    """
    sdpa_in_parts()  # as in training
    model, spec = checkpoint.model, checkpoint.spec_or_causal
    rows = recipe.train.per_device_train_batch_size * (2 if recipe.noise.complementary else 1)
    length = recipe.data.max_length
    if recipe.rl is None:
        ids, doc = torch.ones(2, rows, length, dtype=torch.long), torch.zeros(rows, length).long()
        pos = torch.arange(length).expand(rows, length)
        if checkpoint.spec is None:  # an AR control reads the clean copy alone
            plain, masked = clean_task(ids[1], doc, pos), 0
            input_ids, slots = plain.input_ids, plain.slots
        else:
            input_ids, slots = lay_out(ids[0], ids[1], doc, pos, spec.attention)
            masked = int(rows * length * law_of(recipe).mean)  # on average
        # The AR loss reads the whole clean copy.
        wanted = masked + (rows * length if recipe.objective.ar_weight > 0 else 0)
    else:
        input_ids, slots, wanted = _rollouts(recipe, spec)
    none = torch.zeros(wanted).long()
    task = Task(input_ids, slots, spec.attention, spec.block_length, none, none)
    inputs = task.inputs(model, spec.local_window)
    books, head, made = Books(model), model.get_output_embeddings(), []
    head.register_forward_hook(lambda _module, _args, output: made.append(output))
    under = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with books, torch.enable_grad(), under:
        output = output_at(model, task.index, **inputs)
        logits, books.account = output.logits[0], "logits"
        suppressed = torch.zeros(logits.shape[-1], dtype=torch.bool)
        if recipe.rl is None:
            cross_entropy(logits, task.target, suppressed).sum()
        else:
            (logits / 1.0).masked_fill(suppressed, 0.0).log_softmax(-1).sum()
    states = input_ids.numel() * model.config.get_text_config().hidden_size
    kept, layers = books.bytes["body"], books.layers
    with under:
        tower = _of_tower(model, {name: torch.cat([x] * rows) for name, x in image.items()})
    if recipe.train.gradient_checkpointing and layers:
        # Each layer keeps its input, and one layer at a time is recomputed.
        element = next(model.parameters()).element_size()
        kept = kept - sum(layers) + max(layers) + len(layers) * element * states
        if autocast:  # which keeps the copies of all weights until the forward ends
            copied = [p for layer in layers_of(model) for p in layer.parameters() if p.ndim > 1]
            kept += 2 * sum(p.numel() for p in copied) * (len(layers) - 1) // len(layers)
    kept += tower
    # The backward pass needs the gradient of the logits on top of what the loss keeps. In rl the
    # logits are kept separately, and computing the entropies needs as much again.
    distils = recipe.objective.distil is not None  # a second loss, with gradients of its own
    copies = 1 + distils if recipe.rl is None else 3
    whole = parts = books.bytes["logits"] + copies * 4 * logits.numel()
    if recipe.rl is None and type(head) is torch.nn.Linear and output.logits is made[0]:
        gradient = head.weight.numel() * head.weight.requires_grad + wanted * head.in_features
        device, width = "cuda" if torch.cuda.is_available() else "cpu", logits.shape[-1]
        rows = min(wanted, rows_at_once(width, device, PART))
        parts = 4 * ((1 + distils) * gradient + 2 * rows * width)
        parts += 2 * autocast * head.weight.numel()  # its gradient, before it is one in float32
    return kept, whole, parts


def image_inputs(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What the model sees of a small image, which its processor may make larger; nothing of a model
    of text, or if the processor cannot be loaded."""
    if not checkpoint.sees_images:
        return {}
    try:
        given = image_sample(checkpoint.processor)
    except Ar2DiffError:
        return {}
    names = input_names(checkpoint.model)
    return {name: x for name, x in given.items() if name in names}


def _of_tower(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that tower and projector keep of some images. Classes whose tensors take their shapes
    from the images (Qwen2-VL, Idefics 3) cannot be run without them, and theirs are not counted."""
    if not inputs:
        return 0
    books = Books(model)
    try:
        with books, torch.enable_grad():
            model.get_image_features(**inputs, return_dict=True)
    except RuntimeError:
        return 0
    return books.bytes["body"]


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


class Books:
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

    def __enter__(self) -> Books:
        self.hooks.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.hooks.__exit__(*details)
