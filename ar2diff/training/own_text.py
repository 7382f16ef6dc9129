"""Text of a model's own: the documents that `data.self` has the frozen model write in AR mode.

They are kept in the user's cache as token ids, under a key of everything that they depend on except
their number: a run that asks for more continues the file, and so does one that was killed. Rows are
written in groups, and a group that is not whole is written again, so that the text of a row never
depends on where an earlier run stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from ..checkpoint.model import Checkpoint
from ..checkpoint.output import disk_errors
from ..config.sections import SelfData, Source
from ..core.errors import Ar2DiffError, option
from ..core.forward import context_length
from ..core.seeds import content_key
from ..data.columns import likely_prompt
from ..data.shapes import messages_of
from ..data.sources import Documents, columns_of, find_file, read_source
from ..generation.tokens import encode_messages, prompt_ids
from .identity import model_digest
from .rollouts import sample
from .wording import duration

GROUP = 64  # rows that are decoded together and then kept
QUIET = 10.0  # seconds between two lines about the progress
FORMAT = 1  # of the file and of how it is written; part of the key


@dataclass(frozen=True)
class Prompts:
    """What a model continues.

    Attributes:
        rows: (what an error calls it, text or messages, whether only the beginning of the text is
            given). None: the start token alone.
        digest: SHA-256 of the file, empty if there is none.
    """

    rows: list[tuple[str, str | list[dict[str, Any]], bool]] | None
    digest: str


@dataclass(frozen=True)
class Found:
    """What a run on whole documents is trained on, as far as it is there before the model is
    loaded.

    Attributes:
        documents: of the recipe's sources.
        prompts: those of `data.self`; None if the model writes no text of its own.
    """

    documents: Documents
    prompts: Prompts | None


def read_prompts(own: SelfData, text_field: str) -> Prompts:
    """The prompts that `data.self` names: of each row its `prompt`, its messages up to the last
    answer, or its text.

    Raises:
        Ar2DiffError: naming the row that has none.
    """
    if own.prompts is None:
        return Prompts(None, "")
    path, name = find_file(own.prompts), "data.self.prompts"
    if path is None:
        raise Ar2DiffError(
            f"{option(name)} {own.prompts} does not exist", "set it to a local file of prompts"
        )
    rows = []
    for where, row in read_source(Source(path=str(path)), text_field, option(name)):
        rows.append((where, *_prompt(row, where, text_field)))
    return Prompts(rows, hashlib.sha256(path.read_bytes()).hexdigest())


def _prompt(
    row: dict[str, Any], where: str, text_field: str
) -> tuple[str | list[dict[str, Any]], bool]:
    for name in ("messages", "conversations", "prompt"):
        if isinstance(row.get(name), list):
            messages = messages_of(row[name], f"{where}: {name}")
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if messages:
                return messages, False
    for name in ("prompt", text_field):
        if isinstance(row.get(name), str) and row[name]:
            return row[name], name != "prompt"
    raise Ar2DiffError(
        f"{where} has no prompt: neither text in column 'prompt' or {text_field!r}, nor messages "
        f"(it has {columns_of(row)})",
        f"rename the column {likely_prompt(row)!r} to 'prompt'"
        if likely_prompt(row)
        else 'write {"prompt": "..."} on each line',
    )


@dataclass(frozen=True)
class OwnText:
    """The documents of `data.self`.

    Args:
        checkpoint: the frozen model.
        own: the section of the recipe. prompts: of `read_prompts`.
    """

    checkpoint: Checkpoint
    own: SelfData
    prompts: Prompts

    def notes(self) -> list[str]:
        """What the user should know before the text is written.

        Raises:
            Ar2DiffError: no prompt fits the model, or one cannot be rendered.
        """
        prompts, new = self._prompts()
        left_out = len(self.prompts.rows or [()]) - len(prompts)
        notes = [
            f"note: before it is trained, the model writes {self.own.tokens:,} tokens of text, "
            "unless an earlier run has left them in the cache"
        ]
        if new < self.own.max_new_tokens:
            notes.append(
                f"note: an answer has at most {new} tokens, not {self.own.max_new_tokens} "
                "(data.self.max_new_tokens), because it shares the model's context with its prompt"
            )
        if left_out:
            count = "1 prompt is" if left_out == 1 else f"{left_out:,} prompts are"
            notes.append(f"note: {count} left out, because the context has no room for an answer")
        return notes

    def documents(self) -> list[list[int]]:
        """Write the documents, or find those that an earlier run wrote: token ids, prompts
        included (a run learns these as well), with `tokens` new tokens in all; at temperature 0,
        one document for each prompt at most. The other processes of a run wait for the first.

        Raises:
            Ar2DiffError: a prompt does not fit the model, or the file cannot be written.
        """
        prompts, new = self._prompts()
        file = cache_folder() / f"{self._key(new)}.jsonl"
        with _locked(file) as stream:
            found, end = _kept(stream, self._most(prompts))
            if sum(map(_new, found)) < self.own.tokens:
                stream.truncate(end)  # what a killed run left of a group
                for group in self._write(prompts, new, len(found), sum(map(_new, found))):
                    stream.write("".join(json.dumps(row) + "\n" for row in group).encode())
                    stream.flush()
                    found += group
        counted = 0
        for number, row in enumerate(found):
            if counted >= self.own.tokens:
                return [row["ids"] for row in found[:number]]
            counted += _new(row)
        return [row["ids"] for row in found]

    def _write(
        self, prompts: list[list[int]], new: int, start: int, written: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Groups of rows from the row `start` on, until there are enough tokens."""
        model, most = self.checkpoint.model, self._most(prompts)
        device, began = model.device, time.monotonic()
        if torch.cuda.is_available():
            model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        told, before = began, written
        try:
            while written < self.own.tokens and (most is None or start < most):
                numbers = range(start, start + GROUP if most is None else min(start + GROUP, most))
                rows = [prompts[n % len(prompts)] for n in numbers]
                group = self._group(rows, [content_key([n]) % 2**62 for n in numbers], new)
                yield group
                start, written = numbers.stop, written + sum(map(_new, group))
                now = time.monotonic()
                if now - told > QUIET:
                    told, done = now, written - before
                    left = (now - began) / done * max(0, self.own.tokens - written)
                    print(
                        f"the model has written {written:,} of {self.own.tokens:,} tokens; about "
                        f"{duration(left)} left",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
        finally:
            model.to(device)

    def _group(self, rows: list[list[int]], seeds: list[int], new: int) -> list[dict[str, Any]]:
        settings = {"mode": "ar", "temperature": self.own.temperature, "max_new_tokens": new}
        found = sample(self._writer(), rows, seeds, settings, GROUP)
        return [
            {"prompt": len(row), "ids": [*row, *rollout.answer_ids]}
            for row, rollout in zip(rows, found, strict=True)
        ]

    def _writer(self) -> Checkpoint:
        """The model as it reads in AR mode: a conversion that has not been trained yet still has
        it, whatever its spec will say."""
        spec = self.checkpoint.spec
        if spec is not None and not spec.ar_mode:
            causal = {"attention": "causal_context", "block_length": 1, "local_window": None}
            spec = replace(spec, ar_mode=True, **causal)
        return replace(self.checkpoint, draft=None, spec=spec)

    def _prompts(self) -> tuple[list[list[int]], int]:
        """The prompts that fit as token ids, and how many tokens may follow any of them."""
        checkpoint, own = self.checkpoint, self.own
        if self.prompts.rows is None:
            start = checkpoint.tokenizer.bos_token_id
            rows = [[checkpoint.end_ids[0] if start is None else start]]
        else:
            rows = [self._ids(*row) for row in self.prompts.rows]
        context, lengths = context_length(checkpoint.model), sorted(map(len, rows))
        if context is None:
            return rows, own.max_new_tokens
        shortest, longest = lengths[0], lengths[-1]
        # Room for the longest prompt comes before room for a long answer, up to half the context.
        room = max(context - longest, min(context // 2, context - shortest))
        new = min(own.max_new_tokens, room)
        if new < 1:
            raise Ar2DiffError(
                f"the shortest prompt of {option('data.self.prompts')} has {shortest} tokens, "
                f"which leaves no room in the model's context of {context}",
                "use shorter prompts",
            )
        return [row for row in rows if len(row) + new <= context], new

    def _ids(self, where: str, prompt: str | list[dict[str, Any]], cut: bool) -> list[int]:
        tokenizer = self.checkpoint.tokenizer
        if isinstance(prompt, str):
            ids = prompt_ids(tokenizer, prompt)
            ids = ids[: self.own.prompt_tokens] if cut else ids
        else:
            try:
                ids = encode_messages(tokenizer, self.checkpoint.spec_or_causal, prompt)
            except Ar2DiffError as error:
                raise error.about(where) from None
        if not ids:
            raise Ar2DiffError(f"{where}: the prompt has no tokens", "correct or remove the row")
        return ids

    def _most(self, prompts: list[list[int]]) -> int | None:
        """How many rows there can be; None: any number."""
        return None if self.own.temperature else len(prompts)

    def _key(self, new: int) -> str:
        """Of all that decides what is written, except how much of it."""
        settings = self.own.model_dump(exclude={"prompts", "tokens", "weight"})
        decisive = [FORMAT, GROUP, model_digest(self.checkpoint.path), settings, new,
                    self.prompts.digest]  # fmt: skip
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def cache_folder() -> Path:
    """Where the texts of all models are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ar2diff" / "self"


def _new(row: dict[str, Any]) -> int:
    """How many tokens of a row the model wrote."""
    return len(row["ids"]) - row["prompt"]


@contextmanager
def _locked(file: Path) -> Iterator[IO[bytes]]:
    """A file, open for appending, that no other process reads or writes meanwhile.

    Raises:
        Ar2DiffError: it cannot be opened, or the disk is full.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+b")
    except OSError as error:
        raise Ar2DiffError(
            f"the model's text cannot be kept in {file.parent}: {error.strerror or error}",
            "set XDG_CACHE_HOME to a folder that can be written to",
        ) from None
    with stream, disk_errors(file):
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream


def _kept(stream: IO[bytes], most: int | None) -> tuple[list[dict[str, Any]], int]:
    """The rows of the whole groups in a file, and where they end."""
    stream.seek(0)
    rows, ends, end = [], [0], 0
    for line in stream:
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill or a crash of the machine
            break
        if not line.endswith(b"\n"):
            break
        rows.append(row)
        ends.append(end)
    count = len(rows) if len(rows) == most else len(rows) // GROUP * GROUP
    return rows[:count], ends[count]
