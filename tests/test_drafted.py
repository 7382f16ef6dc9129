"""Decoding with a draft adapter: the text is the model's own, whatever the adapter drafts."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from test_draft import ROWS, draft_of

from ar2diff.core.canvas import Canvas
from ar2diff.core.denoise import denoise
from ar2diff.core.draft import load_draft
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.generate import generate
from ar2diff.core.options import resolve
from ar2diff.core.tree import Guesses

PROMPTS = [[1, 17, 42, 5, 9, 60, 33], [1, 8], [1, 33, 21, 4]]
WAYS = [
    {"draft_length": 3},
    {"draft_length": 3, "draft_nodes": 7},
    {"draft_length": 2, "cache_implementation": "static"},
    {"draft_length": 3, "draft_nodes": 5, "cache_implementation": "none"},
    {},
]


def decoded(model, draft, prompts=PROMPTS, new=14, **settings):
    spec = draft.spec_for(None)
    options = resolve(spec, {"max_new_tokens": new, **settings}, drafts=True)
    canvas = Canvas.of_prompts(
        prompts, spec.mask_token_id, max_new_tokens=new, end_ids=options.eos_token_id
    )
    for _ in denoise(model, spec, canvas, options, draft=draft):
        pass
    return [canvas.new_ids(row) for row in range(len(prompts))], canvas


@pytest.fixture(params=["llama", "gpt2", "mistral_window", "gemma2"])
def drafted(request, tiny_model):
    kind = "eager" if request.param == "gemma2" else "sdpa"
    model = copy.deepcopy(tiny_model(request.param, kind, torch.float32)).eval()
    return model, draft_of(model).eval()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_text_is_the_models_own_with_any_adapter(drafted, way, sampling):
    model, draft = drafted
    want, plain = decoded(model, draft, mode="ar", eos_token_id=[7], **sampling)
    assert len({tuple(text) for text in want}) == len(PROMPTS)
    got, canvas = decoded(model, draft, eos_token_id=[7], **way, **sampling)
    assert got == want
    alone = [decoded(model, draft, [p], eos_token_id=[7], **way, **sampling)[0][0] for p in PROMPTS]
    assert alone == want
    for row, text in enumerate(got):
        answer = slice(int(canvas.prompt[row]), int(canvas.prompt[row]) + len(text))
        torch.testing.assert_close(
            canvas.logprob[row, answer], plain.logprob[row, answer], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("way", [{"draft_length": 3}, {"draft_length": 3, "draft_nodes": 7}, {}])
def test_a_text_in_bfloat16_leaves_the_models_own_at_a_near_tie_only(tiny_model, way):
    model = copy.deepcopy(tiny_model("llama", "sdpa", torch.float32)).bfloat16().eval()
    draft = draft_of(model).bfloat16().eval()
    want, _ = decoded(model, draft, mode="ar", eos_token_id=[])
    got, _ = decoded(model, draft, eos_token_id=[], **way)
    exact = copy.deepcopy(model).float()
    for prompt, text, other in zip(PROMPTS, got, want, strict=True):
        assert len(text) == len(other) == 14
        at = next((i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b), None)
        if at is not None:
            with torch.no_grad():
                logits = exact(input_ids=torch.tensor([prompt + text[:at]])).logits[0, -1]
            first, second = logits.topk(2).values
            assert first - second < 0.1


def test_the_branch_the_row_and_the_head_are_what_drafts_come_from(tiny_model, monkeypatch):
    """A row of masks in one forward, read by hand, gives the first candidates."""
    model = copy.deepcopy(tiny_model("llama", "sdpa", torch.float64)).eval()
    draft = draft_of(model).double().eval()
    seen, chains = [], []
    original = Guesses.chain
    monkeypatch.setattr(
        Guesses, "chain", lambda self, n: chains.append(original(self, n)) or chains[-1]
    )
    spec = draft.spec_for(None)
    options = resolve(spec, {"max_new_tokens": 8, "draft_length": 3}, drafts=True)
    canvas = Canvas.of_prompts([PROMPTS[0]], spec.mask_token_id, max_new_tokens=8)
    states = denoise(model, spec, canvas, options, draft=draft)
    next(states)
    newest = canvas.ids[0, canvas.front[0] - 1]
    prompt = torch.tensor([PROMPTS[0]])
    ids = torch.cat([prompt, torch.full((1, 3), draft.mask_token_id)], 1)
    size, known = ids.shape[1], prompt.shape[1]
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    mask[known:, known:] = True
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    with torch.no_grad(), draft.applied(model, slice(known, None)):
        logits = model(
            input_ids=ids, attention_mask=mask[None, None],
            position_ids=torch.arange(size)[None], use_cache=False,
        ).logits[0]  # fmt: skip
    hook.remove()
    hidden, memory, want = seen[0][0, known:], 0.0, []
    with torch.no_grad():
        for k in range(3):
            memory = draft.head.before[newest] + draft.head.fade.tanh() * memory
            bias = (memory * (1 + draft.head.gate @ hidden[k])) @ draft.head.after
            newest = (logits[known + k] + bias).argmax()
            want.append(int(newest))
    assert chains[0][0].tokens == want


def test_generate_takes_a_draft(tiny_model):
    model = copy.deepcopy(tiny_model("llama", "sdpa", torch.float32)).eval()
    draft, ids = draft_of(model).eval(), torch.tensor([PROMPTS[0]])
    plain = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, pad_token_id=0
    )
    settings = {"max_new_tokens": 9, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(generate(ids, model=model, draft=draft, **settings), plain)
    with pytest.raises(Ar2DiffError, match="mode"):
        generate(ids, model=model, draft=draft, mode="diffusion", **settings)
    with pytest.raises(Ar2DiffError, match="not a draft adapter"):
        generate(ids, model=model, draft="/nowhere", **settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 10**9}, "does not have the shape in its spec"),
        ({"head_rank": 2**40}, "does not have the shape in its spec"),
        ({"rank": 2**62}, "cannot be read"),
        ({"head_rank": 0}, "is not in its spec"),
        ({"format": 2}, "reads format 1"),
        ({"block_length": 1}, "nothing to draft"),
        ({"targets": ["model.layers.0.nothing"]}, "does not have"),
        ({"targets": []}, "targets is"),
        ({"vocabulary": 65}, "embeddings of 65"),
        ({"more": 1}, "unknown key"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_before_memory_is_taken(
    tiny_model, tmp_path, change, said
):
    model = copy.deepcopy(tiny_model("llama", "sdpa", torch.float32)).eval()
    draft = draft_of(model)
    save_file(draft.tensors(), tmp_path / "draft.safetensors")
    (tmp_path / "draft.json").write_text(json.dumps(draft.spec.to_dict()))
    assert load_draft(tmp_path, model).tensors().keys() == draft.tensors().keys()
    (tmp_path / "draft.json").write_text(json.dumps({**draft.spec.to_dict(), **change}))
    with pytest.raises(Ar2DiffError, match=said):
        load_draft(tmp_path, model)


def test_a_folder_holds_the_adapter_with_its_scale(tiny_model, tmp_path):
    model = copy.deepcopy(tiny_model("llama", "sdpa", torch.float32)).eval()
    draft, ids = draft_of(model).eval(), torch.tensor([[1, 17, ROWS, ROWS]])
    assert draft.scale != 1
    save_file(draft.tensors(), tmp_path / "draft.safetensors")
    (tmp_path / "draft.json").write_text(json.dumps(draft.spec.to_dict()))
    logits = []
    for adapter in (draft, load_draft(tmp_path, model)):
        with torch.no_grad(), adapter.applied(model, slice(2, None)):
            logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*logits)
