"""Command lines as people mistype them, and what each is told to type instead."""

from __future__ import annotations

import shlex

import pytest
import typer
from ar2diff.cli import habits
from ar2diff.cli.correction import parse
from ar2diff.cli.main import app

from ar2diff.config.recipe import Recipe
from ar2diff.config.schema import field_names
from ar2diff.config.synonyms import SYNONYMS, key_meant

LEARNING = "train.learning_rate=1e-3"
# What is typed; and what is to be typed instead, or what is said of it.
RETYPED = [
    ("finetune m", "sft m"),
    ("grpo m --data a", "rl m --data a"),
    ("env", "doctor"),
    ("list", "recipes ls"),
    ("recipes list", "recipes ls"),
    ("recipes validate my.yaml", "config validate my.yaml"),
    ("version", "--version"),
    ("-V", "--version"),
    ("help adapt", "adapt --help"),
    ("genrate m --prompt a", "generate m --prompt a"),
    ("upload runs/x", "push runs/x REPO"),
    ("push runs/x", "push runs/x REPO"),
    ("push", "push DIR REPO"),
    ("adapt", "adapt MODEL"),
    ("my.yaml", "adapt MODEL --recipe my.yaml"),
    ("adapt m --learning-rate 1e-3", f"adapt m {LEARNING}"),
    ("adapt --lr=1e-3 m", f"adapt m {LEARNING}"),
    ("adapt m --learning_rat 1e-3 -- --nnodes 2", f"adapt m {LEARNING} -- --nnodes 2"),
    ("adapt m --train.learning_rate 1e-3", f"adapt m {LEARNING}"),
    ("rl m --block_size 8", "rl m convert.block_length=8"),
    ("draft m --block-length 8", "draft m draft.block_length=8"),
    ("adapt m --batch-size 8", "adapt m train.per_device_train_batch_size=8"),
    ("adapt m --bf16", "adapt m train.precision=bf16"),
    ("sft m --gradient_checkpointing --data a",
     "sft m --data a train.gradient_checkpointing=true"),
    ("sft m --use_peft True", "sft m peft.method=lora"),
    ("adapt m --output out", "adapt m --output-dir out"),
    ("adapt m -o out", "adapt m --output-dir out"),
    ("generate m --prompt a -o x.jsonl", "generate m --prompt a --output x.jsonl"),
    ("adapt --data a --model m", "adapt m --data a"),
    ("adapt m --dataset a.jsonl", "adapt m --data a.jsonl"),
    ("adapt m --data", "adapt m --data FILE"),
    ("adapt m --resume=true", "adapt m --resume"),
    ("adapt m --resume_from_checkpoint runs/x", "adapt m --resume"),
    ("adapt m --deepspeed zero2", "adapt m --launch zero2"),
    ("merge --adapter a --output_dir b", "merge a b"),
    ("generate m Tom has 3 apples", "generate m --prompt 'Tom has 3 apples'"),
    ("generate m top_k=3 --prompt a", "generate m --prompt a --top-k 3"),
    ("generate m --prompt a --max_tokens 5", "generate m --prompt a --max-new-tokens 5"),
    ("generate m --prompt a --temprature 1", "generate m --prompt a --temperature 1"),
    ("chat m hello", "generate m --prompt hello"),
    ("doctor now", "doctor"),
    # All mistakes of a line at once.
    (
        "adapt --model_name_or_path m --dataset_name a --lr 1e-3 --lora_r 8 --output_dir o",
        f"adapt m --data a --output-dir o {LEARNING} peft.r=8",
    ),
]  # fmt: skip
TOLD = [
    ("train m", "use 'ar2diff adapt' to convert a model, 'ar2diff sft' to tune it"),
    ("translate", "use one of adapt, sft, rl"),
    ("Qwen/Qwen3-0.6B", "put a verb before it"),
    ("--model m adapt", "put the verb first"),
    ("adapt m --epochs 3", "give the length of the run as --max-steps"),
    ("adapt m --trust_remote_code", "leave it out; ar2diff never runs code"),
    ("adapt m --frobnicate", "'ar2diff adapt --help' lists its options"),
    ("adapt m --max-steps many", "--max-steps takes a whole number, not 'many'"),
    ("eval m", "or --tasks to run benchmarks"),
    ("check m --tasks gsm8k", "run benchmarks with 'ar2diff eval MODEL --tasks TASK'"),
    ("eval m --lr 1", "'ar2diff eval --help' lists its options"),
    ("adapt my.yaml --data a", "give the model as the first argument, and then --recipe my.yaml"),
    ("adapt demo --data a", "demo is a recipe, not a model"),
    (f"adapt {LEARNING}", "the first argument must be the model"),
    ("adapt m my.yaml", "give a recipe as --recipe my.yaml"),
    ("adapt m train.learning_rate 1e-3", f"write {LEARNING}, without spaces"),
    ("adapt m train.learning_rate = 1e-3", f"write {LEARNING}, without spaces"),
    ("adapt m train.learning_rate= 1e-3", f"write {LEARNING}, without spaces"),
    ("adapt m train.lr=1e-3", "write train.learning_rate instead"),
    ("adapt m lr=1e-3", "write train.learning_rate instead"),
    ("adapt m train.learning_rat=1", "write train.learning_rate instead"),
    ("adapt m", "give --data FILE"),
    ("generate 'a prompt'", "give a model before it, and the text as --prompt 'a prompt'"),
]


@pytest.fixture
def fails(run_both):
    """Run a line, which must exit with 2 and say two lines: the words after `fix:`, and both."""

    def run(line: str) -> tuple[str, str]:
        code, out, said = run_both(*shlex.split(line))
        what, fix = said.splitlines()
        assert (code, out) == (2, "")
        assert what.startswith("error: ") and fix.startswith("  fix: ")
        return fix.removeprefix("  fix: "), said

    return run


@pytest.mark.parametrize("line, instead", RETYPED, ids=lambda line: line[:50])
def test_a_wrong_line_is_answered_with_the_line_to_type(fails, line, instead):
    assert fails(line)[0] == f"type this instead: ar2diff {instead}"
    parse(typer.main.get_command(app), shlex.split(instead.replace(" --help", " m")))


@pytest.mark.parametrize("line, said", TOLD, ids=lambda line: line[:50])
def test_a_wrong_line_without_a_single_right_one_is_answered_with_advice(fails, line, said):
    assert said in fails(line)[1]


def test_what_the_words_of_other_tools_stand_for_exists():
    group = typer.main.get_command(app)
    groups = [group, *(c for c in group.commands.values() if hasattr(c, "commands"))]
    verbs = {name for each in groups for name in each.commands}
    names = {p.name for each in groups for c in each.commands.values() for p in c.params}
    meant = {word for verb in habits.VERBS.values() for text in verb for word in text.split()}
    assert {word for word in meant if not word.startswith("--")} <= verbs
    assert {name for known in habits.OPTIONS.values() for name in known} <= {*names, "version"}
    assert {key.partition("=")[0] for key in SYNONYMS.values()} <= {*field_names(Recipe)}


@pytest.mark.parametrize(
    "word, section, key",
    [
        ("max_length", "", "data.max_length"),
        ("samples", "eval", "eval.samples"),
        ("samples", "rl", "rl.samples"),
        ("learning_rates", "", "train.learning_rate"),
        ("something", "", None),
    ],
)
def test_a_key_is_known_by_its_last_part_even_misspelt(word, section, key):
    assert key_meant(word, field_names(Recipe), section) == key
