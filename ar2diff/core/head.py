"""Heads: a low-rank bias on the logits of a token, given the tokens drawn before it.

Slots that are predicted in one forward ignore each other. Drawn from left to right with the bias of
a bigram head, each knows its left neighbour (DSpark, 2607.05147: U_k + W1[x_{k-1}] W2). Diffusion
heads are of this kind. The head of a draft adapter also remembers the tokens before that one, and
the slot itself says which parts of the memory matter.

A diffusion head lies beside the weights in a file of its own, which the spec names by its SHA-256.
With it, the logits of token i are U_i + W1[x_{i-1}] W2 wherever x_{i-1} is known: it is visible, or
was decided just before in the same step, or ends the clean context. Where x_{i-1} is masked they
are U_i. The AR mode and its drafts have no such bias. Training follows the same rule, and takes
half of the masked x_{i-1} for decided just before (`drawn_before`).

This file is copied into converted folders: it imports torch, transformers, safetensors and its
neighbours alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers.utils import cached_file

from .errors import Ar2DiffError, first_line
from .spec import HEAD_FILE, Head, Spec

SPREAD = 0.02  # of the first factor at the start; the second is zero, so that nothing moves
UNKNOWN = -1  # in place of the id of a token that is masked
ATTRIBUTE = "diffusion_head"  # of the model
MOST_HEADER = 1 << 16  # bytes of the file besides the two matrices


class BigramHead(torch.nn.Module):
    """The bias W1[previous token] W2.

    Args:
        vocabulary: V, tokens that can come before or after. rank: r.
        generator: of the initial first factor; None leaves both at zero, to be loaded.

    Attributes:
        before: W1, [V, r]. after: W2, [r, V].
    """

    def __init__(self, vocabulary: int, rank: int, generator: torch.Generator | None = None):
        super().__init__()
        before = torch.zeros(vocabulary, rank)
        if generator is not None:
            before.normal_(std=SPREAD, generator=generator)
        self.before = torch.nn.Parameter(before)
        self.after = torch.nn.Parameter(torch.zeros(rank, vocabulary))

    def forward(self, previous: Tensor) -> Tensor:
        """Biases [..., V] of the tokens that follow `previous` [...]; 0 where it is `UNKNOWN`."""
        return self.vectors(previous) @ self.after

    def vectors(self, previous: Tensor) -> Tensor:
        """W1[previous], [..., r]; zero where `previous` [...] is `UNKNOWN`."""
        previous = previous.to(self.before.device)
        return self.before[previous.clamp(min=0)] * (previous != UNKNOWN)[..., None]

    def to_bytes(self) -> bytes:
        """The content of its file."""
        named = {
            name: x.detach().float().cpu().contiguous() for name, x in self.state_dict().items()
        }
        return safetensors.torch.save(named)

    def described(self) -> Head:
        """What the spec says of it. The SHA-256 of a head without storage is all zeros."""
        known = not self.before.is_meta
        sha256 = hashlib.sha256(self.to_bytes()).hexdigest() if known else "0" * 64
        return Head(self.before.shape[1], sha256)


class DraftHead(BigramHead):
    """The bias (s_k * (1 + G h_k)) W2 of the k-th draft, which has the hidden state h_k and the
    memory s_k = W1[x_{k-1}] + tanh(d) * s_{k-1} of the tokens since the draft's own block began.

    With G and d at zero, as they are at the start, it is a bigram head.

    Args:
        hidden_size: of a hidden state.

    Attributes:
        gate: G, [r, H]. fade: d, [r].
    """

    def __init__(
        self,
        vocabulary: int,
        rank: int,
        hidden_size: int,
        generator: torch.Generator | None = None,
    ):
        super().__init__(vocabulary, rank, generator)
        self.gate = torch.nn.Parameter(torch.zeros(rank, hidden_size))
        self.fade = torch.nn.Parameter(torch.zeros(rank))

    def gates(self, hidden: Tensor) -> Tensor:
        """1 + G h, [..., r], of hidden states [..., H]."""
        return 1 + hidden @ self.gate.T

    def remember(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        """The memory [..., r] after tokens [...], given the one before them; None: there is none
        yet."""
        new = self.before[tokens]
        return new if memory is None else torch.addcmul(new, self.fade.tanh(), memory)

    def along(self, previous: Tensor, hidden: Tensor) -> Tensor:
        """s_k * (1 + G h_k) for all drafts of M blocks, [M, K, r].

        Args:
            previous: [M, K] the token before each draft. hidden: [M, K, H].
        """
        memory, found = None, []
        for tokens in previous.unbind(1):
            memory = self.remember(tokens, memory)
            found.append(memory)
        return torch.stack(found, 1) * self.gates(hidden)


def head_of(model: Any, spec: Spec) -> BigramHead | None:
    """The diffusion head of a model: the one that it carries, else the one in the folder or the Hub
    repository that it was loaded from. None if its spec names none.

    Raises:
        Ar2DiffError: the file is not there, or is not the one that the spec names.
    """
    if spec.head is None:
        return None
    if getattr(model, ATTRIBUTE, None) is None:
        head = read_head(_find(model), model.config.get_text_config().vocab_size, spec.head)
        # Not a submodule: `save_pretrained` would write it among the weights of the stock class.
        model.__dict__[ATTRIBUTE] = head.to(model.device)
    return getattr(model, ATTRIBUTE)


def read_head(file: Path, vocabulary: int, wanted: Head) -> BigramHead:
    """Read a head from its file.

    Args:
        vocabulary: rows of the model's output embeddings. wanted: what the spec says of the head.

    Raises:
        Ar2DiffError: the file is missing, or is not the one that the spec names.
    """
    fix = f"download the checkpoint again, or copy the {HEAD_FILE} that belongs to its config.json"
    if not file.is_file():
        raise Ar2DiffError(f"{file}, the diffusion head, is missing", fix)
    fits = file.stat().st_size <= 8 * vocabulary * wanted.rank + MOST_HEADER
    content = file.read_bytes() if fits else b""
    if hashlib.sha256(content).hexdigest() != wanted.sha256:
        raise Ar2DiffError(f"{file} is not the diffusion head that config.json names", fix)
    shapes = {"before": (vocabulary, wanted.rank), "after": (wanted.rank, vocabulary)}
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # from a damaged header to a dtype that torch lacks
        raise Ar2DiffError(f"{file} is damaged ({first_line(error)})", fix) from None
    if {name: (*x.shape,) for name, x in tensors.items()} != shapes or any(
        x.dtype != torch.float32 for x in tensors.values()
    ):
        raise Ar2DiffError(
            f"{file} does not hold two float32 matrices of rank {wanted.rank} for {vocabulary} "
            "tokens",
            fix,
        )
    head = BigramHead(vocabulary, wanted.rank)
    head.load_state_dict(tensors)
    return head


def _find(model: Any) -> Path:
    """The file beside the config that a stock class was loaded from."""
    config = model.config
    try:
        found = cached_file(
            config._name_or_path, HEAD_FILE, revision=getattr(config, "_commit_hash", None)
        )
    except OSError as error:
        raise Ar2DiffError(
            f"model {config._name_or_path}: its diffusion head {HEAD_FILE} was not found "
            f"({first_line(error)})",
            "load the model from the folder or repository that holds the file",
        ) from None
    return Path(found)
