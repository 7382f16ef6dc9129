"""Decode on the pretended accelerator and on the CPU, and print what differs: for test_fakedev.py.

    PYTHONPATH=.. python -m fakedev.decoding SETTING...  # in tests/; without a name, all of them

and with -v before them, where the host waits, by file and line.

One line of JSON for each setting: whether the tokens are the CPU's, and how many forwards, waits
and uploads follow the first forward (whose tokens AR decoding reads one forward late, so that it
counts there), over eight blocks. With a constraint the host reads classes of tokens first, so that
it may wait twice; half of the waits are printed.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
from conftest import MASK, build_model, tiny_spec, with_head
from test_draft import draft_of
from test_joining import MODES, alone, together
from test_noise_verbs import FITTED, NOISES, spec_of

from ar2diff.core.automaton import Automaton
from ar2diff.core.canvas import Canvas
from ar2diff.core.compiled import DECODERS
from ar2diff.core.constraint import Constraint
from ar2diff.core.denoise import denoise
from ar2diff.core.generate import check_model
from ar2diff.core.options import resolve

from .device import Waits, install

BLOCK, BLOCKS = 4, 8
PROMPTS = [[1, 17, 42, 5, 9, 60, 33], [1, 8], [1, 33, 21, 4], [1, 50]]
PROMPTS += [[*prompt, 11, 12] for prompt in PROMPTS]


@dataclass(frozen=True)
class Setting:
    """A way to decode: the model's attention and prediction, and the options."""

    attention: str = "causal_context"
    options: dict[str, Any] = field(default_factory=dict)
    prediction: str = "shift"
    kind: str = "llama"
    drafted: bool = False
    headed: bool = False
    rows: int = 3
    gaps: bool = False
    constrained: bool = False
    noise: str | None = None  # of test_noise_verbs.py
    waits: int = 1  # of the host, that a forward may take without a constraint


def has(p: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """A classifier: log p(the answer has token 7)."""
    behind = torch.arange(p.shape[1], device=p.device) >= prompt[:, None]
    return (p[..., 7] * behind).sum(1).clamp(min=1e-30).log()


def _ar(**options: Any) -> Setting:
    return Setting(options={"mode": "ar", **options})


def _speculative(**options: Any) -> Setting:
    return Setting(options={"mode": "speculative", **options})


def _drafted(**options: Any) -> Setting:
    return Setting(options=options, drafted=True)


def _denoised(**options: Any) -> Setting:
    return Setting(options={"mode": "diffusion", **options})


DRAWN = {"temperature": 0.8, "seed": 3}
CHAIN, TREE = {"draft_length": 3}, {"draft_length": 3, "draft_nodes": 7}
STATIC = {"cache_implementation": "static"}
COMPILED = {"compile": True}  # on the device, where nothing compiles, graphs are plain calls
EDITED = {"mode": "diffusion", "edit_threshold": 0.2, "corrector_steps": 1}
FILTERED = {"min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4}

SIX = {
    "ar": _ar(**DRAWN),
    "speculative compiled": _speculative(**CHAIN, **COMPILED),
    "draft adapter": _drafted(**TREE),
    "threshold": _denoised(threshold=0.9),
    "block_causal compiled": Setting("block_causal", {"steps_per_block": 2, **COMPILED}, "same"),
    "full": Setting("full", {"steps_per_block": 2, "block_length": BLOCK, **DRAWN}),
}
SETTINGS = SIX | {
    "ar greedy": _ar(),
    "ar static": _ar(**STATIC),
    "ar compiled": _ar(**COMPILED),
    "ar alone": Setting(options={"mode": "ar"}, rows=1),
    "ar eight": Setting(options={"mode": "ar"}, rows=8),
    "ar none": _ar(cache_implementation="none"),
    "ar penalty": _ar(repetition_penalty=1.3),
    "ar held": _ar(min_new_tokens=20, eos_token_id=[7]),
    "speculative": _speculative(**CHAIN),
    "speculative alone": Setting(options={"mode": "speculative", **CHAIN}, rows=1),
    "speculative eight": Setting(options={"mode": "speculative", **TREE}, rows=8),
    "speculative tree": _speculative(**TREE),
    "speculative none": _speculative(**CHAIN, cache_implementation="none"),
    "speculative drawn": _speculative(**CHAIN, **DRAWN),
    "speculative filtered": _speculative(**TREE, **DRAWN, **FILTERED),
    "speculative penalty": _speculative(**CHAIN, repetition_penalty=1.3),
    "speculative held": _speculative(**TREE, min_new_tokens=20, eos_token_id=[7]),
    "speculative measured": _speculative(),
    "speculative window": Setting(
        options={"mode": "speculative", **CHAIN}, kind="mistral_window"
    ),
    "draft chain": _drafted(**CHAIN),
    "draft alone": Setting(options=TREE, drafted=True, rows=1),
    "draft eight": Setting(options=CHAIN, drafted=True, rows=8),
    "draft drawn": _drafted(**TREE, **DRAWN),
    "draft static": _drafted(**CHAIN, **STATIC),
    "draft compiled": _drafted(**TREE, **DRAWN, **COMPILED),
    "draft measured": _drafted(),
    "threshold alone": Setting(options={"mode": "diffusion", "threshold": 0.9}, rows=1),
    "threshold eight": Setting(options={"mode": "diffusion", "threshold": 0.9}, rows=8),
    "threshold same": Setting(options={"mode": "diffusion", "threshold": 0.5}, prediction="same"),
    "threshold static": _denoised(threshold=0.5, **STATIC),
    "threshold compiled": _denoised(threshold=0.5, **COMPILED),
    "threshold none": _denoised(threshold=0.5, cache_implementation="none"),
    "threshold drawn": _denoised(threshold=0.5, **DRAWN),
    "threshold filtered": _denoised(threshold=0.5, **DRAWN, **FILTERED, top_k=20, top_p=0.9),
    "top_h": _denoised(threshold=0.5, **DRAWN, top_h=0.5),
    "threshold window": Setting(
        options={"threshold": 0.5, "mode": "diffusion"}, kind="mistral_window"
    ),
    "window compiled": Setting(
        options={"threshold": 0.5, "mode": "diffusion", **COMPILED}, kind="mistral_window"
    ),
    "eager": Setting(options={"threshold": 0.5, "mode": "diffusion"}, kind="gemma2"),
    "gaps": Setting(options={"mode": "diffusion", "threshold": 0.5}, gaps=True),
    "held": _denoised(threshold=0.5, min_new_tokens=20, eos_token_id=[7]),
    "penalty": _denoised(threshold=0.5, repetition_penalty=1.3),
    "bias": _denoised(threshold=0.5, sequence_bias=[[[5], -2.0]]),
    "suppressed": _denoised(threshold=0.5, suppress_tokens=[7, 9]),
    "random": _denoised(steps_per_block=2, order="random", seed=1),
    "margin": _denoised(steps_per_block=2, order="margin"),
    "entropy": _denoised(steps_per_block=2, order="entropy"),
    "entropy bound": _denoised(entropy_bound=0.5),
    "remask": _denoised(steps_per_block=4, remask=0.3),
    "guided": _denoised(threshold=0.5, cfg_scale=1.0),
    "checked": _denoised(threshold=0.5, check_cache=True),
    "headed": Setting(options={"mode": "diffusion", "threshold": 0.3}, headed=True),
    "headed steps": Setting(options={"mode": "diffusion", "steps_per_block": 2}, headed=True),
    "headed drawn": Setting(
        options={"mode": "diffusion", "threshold": 0.3, **DRAWN}, headed=True
    ),
    "switching": Setting(options={"mode": "diffusion", "threshold": 0.5}, kind="phi3_longrope"),
    "block_causal": Setting("block_causal", {"threshold": 0.5}),
    "constrained": Setting(options={"mode": "diffusion", "threshold": 0.5}, constrained=True),
    "constrained drawn": Setting(
        options={"mode": "diffusion", "threshold": 0.5, "top_k": 3, **DRAWN}, constrained=True
    ),
    "constrained entropy": Setting(
        options={"mode": "diffusion", "steps_per_block": 2, "order": "entropy"}, constrained=True
    ),
    "constrained ar": Setting(options={"mode": "ar", **DRAWN}, constrained=True),
    "constrained speculative": Setting(
        options={"mode": "speculative", **TREE}, constrained=True
    ),
    **{
        f"noise {name}": Setting(
            attention, {"mode": "diffusion", "steps_per_block": 3, **DRAWN}, noise=name
        )
        for name, attention in zip(NOISES | FITTED, cycle(("causal_context", "full")))
    },
    "noise edited": Setting(options={"threshold": 0.3, **EDITED, **DRAWN}, noise="self", waits=2),
    "noise guided": Setting(  # which checks what the classifier returned, in each of its steps
        options={"steps_per_block": 3, "classifier": has, **DRAWN}, noise="embedding", waits=5
    ),
    "full none": Setting("full", {"threshold": 0.5, "block_length": BLOCK}),
    "full prefix": Setting(
        "full", {"threshold": 0.5, "block_length": BLOCK, "cache_implementation": "prefix"}
    ),
    "full dual": Setting(
        "full", {"threshold": 0.5, "block_length": BLOCK, "cache_implementation": "dual"}, "same"
    ),
}  # fmt: skip


JOINING = {f"joining {name}": name for name in MODES}  # of test_joining.py


def models(setting: Setting, device: torch.device) -> Iterator[tuple[Any, Any, Any]]:
    """The model, its spec and its draft adapter, on the CPU and on the device."""
    attention = "eager" if setting.kind == "gemma2" else "sdpa"
    model = build_model(setting.kind, attention, torch.float32)
    spec, draft = tiny_spec(setting.attention, BLOCK, setting.prediction), None
    if setting.noise:
        spec = spec_of((NOISES | FITTED)[setting.noise], setting.attention, setting.prediction)
    if setting.headed:
        model, spec = with_head(model, spec)
    if setting.drafted:
        draft = draft_of(model).eval().requires_grad_(False)
        spec = draft.spec_for(None)
    yield model, spec, draft
    moved = copy.deepcopy(model).to(device)
    if setting.headed:
        moved.diffusion_head = copy.deepcopy(model.diffusion_head).to(device)
    yield moved, spec, None if draft is None else copy.deepcopy(draft).to(device)


def states(setting: Setting, model: Any, spec: Any, draft: Any) -> tuple[Canvas, Iterator[Canvas]]:
    """The canvas, and what decides it."""
    new = 0 if setting.gaps else BLOCK * BLOCKS
    given = {"max_new_tokens": new, **setting.options}
    options = resolve(spec, given, drafts=draft is not None, gaps=setting.gaps)
    prompts = PROMPTS[: setting.rows]
    if setting.gaps:
        prompts = [[*prompt, *[MASK] * 9, 5, 6, *[MASK] * 9, 8] for prompt in prompts]
    grid = BLOCK if options.mode == "diffusion" and spec.attention != "full" else 1
    canvas = Canvas.of_prompts(
        prompts, spec.mask_token_id, max_new_tokens=options.max_new_tokens, grid=grid,
        end_ids=options.eos_token_id, min_new_tokens=options.min_new_tokens,
    )  # fmt: skip
    if setting.constrained:
        canvas.constraint = Constraint(in_pairs(model.config.vocab_size), canvas)
    return canvas, denoise(model, spec, canvas, options, draft=draft)


def in_pairs(vocabulary: int) -> Automaton:
    """Texts of pairs of a token and one of at least the double of its number."""
    edges = [(0, token, 1 + token) for token in range(1, 20)]
    edges += [(1 + token, after, 0) for token in range(1, 20) for after in range(2 * token, MASK)]
    columns = tuple(np.array(column) for column in zip(*edges, strict=True))
    return Automaton.of_edges(columns, [0], [0], vocabulary, impossible=[MASK])


def compare(name: str, device: torch.device, module: Any, verbose: bool = False) -> dict[str, Any]:
    """Decode in one way on both devices."""
    setting, texts = SETTINGS[name], []
    plain = {option: value for option, value in setting.options.items() if option != "compile"}
    for model, spec, draft in models(setting, device):
        here = model.device.type == device.type
        if here:
            check_model(model, spec, draft)
        asked = setting if here else replace(setting, options=plain)
        canvas, forwards = states(asked, model, spec, draft)
        next(forwards)  # the prompts, and the timing of forwards
        late = not canvas.forwards.any()  # what came of the prompts is read after it
        calls: list[None] = []
        hook = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        with Waits(module) as found:
            for _ in forwards:
                pass
        hook.remove()
        count = len(calls) + late
        assert (model in DECODERS) == (here and "compile" in setting.options)
        texts.append([canvas.new_ids(row) for row in range(len(canvas.ids))])
        if setting.gaps:
            texts[-1] = canvas.ids.tolist()
    if verbose:
        for (kind, what, place, line), n in found.sites.most_common(30):
            print(f"  {n / count:6.2f} {kind:9} {what:28} {place:24} {line}")
    return {
        "name": name, "same": texts[0] == texts[1], "forwards": count,
        "waits": found.waits / (setting.waits + setting.constrained), "uploads": found.uploads,
    }  # fmt: skip


def compare_joining(name: str, device: torch.device) -> dict[str, Any]:
    """Write rows that join others between two forwards on the device, and each alone on the CPU."""
    model, settings = build_model("llama", dtype=torch.float32), MODES[name]
    moved, spec = copy.deepcopy(model).to(device), tiny_spec()
    texts = [
        [ids for ids, *_ in found(on, spec, settings)]
        for found, on in ((alone, model), (together, moved))
    ]
    return {
        "name": f"joining {name}",
        "same": texts[0] == texts[1],
        "forwards": 1,
        "waits": 0,
        "uploads": 0,
    }


def main() -> None:
    asked = [name for name in sys.argv[1:] if name != "-v"]
    device, module = install()
    for name in asked or [*SETTINGS, *JOINING]:
        try:
            found = (
                compare_joining(JOINING[name], device)
                if name in JOINING
                else compare(name, device, module, "-v" in sys.argv)
            )
        except RuntimeError as error:
            found = {"name": name, "error": str(error)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
