"""The model card: what it says is so, its code runs, and no path of this machine is in it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from ar2diff.cli.main import main
from reports import realistic

from ar2diff.checkpoint.custom_generate import read_custom_generate
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.merge import merge
from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.generation.chat import Chat
from ar2diff.generation.complete import complete
from ar2diff.hub.card import TOKENS, changes, measure
from ar2diff.hub.origin import Origin, origin_of, without_paths
from ar2diff.hub.push import PROMPT, preview
from ar2diff.reports.figures import write_report
from ar2diff.training.adapt import adapt

SHOWN = [{"mode": "speculative", "draft_length": 7}, {"mode": "diffusion"}, {"threshold": 0.7}]
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """Factory: a folder after two steps on text that it was told nothing of. Never write to it."""
    place = tmp_path_factory.mktemp("runs")
    data = place / "secret.jsonl"
    rows = [{"text": f"the cat number {n} sat on the mat and saw a dog"} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name, *overrides, model=tiny_checkpoint):
        settings = [f"data.sources=[{data}]", "train.max_steps=2", "data.max_length=32"]
        adapt(str(model), load_recipe(None, [*settings, *overrides]), place / name)
        return place / name

    return make


@pytest.fixture(scope="module")
def trained(run):
    return run("trained", "eval.steps=2", "eval.rows=3", "eval.length=8", "eval.samples=2")


@pytest.fixture(scope="module")
def card(trained):
    return preview(trained, license="mit")


def prompt_of(folder: Path) -> str:
    """The one prompt that a run kept."""
    (prompt,) = json.loads((folder / "ar2diff.json").read_text())["prompts"]
    return prompt


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])


def first_block(card: str) -> str:
    block = card[card.index("```") :].split("```")[1]
    assert block.startswith("python\n")
    return block.removeprefix("python\n")


def answer_of(block: str, folder: Path) -> str:
    """What the code of a card prints, where its repository is a folder."""
    code = re.sub(r'name = "[^"]*"', f"name = {str(folder)!r}", block)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue().strip()


def test_the_prompts_are_beginnings_of_texts_that_the_run_held_out(run, tmp_path):
    held_out = tmp_path / "held.jsonl"
    texts = [f"{name} went to the lake to swim" for name in ("Ann", "Bob", "Bob", "Cy", "Di")]
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    watch = (f"eval.data={held_out}", "eval.rows=5", "eval.steps=2", "eval.length=20")
    folder, notes = run("prompted", *watch), []
    prompts = ["Ann went to", "Bob went to", "Cy went to the"]  # 15 bytes, but whole words
    said, checkpoint = preview(folder, license="mit"), load_checkpoint(str(folder))
    assert re.findall(r"greedy answer to \"(.+)\", at most", said) == prompts
    assert "These are the beginnings of texts that were held out from training." in said
    for number, row in enumerate(re.findall(r"^\| `.+` \| (\d+) \| (\d+) \|", said, re.M)):
        found = [measure(checkpoint, prompt)[number] for prompt in prompts]
        assert row == (str(sum(s.tokens for s in found)), str(sum(s.forwards for s in found)))
    record = json.loads((folder / "ar2diff.json").read_text())
    record["prompts"] = ["x" * 2000, prompts[0]]
    (folder / "ar2diff.json").write_text(json.dumps(record))
    said = preview(folder, license="mit", tell=notes.append)
    assert "This is the beginning of a text that was held out" in said
    assert len(notes) == 1 and "has 2001 tokens" in notes[0]


def test_without_held_out_texts_the_prompt_is_a_standard_one(convert_tiny):
    said = preview(convert_tiny(), license="mit")
    assert f"The greedy answer to {json.dumps(PROMPT)}" in said and "held out" not in said


def test_settings_that_the_folder_conflicts_with_are_named(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "folder"))
    file = folder / "generation_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"remask": 0.5, "steps_per_block": 2})
    )
    said = preview(folder, license="mit")
    assert "\n`threshold=0.7` is not shown: remask needs a fixed number of steps.\n" in said


def test_the_front_matter(card):
    assert front_matter(card) == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ar2diff", "diffusion-lm", "custom_generate", "block-diffusion", "llama"],
    }


def test_a_published_base_is_named(trained, monkeypatch):
    said = front_matter(preview(trained, license="mit", base="someone/tiny"))
    assert (said["base_model"], said["base_model_relation"]) == ("someone/tiny", "finetune")


def test_the_first_block_trusts_and_denoises(card, trained):
    block = first_block(card)
    assert "trust_remote_code=True" in block
    prompt = prompt_of(trained)
    text = complete(load_checkpoint(str(trained)), prompt, max_new_tokens=TOKENS).text
    assert answer_of(block, trained) == (prompt + text).strip()


def test_with_a_chat_template_the_first_block_asks_through_it(run, trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text(CHAT)
    said = preview(folder, license="mit", prompt='Say "hi"\n')
    block = first_block(said)
    assert r'"content": "Say \"hi\"\n"' in block
    chat = Chat(load_checkpoint(str(folder)), {"max_new_tokens": TOKENS})
    *_, answer = chat.events('Say "hi"\n')
    assert answer_of(block, folder).endswith(answer.result.text.strip())


@pytest.mark.parametrize(
    "attention,trust,blocks",
    [
        ("causal_context", "the text is that of the AR mode", "a block of 8 tokens"),
        ("block_causal", "the text is wrong", "a block of 8 tokens"),
        ("full", "the text is wrong", "the whole text at once"),
    ],
)
def test_it_says_what_happens_without_trust(convert_tiny, attention, trust, blocks):
    block = ["convert.block_length=null"] * (attention == "full")
    folder = convert_tiny(f"convert.attention={attention}", *block)
    said = preview(folder, license="mit")
    below = said.split("```")[2].strip()
    assert below.startswith("**Without `trust_remote_code=True` nothing fails and nothing warns.**")
    assert trust in below.split("\n\n")[0] and blocks in said
    assert "converted without training: it does not denoise yet" in said
    assert ("speculative" in said) == (attention == "causal_context")


def test_it_names_the_command_that_serves_it(card):
    name = re.search(r'name = "([^"]*)"', card)[1]
    assert f"```sh\npip install 'ar2diff[serve]'\nar2diff serve {name}\n```" in card


def test_a_report_in_the_folder_is_shown(convert_tiny, tmp_path):
    folder = Path(shutil.copytree(convert_tiny(), tmp_path / "model"))
    file = write_report(realistic(), folder / "report")
    said = preview(folder, license="mit")
    section = said[said.index("\n## Measured\n") : said.index("\n## What it is\n")]
    assert "* At equal exact match, model is 1.8x as fast as its base at batch 1" in section
    assert "\n\n| setting | tokens/s at batch 1 |" in section
    assert "\n\nMeasured 2026-11-26 with ar2diff 0.1.0 on x86-64. ± is one standard" in section
    assert section.endswith(
        "Not measured: speed: batch 32 and 64; control: gaps held to a JSON schema.\n"
    )
    file.write_text("{}")
    with pytest.raises(Ar2DiffError, match=r"report\.json: title: Field required"):
        preview(folder, license="mit")


def test_an_ar_mode_that_was_not_trained_along_is_not_praised(run):
    said = preview(run("alone", "objective.ar_weight=0"), license="mit")
    assert "an AR mode that was not trained along" in said and "speculative" not in said


def test_the_measured_rates_are_those_of_generate(card, trained):
    checkpoint, prompt = load_checkpoint(str(trained)), prompt_of(trained)
    samples = measure(checkpoint, prompt)
    assert [sample.settings for sample in samples] == SHOWN
    for sample in samples:
        found = complete(checkpoint, prompt, max_new_tokens=TOKENS, **sample.settings)
        assert (sample.text, sample.tokens) == (found.text, found.new_tokens)
        row = f"| {sample.tokens} | {sample.forwards} | {found.tokens_per_forward:.2f} |"
        assert row in card
    assert samples[0].text == complete(checkpoint, prompt, max_new_tokens=TOKENS).text
    assert '| `mode="speculative", draft_length=7` |' in card and '| `mode="diffusion"` |' in card
    assert "The folder's own settings for that are `threshold=0.9`." in card


def test_settings_of_the_folder_do_not_make_the_sample_random(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "hot"))
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) | {
        "temperature": 2.0,
        "steps_per_block": 2,
        "do_sample": True,
    }
    file.write_text(json.dumps(settings))
    checkpoint = load_checkpoint(str(folder))
    samples = measure(checkpoint, PROMPT)
    assert samples == measure(checkpoint, PROMPT)
    assert [sample.settings for sample in samples] == SHOWN
    assert "for that are `threshold=0.9, steps_per_block=2`." in preview(folder, license="mit")


def test_a_folder_without_an_ar_mode_shows_its_defaults(convert_tiny):
    folder = convert_tiny("convert.attention=block_causal")
    assert "| the defaults: `threshold=0.99` |" in preview(folder, license="mit")


def test_a_noise_in_the_free_form_is_named_and_has_steps(convert_tiny):
    said = preview(convert_tiny("noise.kind=uniform", "noise.form=free"), license="mit")
    assert "| noise | an open slot shows any token, all as likely (uniform, free): no slot" in said
    assert "| the defaults: `steps_per_block=8` |" in said and "| `steps_per_block=2` |" in said
    assert "with seed 0" in said and "threshold=" not in said and "lower threshold" not in said
    assert "the text is that of the AR mode, not of the diffusion mode" in said
    said = preview(convert_tiny("noise.kind=mask_uniform"), license="mit")
    assert "such as `steps_per_block`, or has gaps" in said and "with seed 0" not in said


def test_the_likelihood_is_the_records(card, trained):
    found = json.loads((trained / "ar2diff.json").read_text())["eval"]
    bound, ar = found["bound"], found["ar_nll"]
    assert f"text that was held out from training ({found['tokens']} tokens)" in card
    assert f"{bound['nats_per_token']:.3f} ± {bound['standard_error']:.3f} |" in card
    assert (
        f"| NLL of the AR mode | {ar['nats_per_token']:.3f} | {ar['bits_per_byte']:.3f} |" in card
    )


def test_the_code_is_named_by_its_hash(card, trained):
    assert read_custom_generate(trained).sha256 in card


def test_every_table_has_as_many_cells_in_each_row(card):
    for table in re.findall(r"(?:^\|.*\|\n)+", card, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_the_recipe_is_what_is_not_by_default(card):
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["train"] == {"max_steps": 2}
    assert recipe["data"]["sources"][0]["path"] == "secret.jsonl"
    assert changes(load_recipe(None).model_dump(mode="json")) == {}


def test_no_path_of_this_machine_is_in_a_card(card, trained, tiny_checkpoint):
    for path in (trained.parent, tiny_checkpoint.parent, Path.home()):
        assert str(path) not in card


def test_a_merged_model_says_so(trained, run, tmp_path):
    lora = run("lora", "peft.r=2", "peft.alpha=4", model=trained)
    merge(str(lora), tmp_path / "merged")
    said = preview(tmp_path / "merged", license="mit")
    assert "The adapter `lora` was merged into it." in said and "in 2 steps" in said
    assert str(lora.parent) not in said


def test_the_command_prints_it(trained, card, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ar2diff", "card", str(trained), "--license", "mit"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0 and capsys.readouterr().out == card


# Where a model comes from


@pytest.mark.parametrize(
    "key,value,published",
    [
        ("base_model", "/home/ana/models/qwen", "qwen"),
        ("base_model", "~/qwen", "qwen"),
        ("base_model", "../qwen", "qwen"),
        ("base_model", "C:/models/qwen", "qwen"),
        ("base_model", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("path", "data/customers.jsonl", "customers.jsonl"),
        ("path", "here/rows", "rows"),
        ("path", "roneneldan/TinyStories", "roneneldan/TinyStories"),
        ("name", "/home/ana/judge.py:judge", "judge.py:judge"),
        ("name", "here/judge.py:judge", "judge.py:judge"),
        ("pattern", r"<a>(.*)</a>", r"<a>(.*)</a>"),
        ("chat_template", "here/rows", "rows"),
        ("description", "x" * 5000 + "/y", "x" * 5000 + "/y"),
        ("max_steps", 3, 3),
    ],
)
def test_a_record_is_published_without_paths(tmp_path, monkeypatch, key, value, published):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "rows").mkdir(parents=True)
    (tmp_path / "here" / "judge.py").touch()
    record = {"run": [{key: value}]}
    cleaned = without_paths(record, Origin(None))["run"][0][key]
    assert cleaned == published


def test_a_licence_and_a_base_are_looked_for_upstream(tmp_path, monkeypatch):
    """runs/b on runs/a on a folder whose card has a licence; and a circle ends."""
    monkeypatch.chdir(tmp_path)
    bases = {"b": "runs/a", "a": str(tmp_path / "ar"), "c": "runs/d", "d": "runs/c"}
    for name, base in bases.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        record = {"base_model": base, "base_commit": None}
        (folder / "ar2diff.json").write_text(json.dumps(record))
    (tmp_path / "ar").mkdir()
    (tmp_path / "ar" / "README.md").write_text("---\nlicense: gemma\n---\n")
    found = origin_of(tmp_path / "runs" / "b")
    assert (found.name, found.licence) == (None, {"license": "gemma"})
    circle = origin_of(tmp_path / "runs" / "c")
    assert circle.licence == {} and "does not say" in circle.unknown
