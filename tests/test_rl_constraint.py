"""Rollouts of rl that are held to a constraint: they match, what cannot be held to is refused
before the model is loaded, and the AR mode is scored as it was drawn."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import ar2diff
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.rl import Rl
from ar2diff.core.errors import Ar2DiffError
from ar2diff.training.constraint import barred_tokens
from ar2diff.training.estimators import score
from ar2diff.training.journal import read_metrics
from ar2diff.training.rollouts import Rollout

pytest.importorskip("outlines_core")
ROOM = 8
BLOCKS = ("convert.block_length=4",)
FULL = ("convert.attention=full", "convert.block_length=null")


@pytest.fixture
def tuned(convert_tiny, tmp_path, write_jsonl):
    """Factory: two steps of rl with the reward `regex` for a pattern and options of the sampler."""

    def run(pattern, sampler, of=BLOCKS, **rl):
        data = write_jsonl("rows.jsonl", [{"prompt": f"say {n}"} for n in range(4)])
        reward = {"name": "regex", "args": {"pattern": pattern}}
        settings = {"rewards": [reward], "num_generations": 4, "max_completion_length": ROOM}
        train = {"per_device_train_batch_size": 8, "logging_steps": 1, "max_steps": 2}
        return ar2diff.rl(
            convert_tiny(*of), output_dir=tmp_path / "out", data=data, overwrite=True,
            overrides={"rl": settings | {"sampler": sampler} | rl, "train": train},
        )  # fmt: skip

    return run


def logged(result, name):
    """What each step logged."""
    rows = read_metrics(Path(result.output_dir))
    return [row[name] for row in rows if "reward" in row]


DIGITS = "[0-9]{2,5}(!|\\?)"
OBJECT = {"type": "object", "properties": {"a": {"type": "boolean"}}}
FORMS = {
    "regex": (DIGITS, {"regex": DIGITS}),
    "json_schema": ('"(x|yz)"', {"json_schema": {"enum": ["x", "yz"]}}),
    "choice": ("yes|no", {"choice": ["yes", "no"]}),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_rollout_matches_its_constraint_and_without_one_none_does(tuned, name):
    pattern, sampler = FORMS[name]
    assert logged(tuned(pattern, sampler), "reward") == [1, 1]
    assert max(logged(tuned(pattern, {}), "reward")) < 0.5


@pytest.mark.parametrize(
    "of, estimator", [(BLOCKS, "elbo"), (BLOCKS, "ar"), (FULL, "trajectory"), (FULL, "one_step")]
)
def test_rollouts_match_whatever_scores_them(tuned, of, estimator):
    result = tuned(DIGITS, {"regex": DIGITS}, of, estimator=estimator)
    assert logged(result, "reward") == [1, 1]


def test_a_grammar_holds_rollouts_of_the_ar_mode(tuned):
    sampler = {"grammar": 'start: "(" ("x" | "yz") ")"', "mode": "ar"}
    assert logged(tuned("[(](x|yz)[)]", sampler, estimator="ar"), "reward") == [1, 1]


def test_a_schema_is_read_from_its_file_and_kept_in_the_record(tuned, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"enum": ["x", "yz"]}))
    result = tuned('"(x|yz)"', {"json_schema": str(file)})
    assert logged(result, "reward") == [1, 1]
    record = json.loads((Path(result.output_dir) / "ar2diff.json").read_text())
    assert record["recipe"]["rl"]["sampler"]["json_schema"] == {"enum": ["x", "yz"]}


BAD = {
    "the regular expression '('": {"regex": "("},
    "the shortest text that matches has 9 tokens, but there is room for 8 "
    "(fix: set rl.max_completion_length to 9 or more)": {"regex": "x{9}"},
    "the regular expression 'x' cannot be used": {"regex": "x", "suppress_tokens": [90]},
    "rl.sampler.json_schema has, at #, the keyword 'minimum'": {
        "json_schema": {"type": "integer", "minimum": 2}
    },
    "rl.sampler.json_schema nowhere.json cannot be read": {"json_schema": "nowhere.json"},
    "rl.sampler.json_schema is 3": {"json_schema": 3},
    "rl.sampler.regex cannot be combined with rl.sampler.choice": {"regex": "x", "choice": ["y"]},
}


@pytest.mark.parametrize("says", BAD)
def test_what_cannot_be_held_to_is_refused_before_the_model_is_loaded(
    tuned, says, monkeypatch, tmp_path
):
    monkeypatch.setattr("ar2diff.training.plan.load_checkpoint", None)
    with pytest.raises(Ar2DiffError) as error:
        tuned("x", BAD[says])
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named_before_the_model_is_loaded(tuned, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("ar2diff.training.plan.load_checkpoint", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "outlines_core" else found(name)
    )
    with pytest.raises(Ar2DiffError, match=r"ar2diff\[constraints\]"):
        tuned("x", {"choice": ["zz"]})


def test_the_likelihood_of_the_ar_mode_is_that_of_the_allowed_texts(convert_tiny):
    """The likelihoods of all texts that match, each with its end unless it fills the room, sum to
    1; a forced token has likelihood 1."""
    checkpoint, texts = load_checkpoint(str(convert_tiny(*BLOCKS))), ["q", "ab", "abc", "xyzw"]
    rl = Rl(estimator="ar", max_completion_length=4, sampler={"choice": texts, "temperature": 0.7})
    prompt = checkpoint.tokenizer("say").input_ids
    rollouts = []
    for text in texts:
        answer = checkpoint.tokenizer(text, add_special_tokens=False).input_ids
        answer += checkpoint.end_ids[: 4 - len(answer)]
        ids = torch.tensor(prompt + answer)
        rollouts.append(Rollout(ids, len(prompt), len(answer), torch.zeros_like(ids), 0))
    barred = barred_tokens(checkpoint, rl, rollouts, checkpoint.suppressed)
    with torch.no_grad():
        logps = score(checkpoint.model, rollouts, rl, checkpoint.spec, barred).per_token()
    assert logps.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert logps[3, 1:].tolist() == [0, 0, 0] and logps[:, 0].max() < -0.01
    assert logps[1, 0] == logps[2, 0] and logps[1:3, 2].max() < -0.001


def test_the_trainer_scores_the_ar_mode_so_and_the_diffusion_mode_by_its_own_likelihood(tuned):
    """Where all tokens are forced, there is no entropy."""
    entropy = {}
    for estimator in ("ar", "trajectory"):
        result = tuned("abc", {"choice": ["abc"]}, estimator=estimator)
        entropy[estimator] = logged(result, "entropy")
    assert entropy["ar"] == [0, 0] and min(entropy["trajectory"]) > 1
