"""The folder: it denoises where ar2diff is not installed, and ar2diff runs nobody's code."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from inspect import Parameter, signature
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ar2diff.checkpoint.custom_generate import (
    CORE,
    CustomGenerate,
    read_custom_generate,
    write_custom_generate,
)
from ar2diff.checkpoint.files import find_checkpoint
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.generate import generate
from ar2diff.evaluation.check import CODELESS, TRUSTED, TRUSTING, check
from ar2diff.training.adapt import adapt
from benchmarks import elsewhere

MODULES = sorted(file.stem for file in CORE.glob("*.py") if file.stem != "__init__")
# Any process that starts with this on its path, and its children, cannot import ar2diff.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ar2diff":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""
FAST = [function.__name__ for function, packages in elsewhere.CHECKS if packages in ((), ("peft",))]
SLOW = [(f.__name__, packages) for f, packages in elsewhere.CHECKS if f.__name__ not in FAST]


def convert(base: Path, folder: Path, *overrides: str, **options) -> Path:
    recipe = load_recipe(None, ["train.max_steps=0", "data.max_length=64", *overrides])
    adapt(str(base), recipe, folder, **options)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """A converted folder. Never write to it."""
    return convert(tiny_checkpoint, tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    """A converted folder to write to."""
    return convert(tiny_checkpoint, tmp_path / "copied")


def imports(module: str) -> tuple[set[str], set[str]]:
    """Neighbours that a module imports, and the packages."""
    neighbours, packages = set(), set()
    for node in ast.walk(ast.parse((CORE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, "transformers follows 'from .name import'"
            neighbours.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
    return neighbours, packages


def test_the_modules_are_those_that_generate_imports():
    found, left = set(), {"generate"}
    while left:
        module = left.pop()
        found.add(module)
        left |= imports(module)[0] - found
    assert sorted(found) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_torch_transformers_and_the_standard_library(module):
    allowed = {"torch", "transformers", "numpy", "safetensors"}  # which transformers needs itself
    assert imports(module)[1] <= allowed | sys.stdlib_module_names


def test_the_folder_holds_byte_copies_and_a_requirement(folder):
    code = folder / "custom_generate"
    assert {f.name for f in code.iterdir()} == {f"{m}.py" for m in MODULES} | {"requirements.txt"}
    for module in MODULES:
        assert (code / f"{module}.py").read_bytes() == (CORE / f"{module}.py").read_bytes()
    assert (code / "requirements.txt").read_text() == "transformers>=5.2\n"


def test_a_run_that_trains_ends_with_it_too(tiny_checkpoint, tmp_path, write_jsonl):
    data = write_jsonl("a.jsonl", [{"text": "the cat sat on the mat"}] * 8)
    recipe = load_recipe(
        None, ["train.max_steps=1", "data.max_length=32", f"data.sources=[{data}]"]
    )
    adapt(str(tiny_checkpoint), recipe, tmp_path / "out")
    assert read_custom_generate(tmp_path / "out").state == "ok"


def test_overwriting_and_continuing_put_this_versions_code(copied, tiny_checkpoint, tmp_path):
    (copied / "custom_generate" / "canvas.py").write_text("")
    assert read_custom_generate(convert(copied, tmp_path / "on")).state == "ok"
    convert(tiny_checkpoint, copied, overwrite=True)
    assert read_custom_generate(copied).state == "ok"


def test_nothing_of_it_stays_where_a_save_fails(tiny_checkpoint, tmp_path, monkeypatch):
    def broken(folder):
        write_custom_generate(folder)
        raise OSError("no more")

    monkeypatch.setattr("ar2diff.checkpoint.io.write_custom_generate", broken)
    with pytest.raises(Ar2DiffError, match="no more"):
        convert(tiny_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_check_says_whether_the_code_is_this_versions(copied):
    code = copied / "custom_generate"
    names = sorted(f.name for f in code.iterdir())
    joined = hashlib.sha256(b"".join((code / name).read_bytes() for name in names)).hexdigest()
    said = check(str(copied))
    assert said.ok and said.custom_generate == CustomGenerate("ok", joined)
    assert any(joined in finding.what for finding in said.findings)
    assert said.elsewhere[TRUSTED] == TRUSTING
    with (code / "seeds.py").open("a") as file:
        file.write("# changed\n")
    said = check(str(copied))
    assert not said.ok and said.custom_generate.state == "differs"
    assert said.custom_generate.sha256 != joined
    (code / "generate.py").unlink()
    said = check(str(copied))
    assert not said.ok and said.custom_generate == CustomGenerate("missing", None)
    assert said.elsewhere[TRUSTED] == CODELESS


def test_a_repositorys_code_is_never_run(copied, tmp_path):
    ran = tmp_path / "ran"
    evil = f"from pathlib import Path\nPath({str(ran)!r}).touch()\ndef generate(**k): pass\n"
    (copied / "custom_generate" / "generate.py").write_text(evil)
    load_checkpoint(str(copied))
    check(str(copied))
    convert(copied, tmp_path / "on")
    assert not ran.exists()
    AutoModelForCausalLM.from_pretrained(copied, trust_remote_code=True)
    assert ran.exists()


@pytest.mark.parametrize("code", [False, True])
def test_a_hub_id_is_asked_for_its_code_by_check_alone(monkeypatch, tmp_path, code):
    files = ["config.json", "model.safetensors", "custom_generate/generate.py"]
    files += ["custom_generate/requirements.txt"]
    asked = []

    def download(name, revision, allow_patterns, ignore_patterns):
        kept = filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked.extend(kept)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    find_checkpoint("someone/stories", code=code)
    assert asked == (files if code else files[:2])


def test_ids_without_a_token_are_suppressed(tiny_model, tiny_tokenizer, tmp_path):
    base = tmp_path / "padded"
    model = tiny_model("llama", dtype=torch.float32, vocab_size=272, pad_token_id=None)
    model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    folder = convert(base, tmp_path / "out")
    tokens = len(AutoTokenizer.from_pretrained(folder))
    assert tokens == 260
    suppressed = GenerationConfig.from_pretrained(folder).suppress_tokens
    assert suppressed == [259, *range(tokens, 272)]


def test_the_generation_config_holds_the_samplers_defaults_and_no_length(folder, copied, tmp_path):
    written = json.loads((folder / "generation_config.json").read_text())
    assert (written["mode"], written["threshold"]) == ("speculative", 0.9)
    assert not {"max_new_tokens", "max_length", "block_length"} & written.keys()
    path = copied / "generation_config.json"
    own = {"threshold": None, "steps_per_block": 4, "mode": "ar"}
    path.write_text(json.dumps(written | own))
    kept = json.loads((convert(copied, tmp_path / "on") / "generation_config.json").read_text())
    assert {name: kept.get(name) for name in own} == own


@pytest.mark.parametrize("attention", ["block_causal", "full"])
def test_without_an_ar_mode_the_default_is_the_safe_diffusion(convert_tiny, attention):
    block = ["convert.block_length=null"] * (attention == "full")
    folder = convert_tiny(f"convert.attention={attention}", *block)
    written = json.loads((folder / "generation_config.json").read_text())
    assert (written["mode"], written["threshold"]) == ("diffusion", 0.99)


def test_a_criterion_with_a_flag_for_each_row_is_asked_about_its_own(folder):
    class Flags:
        """As lm-eval's: it reads new tokens behind the padded prompt, and all rows must be done."""

        def __init__(self, stops, width):
            self.stops, self.width, self.done = stops, width, [False] * len(stops)

        def __call__(self, ids, scores):
            new = ids[:, self.width :]
            for row, done in enumerate(self.done):
                self.done[row] = done or bool((new[row, -1:] == self.stop).any())
            return False not in self.done

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[0, 0, 1, 40, 41], [1, 50, 51, 52, 53]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "model": model, "max_new_tokens": 16, "mode": "diffusion"}
    plain = generate(ids, **options)[:, 5:]
    flags = Flags([None, None], 5)
    flags.stop = int(plain[0, 3])
    stopped = generate(ids, **options, stopping_criteria=[flags])[:, 5:]
    for row, new in zip(plain.tolist(), stopped.tolist(), strict=True):
        length = row.index(flags.stop) + 1 if flags.stop in row else 16
        assert new[:length] == row[:length]
        assert not any(new[length:])
    assert flags.done == [False, False]


def test_a_model_is_probed_once(folder, monkeypatch):
    import ar2diff.core.generate as module

    probed = []
    monkeypatch.setattr(module, "probe", lambda model, spec: probed.append(model) or [])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for _ in range(3):
        generate(torch.tensor([[1, 40]]), model=model, max_new_tokens=2)
    assert probed == [model]


def test_a_class_that_stays_causal_is_refused_not_decoded(folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = type(model).forward

    def deaf(self, *args, attention_mask=None, **kwargs):
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", deaf)
    with pytest.raises(Ar2DiffError, match="does not do what its spec says"):
        generate(torch.tensor([[1, 40]]), model=model, max_new_tokens=2)


def test_the_model_comes_by_keyword_so_that_ids_may_come_by_position():
    parameters = signature(generate).parameters
    assert parameters["model"].kind is Parameter.KEYWORD_ONLY
    assert next(iter(parameters)) == "inputs"


OF_EACH_ATTENTION = ["ar2diff_is_not_here", "generate_a_ragged_batch", "text_generation_pipeline"]
FAST_OF = {"causal_context": FAST, "block_causal": OF_EACH_ATTENTION, "full": OF_EACH_ATTENTION}
MANY = """
import os, sys
from pathlib import Path
place, home, *asked = sys.argv[1:]
os.environ.update(HF_HOME=home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
sys.path.append(place)
import elsewhere
for one in asked:
    folder, *names = one.split()
    elsewhere.check(Path(folder), names)
"""


@pytest.fixture(scope="session")
def blocked(tmp_path_factory):
    """Runs checks of benchmarks/elsewhere.py in one process where `import ar2diff` fails:
    {attention: names} -> {(attention, name): its line}."""
    home = tmp_path_factory.mktemp("elsewhere")
    (home / "sitecustomize.py").write_text(BLOCKER)

    def run(asked: dict[str, list[str]]) -> dict[tuple[str, str], str]:
        for attention in asked:
            if not (home / attention).exists():
                elsewhere.make(home / attention, attention)
        told = [f"{home / attention} {' '.join(names)}" for attention, names in asked.items()]
        done = subprocess.run(
            [sys.executable, "-c", MANY, Path(elsewhere.__file__).parent, home / "hub", *told],
            env=os.environ | {"PYTHONPATH": str(home)},
            capture_output=True,
            text=True,
            cwd=home,
        )
        lines = [line for line in done.stdout.splitlines() if " s  " in line]
        checks = [(attention, name) for attention, names in asked.items() for name in names]
        assert len(lines) == len(checks), done.stdout + done.stderr
        return {check: line + done.stderr for check, line in zip(checks, lines, strict=True)}

    return run


@pytest.fixture(scope="session")
def fast(blocked):
    return blocked(FAST_OF)


@pytest.mark.parametrize("attention, name", [(a, n) for a, names in FAST_OF.items() for n in names])
def test_elsewhere(fast, attention, name):
    line = fast[attention, name]
    assert line.startswith("ok ") and name.replace("_", " ") in line, line


@pytest.mark.slow
@pytest.mark.parametrize("name,packages", SLOW)
def test_elsewhere_with_more_packages(blocked, name, packages):
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}; 'make elsewhere' installs them in its own place")
    line = blocked({"causal_context": [name]})["causal_context", name]
    assert line.startswith("ok "), line
