"""The diffusion head: what the sampler draws with it, and the folders that hold it."""

import pytest
import torch
from conftest import MASK, build_model, tiny_spec, with_head
from test_likelihood import own_mask, raw_logits
from test_samplers import decode

from ar2diff.core.samplers import draw
from ar2diff.core.seeds import keyed_generator

PROMPT, NEW = [1, 17, 42, 5, 33], 11
RULES = [
    {"threshold": 0.2},
    {"threshold": 0.9},
    {"threshold": 0.0},
    {"steps_per_block": 2},
    {"steps_per_block": 2, "threshold": 0.2},
    {"entropy_bound": 2.0},
]


def slowly(model, spec, seed=None, **rule):
    """One row by the definition, a position at a time: its ids, and its forwards."""
    head, back = model.diffusion_head, int(spec.prediction == "shift")
    size, ids = spec.block_length or len(PROMPT) + NEW, [*PROMPT, *[MASK] * NEW]
    generator = None if seed is None else keyed_generator(seed, 0, *PROMPT)
    forwards, begun = 0, {}
    while MASK in ids:
        start = ids.index(MASK) // size * size
        block = range(start, start + size)
        places = [i for i in block if i < len(ids) and ids[i] == MASK]
        context = torch.tensor([ids[: start + size]])
        mask = own_mask(context.shape[1], start, spec.attention, size)
        logits = raw_logits(model, context, mask)[0]
        numbers = (
            {}
            if generator is None
            else dict(zip(places, torch.rand(len(places), generator=generator, dtype=torch.double)))
        )

        def pick(place, before):
            own = logits[place - back].clone()
            own[MASK] = float("-inf")
            if before is not None:
                own += head.before[before] @ head.after
            token = own.argmax()
            if numbers:
                token = draw(own.softmax(-1)[None], numbers[place][None])[0]
            return int(token), float(own.softmax(-1)[token]), own

        choices = {i: pick(i, None if ids[i - 1] == MASK else ids[i - 1]) for i in places}
        ranked = sorted(places, key=lambda i: -choices[i][1])
        threshold = rule.get("threshold")
        quota = None
        if "steps_per_block" in rule:
            total, taken = begun.setdefault(start, (len(places), forwards))
            quota = total // 2 + (total % 2 if forwards == taken else 0)
        if "entropy_bound" in rule:
            entropy = {
                i: float(torch.special.entr(choices[i][2].softmax(-1)).sum()) for i in places
            }
            order = sorted(places, key=entropy.get)
            sums = [sum(entropy[i] for i in order[:k]) for k in range(len(order))]
            wanted = [i for i, before in zip(order, sums, strict=True) if before <= 2.0]
        else:
            wanted = [i for i in places if threshold is not None and choices[i][1] > threshold]
            if len(wanted) < (quota or 1):
                wanted = ranked[: quota or 1]
        alone = quota is None and "entropy_bound" not in rule
        decided = {}
        for i in places:
            if i - 1 in decided and (alone or i in wanted):
                token, sure, _ = pick(i, decided[i - 1])
                if not alone or sure > threshold:
                    decided[i] = token
            elif i in wanted:
                decided[i] = choices[i][0]
        for i, token in decided.items():
            ids[i] = token
        forwards += 1
    return ids, forwards


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("attention", ["causal_context", "block_causal", "full"])
@pytest.mark.parametrize("prediction", ["same", "shift"])
@torch.no_grad()
def test_the_sampler_decides_from_left_to_right(rule, attention, prediction):
    model, spec = with_head(build_model("llama"), tiny_spec(attention, prediction=prediction))
    for seed in (None, 3):
        settings = {"temperature": 0.0} if seed is None else {"temperature": 1.0, "seed": seed}
        settings |= {"eos_token_id": [-1], **rule}
        canvas, _ = decode([PROMPT], model, spec, new=NEW, **settings)
        ids, forwards = slowly(model, spec, seed, **rule)
        assert canvas.ids[0].tolist() == ids
        assert int(canvas.forwards) == forwards
