"""Whether answers held to a JSON schema are finished and validate, on schemas that others wrote and
on drawn ones, and three models in mode diffusion.

    pip download --no-deps -d PACKAGES check-jsonschema==0.39.0
    pip download --no-deps -d PACKAGES --no-binary :all: jsonschema==4.26.0
    python benchmarks/schemas.py PACKAGES            (20 minutes of one core)
    python benchmarks/schemas.py --table             (prints the results as tables)

The first package has the schemas of well-known configuration files, the second the official test
suite with instances that are valid and such that are not. Models: the embedded default and
stories3M-hf, converted without training, and random weights with a byte-level vocabulary and `full`
attention. Each schema is either refused by name or, where its shortest text fits the context, two
prompts are answered greedily and two at temperature 1, with a threshold and with a fixed number of
steps in turn, and room for the shortest text and 0, 8 or 32 tokens more. What comes out is
validated by `jsonschema`, with formats. One token less has to be refused, and what a time limit
cuts must not be called finished. `AR2DIFF_DATA` names the folder with `stories3M-hf`.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import jsonschema
import torch
import transformers

from ar2diff.api.model import DiffusionModel
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.generate import canvas_of
from ar2diff.core.options import Options
from ar2diff.core.pattern import constraint_of, pattern_of
from ar2diff.demo.__main__ import MODEL, adapt_without_training
from ar2diff.demo.corpus import PRETRAIN_LEVELS, corpus, text
from ar2diff.generation.complete import settings_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from drawn_schemas import accepts, byte_automaton, generated

RESULTS = Path(__file__).parent / "results" / "schemas.jsonl"
PROMPTS = ("The answer as JSON: ", "Once upon a time")
MORE = (0, 8, 32)  # tokens of room beside those of the shortest text
RULES = ({"threshold": 0.5}, {"steps_per_block": 2})
DRAFTS = {  # the dialects of the suite's folders whose schemas do not name theirs
    f"draft{n}": f"http://json-schema.org/draft-0{n}/schema#" for n in (3, 4, 6, 7)
}
SUITE, WRITTEN = "jsonschema suite", ("accepted", "not written")
Case = tuple[str, dict[str, Any], list[dict[str, Any]]]  # name, schema, instances


def real(package: Path) -> Iterator[Case]:
    """The schemas in a wheel of check-jsonschema."""
    with zipfile.ZipFile(package) as files:
        for name in files.namelist():
            if "/vendor/" in name and name.endswith(".json"):
                yield Path(name).stem, json.loads(files.read(name)), []


def suite(package: Path) -> Iterator[Case]:
    """The cases of the official suite in an sdist of jsonschema. A format or a pattern alone speaks
    of texts only, so those come for texts as well."""
    with tarfile.open(package) as files:
        for member in files:
            found = re.search(r"/json/tests/((\w[\w-]*).*)\.json$", member.name)
            for n, case in enumerate(json.load(files.extractfile(member)) if found else ()):
                schema = case["schema"]
                if not isinstance(schema, dict):
                    continue
                if found[2] in DRAFTS:
                    schema = {"$schema": DRAFTS[found[2]], **schema}
                yield f"{found[1]} {n}", schema, case["tests"]
                if schema.keys() & {"format", "pattern"} and "type" not in schema:
                    yield f"{found[1]} {n}", {**schema, "type": "string"}, case["tests"]


def drawn(count: int) -> Iterator[Case]:
    """Generated schemas."""
    draw = random.Random(17)
    for number in range(count):
        yield str(number), generated(draw), []


def models() -> dict[str, DiffusionModel]:
    """The models, by name; the weights of the last are random."""
    root = Path(os.environ.get("AR2DIFF_DATA", "../shared/data"))
    with tempfile.TemporaryDirectory() as folder:
        _random_model(Path(folder))
        places = {
            "demo": (MODEL, "demo"),
            "stories3M": (root / "stories3M-hf", "stories260k"),
            "random": (folder, "diffugpt"),
        }
        return {name: _converted(str(path), recipe) for name, (path, recipe) in places.items()}


def _converted(path: str, recipe: str) -> DiffusionModel:
    found = load_recipe(recipe, ["data.max_length=128"])
    return DiffusionModel(adapt_without_training(load_checkpoint(path), found))


def _random_model(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    learner = ByteLevelBPETokenizer()
    texts = [text(example) for example in corpus(200, 0, PRETRAIN_LEVELS)]
    learner.train_from_iterator(texts, 512, special_tokens=["<s>", "</s>"], show_progress=False)
    learner.save(str(folder / "tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(17)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def valid(schema: dict[str, Any], text: str) -> bool:
    """Whether a text is JSON of a schema, its formats included."""
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        return kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(json.loads(text))
    except ValueError:
        return False


def answers(name: str, model: DiffusionModel, number: int, schema: dict[str, Any]) -> dict:
    """What a model makes of a schema that is carried: counts, and the first violation.

    Args:
        number: of the schema, which decides the room and the rules.
    """
    prompt = max(len(model.tokenizer(own).input_ids) for own in PROMPTS)
    limit = model.model.config.max_position_embeddings - prompt
    held = {"json_schema": schema, "mode": "diffusion", "seed": number, "max_new_tokens": limit}
    options = settings_of(model.checkpoint, held)[1]
    canvas = canvas_of(model.model, model.spec, [[0] * prompt], options)
    try:
        own = constraint_of(model.model, model.tokenizer, options, canvas).automaton
    except Ar2DiffError as error:
        if "the shortest text" not in error.what:
            return {"not made": 1, "says": error.what}
        return {"too long": 1, "says": error.what}
    least = own.shortest(own.starts[0])
    room = min(max(least, 1) + MORE[number % len(MORE)], limit)
    held["max_new_tokens"] = room
    found: dict[str, Any] = collections.Counter(least=least, room=room)
    for n, temperature in enumerate((None, 1.0)):
        rule = RULES[(number + n) % len(RULES)]
        for result in model.generate([*PROMPTS], temperature=temperature, **rule, **held):
            _judge(found, schema, result)
    cut = model.generate(PROMPTS[0], max_time=0, **held)
    found["cut"] += not valid(schema, cut.text)
    found["cut, called finished"] += bool(cut.matches) and not valid(schema, cut.text)
    if least > 1:
        found["one token less, not refused"] += not _refuses(model, held, least - 1)
    return dict(found)


def _judge(found: dict[str, Any], schema: dict[str, Any], result: Any) -> None:
    found["texts"] += 1
    found["forwards"] += result.forwards
    if not (result.matches and valid(schema, result.text)):
        found["violations"] += 1
        found.setdefault("says", f"{result.text[:200]} is no instance of {str(schema)[:300]}")


def _refuses(model: DiffusionModel, held: dict[str, Any], room: int) -> bool:
    try:
        model.generate(PROMPTS[0], **held | {"max_new_tokens": room})
    except Ar2DiffError as error:
        return "the shortest text that matches" in error.what
    return False


def instances(pattern: str, tests: list[dict[str, Any]]) -> collections.Counter:
    """Of the suite's instances, which the expression of a schema accepts, by their validity."""
    own = byte_automaton(pattern)
    found: collections.Counter = collections.Counter()
    for test in tests:
        texts = [
            json.dumps(test["data"], ensure_ascii=escapes, separators=separators)
            for escapes in (False, True)
            for separators in ((",", ":"), (", ", ": "))
        ]
        kind = "valid" if test["valid"] else "invalid"
        written = any(accepts(own, text) for text in texts)
        found[f"{kind} instances {WRITTEN[not written]}"] += 1
    return found


def judge(source: str, cases: Iterator[Case], every: dict[str, DiffusionModel]) -> list[dict]:
    """Rows of a source: how many of its schemas are refused and why, and what each model does."""
    begin = time.process_time()
    reasons: collections.Counter = collections.Counter()
    about: dict[str, Any] = collections.Counter()
    counts: dict[str, dict[str, Any]] = {name: collections.Counter() for name in every}
    rows, seen = [], set()
    for name, schema, tests in cases:
        about["schemas"] += 1
        try:
            pattern = pattern_of(Options(json_schema=json.dumps(schema)))
        except Ar2DiffError as error:
            about["refused"] += 1
            reason = _reason(error.what)
            reasons[reason] += 1
            if not tests:
                rows.append({"schema": name, "refused": reason})
            continue
        about["carried"] += 1
        about.update(instances(pattern, tests) if tests else {})
        if pattern in seen and tests:
            continue
        seen.add(pattern)
        about["decoded"] += 1
        for model, own in every.items():
            made = answers(model, own, len(seen), schema)
            _add(counts[model], made)
            if source == "check-jsonschema":
                rows.append({"schema": name, "model": model, **made})
            if made.get("violations") or made.get("says"):
                print(source, name, model, made, flush=True)
    seconds = round(time.process_time() - begin)
    total = {"source": source, **about, "reasons": dict(reasons.most_common(12))}
    return [total | {"cpu_seconds": seconds}, *_models(source, counts), *rows]


def _reason(what: str) -> str:
    """The keyword or the like that a refusal names."""
    found = re.search(r"has, at .*?, (.*), which is not carried", what)
    return re.sub(r"(the reference|pattern|format) .*", r"\1", found[1] if found else what)[:80]


def _add(counts: dict[str, Any], made: dict[str, Any]) -> None:
    counts["schemas"] += 1
    for key, value in made.items():
        if key not in ("least", "room", "says"):
            counts[key] += value


def _models(source: str, counts: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for model, own in counts.items():
        if own:
            yield {"source": source, "model": model, "violations": 0, **own}


def table() -> None:
    """Print the committed rows."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    kinds = [f"{kind} instances {what}" for kind in ("valid", "invalid") for what in WRITTEN]
    print(f"| schemas of | in all | refused by name | carried | {' | '.join(kinds)} |")
    print(f"|---|---|---|---|{'---|' * len(kinds)}")
    for row in (row for row in rows if "reasons" in row):
        counts = [row.get(name, 0) for name in ("schemas", "refused", "carried")]
        counts += [row.get(kind, 0) for kind in kinds] if row["source"] == SUITE else [""] * 4
        print(f"| {row['source']} | {' | '.join(map(str, counts))} |")
    names = {
        "schemas": "schemas", "not made": "too large", "too long": "too long",
        "texts": "texts", "violations": "not finished or not valid",
        "cut": "cut by a time limit", "cut, called finished": "of them called finished",
        "one token less, not refused": "too little room, not refused",
    }  # fmt: skip
    print(f"\n| of | model | {' | '.join(names.values())} |\n|---|---|{'---|' * len(names)}")
    for row in (row for row in rows if "model" in row and "source" in row):
        counts = " | ".join(f"{row.get(name, 0):,}" for name in names)
        print(f"| {row['source']} | {row['model']} | {counts} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, nargs="?", help="folder with the two packages")
    parser.add_argument("--count", type=int, default=500, help="generated schemas")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        return table()
    torch.set_num_threads(1)
    every = models()
    sources: dict[str, Callable[[], Iterator[Case]]] = {"drawn": lambda: drawn(given.count)}
    if given.packages:
        (wheel,) = given.packages.glob("check_jsonschema-*.whl")
        (sdist,) = given.packages.glob("jsonschema-*.tar.gz")
        sources = {
            "check-jsonschema": lambda: real(wheel), SUITE: lambda: suite(sdist),
        } | sources  # fmt: skip
    rows = [row for name, cases in sources.items() for row in judge(name, cases(), every)]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table()


if __name__ == "__main__":
    main()
