"""`data.self`: the text that a model writes before a draft adapter is trained on it."""

import json

import pytest

import ar2diff
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.sections import SelfData
from ar2diff.core.errors import Ar2DiffError
from ar2diff.generation.complete import complete
from ar2diff.training import own_text
from ar2diff.training.own_text import OwnText, cache_folder, read_prompts

PROMPTS = [
    {"prompt": "a cat sat on"},
    {"text": "the dog saw the big red mat"},
    {"prompt": "a"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and groups of two rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(own_text, "GROUP", 2)


@pytest.fixture
def write(tiny_checkpoint, write_jsonl):
    """The documents of `data.self` with these settings."""
    file = write_jsonl("prompts.jsonl", PROMPTS)
    checkpoint = load_checkpoint(str(tiny_checkpoint))

    def call(**settings):
        own = SelfData(**{"prompts": str(file), "max_new_tokens": 6, "tokens": 40} | settings)
        return OwnText(checkpoint, own, read_prompts(own, "text")).documents()

    return call


def lengths_and_notes(tiny_checkpoint, write_jsonl, lengths, **settings):
    """The lengths of prompts that are answered, the longest answer, and what is said of it."""
    file = write_jsonl("long.jsonl", [{"prompt": "a" * (length - 1)} for length in lengths])
    own = SelfData(prompts=str(file), **settings)
    text = OwnText(load_checkpoint(str(tiny_checkpoint)), own, read_prompts(own, "text"))
    prompts, new = text._prompts()
    return [len(prompt) for prompt in prompts], new, text.notes()[1:]


@pytest.mark.parametrize(
    ("lengths", "wanted", "kept", "new"),
    [  # in a context of 512
        ([2, 100, 400], 64, [2, 100, 400], 64),
        ([2, 100, 200], 512, [2, 100, 200], 312),
        ([2, 100, 200], 1000, [2, 100, 200], 312),
        ([2, 100, 500], 300, [2, 100], 256),  # half of the context is an answer's
        ([300, 500], 300, [300], 212),
    ],
)
def test_an_answer_is_shortened_before_a_prompt_is_left_out(
    tiny_checkpoint, write_jsonl, lengths, wanted, kept, new
):
    found = lengths_and_notes(tiny_checkpoint, write_jsonl, lengths, max_new_tokens=wanted)
    assert found[:2] == (kept, new)
    assert len(found[2]) == (new < wanted) + (kept != lengths)
    if new < wanted:
        assert found[2][0].startswith(f"note: an answer has at most {new} tokens, not {wanted} ")


def held() -> str:
    (file,) = cache_folder().iterdir()
    return file.read_text()


def test_the_text_is_what_the_model_writes_in_ar_mode(write, tiny_checkpoint):
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    found = write(temperature=0, prompt_tokens=5)
    given = ["a cat sat on", "the ", "a"]  # of a text, BOS and four bytes
    assert len(found) == 3  # greedy text is written once
    for ids, prompt in zip(found, given, strict=True):
        own = complete(checkpoint, prompt, mode="ar", max_new_tokens=6).token_ids
        assert ids == checkpoint.tokenizer(prompt).input_ids + own
    drawn = write(prompts=None)
    assert all(ids[0] == checkpoint.tokenizer.bos_token_id for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) == len(drawn)


def test_a_killed_run_continues_to_the_same_text(write, monkeypatch):
    whole = write()
    text = held()
    lines = text.splitlines(keepends=True)
    assert sum(len(row) for row in whole) > 40 and len(lines) > 4
    (file,) = cache_folder().iterdir()
    for left in ("", lines[0], "".join(lines[:3]), "".join(lines[:2]) + lines[2][:5]):
        file.write_text(left)
        assert write() == whole and held() == text
    monkeypatch.setattr(own_text, "sample", None)
    assert write() == whole  # from the cache
    assert write(tokens=13) == whole[:3]


def test_more_text_continues_the_file_and_other_settings_have_their_own(write):
    fewer, text = write(tokens=13), held()
    more = write(tokens=40)
    assert more[: len(fewer)] == fewer and held().startswith(text) and held() != text
    write(temperature=0.5)
    assert len(list(cache_folder().iterdir())) == 2


def test_messages_are_given_up_to_the_last_answer(write_jsonl):
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))]
    file = write_jsonl("chat.jsonl", [{"messages": messages}])
    ((_, prompt, _),) = read_prompts(SelfData(prompts=str(file)), "text").rows
    assert [m["content"] for m in prompt] == ["a"]


def settings_of(*overrides: str) -> list[str]:
    return [
        "data.max_length=16", "train.max_steps=2", "train.warmup_steps=0", "draft.block_length=4",
        "draft.rank=2", "draft.head_rank=2", "train.save_steps=1", "eval.rows=2", "eval.length=6",
        "eval.steps=2", "data.self.tokens=60", "data.self.max_new_tokens=8", *overrides,
    ]  # fmt: skip


def test_a_draft_adapter_is_trained_on_it_alone(tiny_checkpoint, tmp_path, write_jsonl):
    prompts = write_jsonl("prompts.jsonl", [*PROMPTS, {"prompt": "a" * 600}])
    overrides = settings_of(f"data.self.prompts={prompts}")
    plan = ar2diff.draft(tiny_checkpoint, None, tmp_path / "o", overrides=overrides, dry_run=True)
    assert any("writes 60 tokens" in note for note in plan.notes) and not cache_folder().exists()
    assert any("1 prompt is left out" in note for note in plan.notes)
    result = ar2diff.draft(tiny_checkpoint, None, tmp_path / "o", overrides=overrides)
    assert result.eval_rows == 2 and result.eval["tokens_per_forward"] >= 1
    assert (
        ar2diff.draft(
            tiny_checkpoint, None, tmp_path / "o", overrides=overrides, resume=True
        ).tokens
        == result.tokens
    )
    prompts.write_text(json.dumps(PROMPTS[0]) + "\n")
    with pytest.raises(Ar2DiffError, match="data or the chat template has changed"):
        ar2diff.draft(tiny_checkpoint, None, tmp_path / "o", overrides=overrides, resume=True)


def test_it_is_mixed_with_other_documents(tiny_checkpoint, tmp_path, write_jsonl):
    data = write_jsonl("texts.jsonl", [{"text": "a cat sat on a mat"}] * 3)
    overrides = settings_of(
        "eval.steps=0", "data.self.weight=3", f"data.sources=[{{path: {data}, weight: 1}}]"
    )
    result = ar2diff.draft(tiny_checkpoint, None, tmp_path / "o", overrides=overrides)
    assert result.tokens and cache_folder().exists()


@pytest.mark.parametrize(
    ("overrides", "rows", "said"),
    [
        (["data.self.temperature=0"], None, "temperature 0 needs prompts"),
        (["data.self.prompts=/nowhere.jsonl"], None, "does not exist"),
        ([], [{"n": 1}], "row 1 has no prompt"),
        ([], [{"question": "a"}], "'question'"),
        ([], [{"messages": [{"role": "user", "content": "a"}]}], "no chat template"),
        ([], [{"prompt": "a" * 600}], "leaves no room"),
        (["data.self.weight=1", "data.sources=[{path: a.jsonl}]"], None, "must have a weight"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tiny_checkpoint, tmp_path, write_jsonl, overrides, rows, said
):
    if rows is not None:
        file = write_jsonl("prompts.jsonl", rows)
        overrides = [*overrides, f"data.self.prompts={file}"]
    with pytest.raises(Ar2DiffError) as refused:
        ar2diff.draft(tiny_checkpoint, None, tmp_path / "o", overrides=settings_of(*overrides))
    assert said in str(refused.value) and len(str(refused.value).splitlines()) <= 2
    assert not (tmp_path / "o").exists() and not cache_folder().exists()


def test_a_cache_that_cannot_be_written_to_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny_checkpoint / "config.json"))
    with pytest.raises(Ar2DiffError, match=r"cannot be kept in .*Not a directory") as refused:
        ar2diff.draft(tiny_checkpoint, None, tmp_path / "o", overrides=settings_of())
    assert "XDG_CACHE_HOME" in refused.value.fix and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "convert",
    [[], ["convert.attention=full", "convert.block_length=null", "objective.ar_weight=0"]],
    ids=["causal_context", "full"],
)
def test_adapt_trains_on_the_text_of_the_model_that_it_converts(
    tiny_checkpoint, tmp_path, write_jsonl, write, convert
):
    file, own = write_jsonl("prompts.jsonl", PROMPTS), {"temperature": 0, "max_new_tokens": 8}
    wanted = write(tokens=60, **own)
    text = held()
    (cached,) = cache_folder().iterdir()
    cached.unlink()
    overrides = [
        "data.max_length=16", "train.max_steps=1", "train.warmup_steps=0", "eval.steps=0",
        f"data.self.prompts={file}", "data.self.tokens=60", "data.self.temperature=0",
        "data.self.max_new_tokens=8", *convert,
    ]  # fmt: skip
    result = ar2diff.adapt(tiny_checkpoint, None, tmp_path / "out", overrides=overrides)
    assert held() == text and wanted and result.tokens


def test_a_model_without_an_ar_mode_cannot_write_its_own_text(tiny_checkpoint, tmp_path):
    causeless = ["convert.attention=block_causal", "objective.ar_weight=0"]
    ar2diff.adapt(tiny_checkpoint, None, tmp_path / "a", max_steps=0, overrides=causeless)
    with pytest.raises(Ar2DiffError, match="no AR mode, in which it could write"):
        ar2diff.adapt(
            tmp_path / "a", None, tmp_path / "b", overrides=["data.self.tokens=9", *causeless]
        )


def test_sft_and_rl_do_not_have_it(tiny_checkpoint, tmp_path, run_both):
    with pytest.raises(Ar2DiffError, match="only works with adapt and draft"):
        ar2diff.sft(tiny_checkpoint, None, tmp_path / "o", overrides=["data.self.tokens=9"])
    code, _, _ = run_both("sft", tiny_checkpoint, "--self-data", "x")
    assert code == 2
    for verb in ("adapt", "draft"):
        code, _, error = run_both(verb, tiny_checkpoint, "--self-data", "/nowhere.jsonl")
        assert code == 2 and "/nowhere.jsonl does not exist" in error
