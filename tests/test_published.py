"""The published recipes: the loss of each, from its own YAML with sizes alone changed, is its
paper's formula on the same documents and the same noise. The formula here is loops over blocks and
tokens and raw forwards of the model, a block at a time behind its clean prefix; nothing of our
objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch

from ar2diff.config.recipe import load_recipe
from ar2diff.core.attention import reveal_edges
from ar2diff.core.errors import Ar2DiffError
from ar2diff.data.documents import document_parts
from ar2diff.training.adapt import ADAPT
from ar2diff.training.sft import SFT

LENGTH = 64
ROWS = 2
WORDS = "the cat sat on a mat and saw one big red dog run to his old house by the sea"


@dataclass(frozen=True)
class Document:
    """Clean ids; which tokens are masked; which could be; what each counts (1, but in an EOS run);
    how many are the text's own."""

    ids: list[int]
    masked: list[bool]
    scored: list[int]
    share: list[float]
    real: int


@dataclass(frozen=True)
class Paper:
    """A published loss: sum of weight(document, token, its block, t) * -log p(token) / divisor."""

    back: int  # 0: a token is read at its own place; 1: at the one before
    weight: Callable[[Document, int, range, float], float]
    divisor: str  # tokens: that could be masked; masked: that are; answers: each by its own length
    block: int | None = None  # None: the whole document
    causal: bool = False  # attention without any look-ahead


def one(document: Document, n: int, block: range, t: float) -> float:
    return 1.0


def inverse_time(document: Document, n: int, block: range, t: float) -> float:
    return 1 / t


def cart(p: float) -> Callable[[Document, int, range, float], float]:
    """Dream: half the sum of a geometric distribution over the distances to visible tokens."""

    def weight(document: Document, n: int, block: range, t: float) -> float:
        seen = [i for i in range(document.real) if not document.masked[i]]
        return sum(0.5 * p * (1 - p) ** (abs(n - i) - 1) for i in seen)

    return weight


PAPERS = {
    "diffugpt": Paper(1, inverse_time, "masked"),
    "diffullama": Paper(1, inverse_time, "masked"),
    "dream": Paper(1, cart(0.8), "masked"),
    "llada": Paper(0, inverse_time, "tokens"),
    "llada-sft": Paper(0, inverse_time, "answers"),
    "sdar": Paper(0, inverse_time, "tokens", 4),
    "fast-dllm-v2": Paper(1, one, "masked", 32),
    "llada2": Paper(0, inverse_time, "tokens", 32),
    "tiny-a2d": Paper(0, inverse_time, "tokens", 32),
}
TUNED = ("llada-sft", "fast-dllm-v2", "tiny-a2d")
LLADA2 = [1, 4, 32, 64, *[4096] * 8, 2048, 1024, 512, 256, 128, 64]  # before 32, a part each
ANNEALED = {"diffugpt": 10, "llada2": len(LLADA2)}  # steps of the anneal here


def formula(paper: Paper, documents: list[Document], nll: list[dict[int, float]]) -> float:
    """The loss, from -log p of the masked tokens of each document."""
    total = scored = hidden = 0.0
    for document, values in zip(documents, nll, strict=True):
        size = paper.block or len(document.ids)
        own = 0.0
        for start in range(0, len(document.ids), size):
            block = range(start, start + size)
            could = [i for i in block if i in document.scored]
            wanted = [i for i in could if document.masked[i]]
            for n in wanted:
                weight = paper.weight(document, n, block, len(wanted) / len(could))
                own += document.share[n] * weight * values[n]
                hidden += document.share[n]
        length = sum(document.share[i] for i in document.scored)
        scored += length
        total += own / length if paper.divisor == "answers" else own
    return total / {"tokens": scored, "masked": hidden, "answers": len(documents)}[paper.divisor]


def read(
    model: torch.nn.Module, mask: int, paper: Paper, document: Document, reveal: list | None = None
) -> dict[int, float]:
    """-log p of the masked tokens, where the paper reads them: each block stands masked behind the
    clean blocks before it. `reveal`: [L][L], look-ahead edges that exist; None: all of them."""
    size, nll = paper.block or len(document.ids), {}
    for start in range(0, len(document.ids), size):
        stop = min(start + size, len(document.ids))
        wanted = [n for n in range(start, stop) if document.masked[n]]
        if not wanted:
            continue
        ids = [*document.ids[:start], *(mask if n in wanted else document.ids[n]
                                        for n in range(start, stop))]  # fmt: skip
        edges = torch.zeros(1, 1, stop, stop, dtype=torch.bool)
        for q in range(stop):
            for k in range(stop):
                ahead = k > q and (paper.causal or (reveal is not None and not reveal[q][k]))
                edges[0, 0, q, k] = k // size <= q // size and not ahead
        with torch.no_grad():
            logits = model(torch.tensor([ids]), attention_mask=edges, use_cache=False).logits[0]
        logits[:, mask] = -math.inf  # no text has the mask
        for n in wanted:
            row = logits[n - paper.back]
            nll[n] = float(row.logsumexp(0) - row[document.ids[n]])
    return nll


class Setting:
    """A recipe's own trainer on the tiny model in float64, and its batches."""

    def __init__(self, name: str, prepare, folder, data, tmp_path):
        anneal = ANNEALED.get(name, 0)
        recipe = load_recipe(
            name,
            [
                f"data.max_length={LENGTH}", f"data.sources=[{data}]", f"anneal.steps={anneal}",
                "train.max_steps=40", "train.warmup_steps=0", "train.precision=fp32",
                f"train.per_device_train_batch_size={ROWS}", "train.decay_steps="
                f"{int(load_recipe(name).train.schedule == 'warmup_stable_decay')}",
                "train.gradient_accumulation_steps=1", "train.gradient_checkpointing=false",
            ],
        )  # fmt: skip
        plan = prepare(folder, recipe)
        self.model = plan.checkpoint.model.double().eval()
        self.mask = plan.checkpoint.spec.mask_token_id
        self.trainer = plan.make_trainer(plan, tmp_path / "run", [])
        self.recipe = plan.recipe
        self.trainer.current_gradient_accumulation_steps = 1  # what its loop would set
        self.rows = list(islice(self.trainer.train_dataset, ROWS))

    def batch(self, step: int = 0) -> dict:
        return self.trainer.data_collator([(step * ROWS + n, row) for n, row in self.rows])

    def loss(self, batch: dict) -> float:
        divisors = self.trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        with torch.no_grad():
            return float(self.trainer.compute_loss(self.model, batch, False, divisors))

    def by_hand(self, paper: Paper, batch: dict, reveal: list | None = None) -> float:
        """What the paper's loss of the batch is."""
        documents = self.documents(batch)
        nll = [read(self.model, self.mask, paper, d, reveal) for d in documents]
        return formula(paper, documents, nll)

    def documents(self, batch: dict) -> list[Document]:
        """The documents of the rows, and their second views, with the noise of the batch."""
        read = self._turns if "noisy" in batch else self._pieces
        count = len(batch["scored"])
        return [d for r in range(count) for d in read(batch, r, self.rows[r % ROWS][1])]

    def _pieces(self, batch: dict, r: int, row: list) -> Iterator[Document]:
        start = 0
        for piece in row:
            n = len(piece.ids)
            masked = batch["scored"][r, start : start + n].tolist()
            share = [1 / piece.run if n - i <= piece.run else 1.0 for i in range(n)]
            yield Document(piece.ids, masked, list(range(1, n)), share, piece.real)
            start += n

    def _turns(self, batch: dict, r: int, row: list) -> Iterator[Document]:
        for doc, part in enumerate(row):
            (turn,) = part.turns
            fill = turn.stop - turn.end
            ids = [*part.ids[: turn.end], *[part.ids[turn.end - 1]] * fill]
            noisy = batch["noisy"][r] & (batch["doc"][r] == doc)
            hidden = set(batch["pos"][r][noisy & batch["scored"][r]].tolist())
            share = [1 / (fill + 1) if i >= turn.end - 1 else 1.0 for i in range(turn.stop)]
            scored = list(range(turn.start, turn.stop))
            masked = [i in hidden for i in range(turn.stop)]
            yield Document(ids, masked, scored, share, turn.end)


@pytest.fixture
def setting(tiny_checkpoint, convert_tiny, write_jsonl, tmp_path):
    def make(name: str, texts: bool = False) -> Setting:
        if texts or name not in TUNED:
            stories = [" ".join(WORDS.split()[n % 7 :][: 2 + 3 * n]) for n in range(8)]
            data = write_jsonl("rows.jsonl", [{"text": text} for text in stories])
            return Setting(name, ADAPT.prepare, tiny_checkpoint, data, tmp_path)
        recipe = load_recipe(name)
        if recipe.data.chat_template:
            rows = [
                {
                    "messages": [
                        {"role": "user", "content": "say"},
                        {"role": "assistant", "content": a},
                    ]
                }
                for a in (WORDS[:3], WORDS[:19])
            ]
        else:
            rows = [{"prompt": "say:", "completion": f" {a}"} for a in (WORDS[:9], WORDS[:36])]
        data = write_jsonl("rows.jsonl", rows)
        chosen = {n: getattr(recipe.convert, n) for n in recipe.convert.model_fields_set}
        overrides = [f"convert.{n}={'null' if v is None else v}" for n, v in chosen.items()]
        return Setting(name, SFT.prepare, convert_tiny(*overrides), data, tmp_path)

    return make


@pytest.mark.parametrize("name", PAPERS)
def test_the_loss_is_the_papers_formula(name, setting):
    """And not that formula with another place, weight, divisor, block or attention."""
    here, paper = setting(name), PAPERS[name]
    batch = here.batch(ANNEALED.get(name, 0))
    loss, documents = here.loss(batch), here.documents(batch)
    nll = [read(here.model, here.mask, paper, document) for document in documents]
    assert loss == pytest.approx(formula(paper, documents, nll), rel=1e-5)
    wrong = [
        formula(replace(paper, **fault), documents, nll)
        for fault in (
            *({"weight": weight} for weight in {one, inverse_time} - {paper.weight}),
            *({"divisor": d} for d in {"tokens", "masked", "answers"} - {paper.divisor}),
        )
    ]
    wrong += [
        here.by_hand(replace(paper, **fault), batch)
        for fault in ({"back": 1 - paper.back}, {"block": 8}, {"causal": True})
    ]
    assert all(loss != pytest.approx(other, rel=1e-4) for other in wrong), wrong


@pytest.mark.parametrize("name", ["fast-dllm-v2", "tiny-a2d"])
def test_a_recipe_of_sft_has_the_same_formula_on_texts(name, setting):
    """As benchmarks/published.py runs it; the first token of a block too is read as in decoding."""
    here = setting(name, texts=True)
    batch = here.batch()
    assert here.loss(batch) == pytest.approx(here.by_hand(PAPERS[name], batch), rel=1e-5)


@pytest.mark.parametrize("step", [0, 9])
def test_diffugpt_reveals_edges_with_the_steps(setting, step):
    here, ratio = setting("diffugpt"), step / ANNEALED["diffugpt"]
    reveal = reveal_edges(ratio, LENGTH, LENGTH, here.recipe.train.seed, step)
    assert float(reveal.float().mean()) == pytest.approx(ratio, abs=0.05)
    batch, paper = here.batch(step), PAPERS["diffugpt"]
    loss = here.loss(batch)
    assert loss == pytest.approx(here.by_hand(paper, batch, reveal.tolist()), rel=1e-5)
    assert loss != pytest.approx(here.by_hand(paper, batch), rel=1e-4)


@pytest.mark.parametrize("step", [0, 1, 4, 17, 18])
def test_llada2_trains_blocks_that_grow_to_the_row_and_shrink(setting, step):
    here = setting("llada2")
    assert list(here.recipe.anneal.lengths) == LLADA2
    batch, paper = here.batch(step), replace(PAPERS["llada2"], block=[*LLADA2, 32][step])
    loss = here.loss(batch)
    assert loss == pytest.approx(here.by_hand(paper, batch), rel=1e-5)
    assert loss != pytest.approx(here.by_hand(replace(paper, block=16), batch), rel=1e-4)


def test_fast_dllm_v2_learns_each_token_once_in_two_views(setting):
    here = setting("fast-dllm-v2")
    documents = here.documents(here.batch())
    half = len(documents) // 2
    for first, second in zip(documents[:half], documents[half:], strict=True):
        assert first.ids == second.ids
        for i in first.scored:
            assert first.masked[i] != second.masked[i]


def test_sdar_draws_one_time_a_document(setting):
    here = setting("sdar")
    counts = [
        [sum(d.masked[start : start + 4]) for start in range(4, len(d.ids), 4)]
        for d in here.documents(here.batch())
    ]
    assert all(len(set(blocks)) <= 1 for blocks in counts)
    assert len({blocks[0] for blocks in counts if blocks}) > 1


def test_llada_cuts_one_row_in_a_hundred_to_a_random_length(setting):
    recipe = setting("llada").recipe
    assert recipe.data.cut_share == 0.01
    texts = [[1, *[3 + n // 50**i % 50 for i in range(LENGTH - 2)], 2] for n in range(3000)]
    parts = [piece for text in texts for piece in document_parts(text, 0, 2, recipe, 0)]
    cut = [p for p in parts if len(p.ids) < LENGTH]
    assert 0.005 < len(cut) / len(parts) < 0.015
    assert min(len(p.ids) for p in cut) < 16 and max(len(p.ids) for p in cut) > 48
    assert all(p.real == len(p.ids) and p.run == 0 for p in cut)  # nothing teaches to end there


def test_a_share_of_cut_rows_belongs_to_full_attention():
    with pytest.raises(Ar2DiffError, match=r"data\.cut_share can only be set with attention full"):
        load_recipe("sdar", ["data.cut_share=0.01"])


def test_weights_by_context_are_for_adapt(convert_tiny, write_jsonl):
    data = write_jsonl("rows.jsonl", [{"prompt": "say:", "completion": " it"}])
    recipe = load_recipe("dream", [f"data.sources=[{data}]", "data.max_length=64"])
    with pytest.raises(Ar2DiffError, match=r"objective\.weight=cart only works with adapt"):
        SFT.prepare(convert_tiny("convert.attention=full"), recipe)
