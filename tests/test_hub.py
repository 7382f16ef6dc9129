"""Publishing by huggingface_hub's own HTTP calls, to a stand-in for the Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_client import Client, hub_environment
from hub_server import Hub
from kills import moments
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_custom_generate import BLOCKER

import ar2diff
from ar2diff.checkpoint.custom_generate import FOLDER, custom_generate
from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.hub.card import TOKENS
from ar2diff.hub.push import check_folder
from ar2diff.training.adapt import adapt

TOKEN, READER, ROBS = "hf_AnasOwnSecret", "hf_MayReadAlone", "hf_RobsSecret"
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.add_user("ana", TOKEN, orgs=("lab",))
        hub.add_user("reader", READER, role="read")
        hub.add_user("rob", ROBS)
        hub.add_repo("rob/data", kind="dataset")
        hub.add_repo("ana/data", kind="dataset")
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with Client(tmp_path_factory.mktemp("home"), hub.url, TOKEN) as client:
        yield client


@pytest.fixture(scope="module")
def base(tiny_checkpoint, tmp_path_factory):
    """An AR checkpoint whose card says under which licence it is."""
    folder = tmp_path_factory.mktemp("somewhere") / "tiny-llama"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Factory: train(base, "x", "train.seed=1") is a folder after two steps. Never write to it."""
    place = tmp_path_factory.mktemp("runs")
    data = place / "stories.jsonl"
    rows = [{"text": f"the cat number {n} sat on the mat and saw a dog"} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(model, name, *overrides, steps=2):
        settings = [f"data.sources=[{data}]", f"train.max_steps={steps}", "data.max_length=32"]
        settings += ["train.learning_rate=1e-2", "convert.block_length=4", *overrides]
        adapt(str(model), load_recipe(None, settings), place / name)
        return place / name

    return make


@pytest.fixture(scope="module")
def model(base, train):
    """A model that was trained a little, with its likelihood. Never write to it."""
    return train(base, "stories", "eval.steps=2", "eval.rows=2", "eval.length=8", "eval.samples=2")


@pytest.fixture(scope="module")
def adapter(model, train):
    """A LoRA on `model`. Never write to it."""
    return train(model, "stories-lora", "peft.r=2", "peft.alpha=4")


@pytest.fixture
def sharded(model, tmp_path):
    """`model` in two files."""
    folder = tmp_path / "stories"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    with safe_open(model / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    names = [list(tensors)[0::2], list(tensors)[1::2]]
    for part, held in zip(PARTS, names, strict=True):
        save_file({n: tensors[n] for n in held}, folder / part, metadata={"format": "pt"})
    where = {n: part for part, held in zip(PARTS, names, strict=True) for n in held}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def pushes(client):
    """Push, which must succeed and say that what came down is what went up."""

    def run(*arguments, **environment):
        done = client.run("push", *arguments, **environment)
        assert done.code == 0, done.err
        assert "logits differ by 0.0e+00" in done.out and "of the example are the same" in done.out
        return done

    return run


@pytest.fixture
def fails(client):
    """Run a verb, which must print two lines and exit with 2; nothing secret in them."""

    def run(*arguments, verb="push", **environment):
        done = client.run(verb, *arguments, **environment)
        lines = [line for line in done.err.splitlines() if not line.startswith("[")]
        assert (done.code, done.out) == (2, ""), done.err
        assert len(lines) == 2, done.err
        assert lines[0].startswith("error: ") and lines[1].startswith("  fix: ")
        for secret in (TOKEN, READER, ROBS, environment.get("HF_TOKEN")):
            assert not secret or secret not in done.err
        return done.err

    return run


def held(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file() and "checkpoints" not in f.parts)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def forget(hub: Hub, sharded: Path) -> list[str]:
    """Objects of the two files, which the Hub has not got then."""
    oids = [hashlib.sha256((sharded / part).read_bytes()).hexdigest() for part in PARTS]
    for oid in oids:
        hub.objects.pop(oid, None)
    return oids


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


# What is published


@pytest.fixture(scope="module")
def published(hub, client, model):
    """The repository of `model`, pushed once."""
    done = client.run("push", model, "ana/stories")
    assert done.code == 0, done.err
    return hub.model("ana/stories")


def test_a_push_is_one_commit_of_everything_it_takes_to_run(hub, published, model):
    assert len(published.commits) == 2 and published.messages[1] == "stories, by ar2diff"
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"tokenizer_config.json", "ar2diff.json", "README.md", ".gitattributes"}
    code = custom_generate()
    assert set(published.files) == names | {f"{FOLDER}/{name}" for name in code}
    for name, content in code.items():
        assert published.files[f"{FOLDER}/{name}"] == content
    for name in names - {"README.md", "ar2diff.json", ".gitattributes"}:
        assert published.files[name] == (model / name).read_bytes()
    assert not published.private


def test_no_path_of_this_machine_and_no_token_is_published(published, base):
    record = json.loads(published.files["ar2diff.json"])
    assert record["base_model"] == "tiny-llama" and "prompts" not in record
    assert record["recipe"]["data"]["sources"][0]["path"] == "stories.jsonl"
    for path, content in published.files.items():
        for secret in (str(base.parent.parent), str(Path.home()), TOKEN):
            assert secret.encode() not in content, path


def test_the_record_holds_the_generation_that_was_compared(published, model):
    (golden,) = json.loads(published.files["ar2diff.json"])["golden"]
    assert [golden["prompt"]] == json.loads((model / "ar2diff.json").read_text())["prompts"]
    assert [sample["settings"] for sample in golden["samples"]] == [
        {"mode": "speculative", "draft_length": 3}, {"mode": "diffusion"}, {"threshold": 0.7},
    ]  # fmt: skip
    assert all(sample["tokens"] and sample["forwards"] for sample in golden["samples"])


def test_the_same_folder_again_changes_nothing(hub, published, pushes, model):
    assert "was already at" in pushes(model, "stories").out  # the token's user is its owner
    assert len(published.commits) == 2


def test_a_private_repository_is_made_private(hub, client, pushes, model):
    pushes(model, "ana/hidden", "--private")
    assert hub.model("ana/hidden").private
    assert client.run("push", model, "ana/hidden", "--private", "--dry-run").code == 0


def test_an_organisation_of_the_user_may_own_it(hub, pushes, model):
    pushes(model, "lab/stories")
    assert "model.safetensors" in hub.model("lab/stories").files


def test_a_card_in_the_folder_is_taken_as_it_is(hub, pushes, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "own")
    card = "---\nlicense: mit\n---\n# mine\n"
    (folder / "README.md").write_text(card)
    pushes(folder, "ana/own")
    assert hub.model("ana/own").files["README.md"].decode() == card


def test_what_is_not_the_models_stays_at_home(hub, pushes, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "cluttered")
    cluttered = ("checkpoints/checkpoint-2/optimizer.pt", "notes.txt", "custom_generate/mine.py")
    for name in (*cluttered, "my.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    pushes(folder, "ana/tidy")
    assert set(hub.model("ana/tidy").files) == set(hub.model("ana/stories").files)


def test_a_link_out_of_the_folder_is_not_published(hub, fails, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "linked"))
    (tmp_path / "secret.json").write_text("{}")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    said = fails(folder, "ana/linked")
    assert "'special_tokens_map.json' is a symbolic link that leads out of the" in said
    assert ("model", "ana/linked") not in hub.repos


@pytest.mark.parametrize("kind", ["bytes", "link"])
def test_a_card_that_is_no_text_of_the_folder_is_refused_first(model, tmp_path, kind):
    folder = Path(shutil.copytree(model, tmp_path / "own"))
    card = folder / "README.md"
    if kind == "bytes":
        card.write_bytes(b"# mine \xff")
    else:
        (tmp_path / "secret").write_text("mine")
        card.symlink_to(tmp_path / "secret")
    said = {"bytes": "it is not UTF-8 (byte 7)", "link": "is a symbolic link that leads out"}
    with pytest.raises(Ar2DiffError, match=re.escape(said[kind])):
        check_folder(folder)


# Over an existing repository


def test_a_push_replaces_the_model_and_keeps_what_is_not_of_it(hub, pushes, model, sharded):
    more = {"figure.png": b"png", "LICENSE": b"MIT", "eval/scores.json": b"{}"}
    repo = hub.add_repo("ana/over", held(sharded) | more | {f"{FOLDER}/old.py": b""})
    pushes(model, "ana/over")
    assert len(repo.commits) == 2
    assert not {*PARTS, "model.safetensors.index.json", f"{FOLDER}/old.py"} & set(repo.files)
    assert repo.files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert more.items() <= repo.files.items()


def test_a_repository_without_a_model_is_taken(hub, pushes, model):
    hub.add_repo("ana/made-by-hand", {"README.md": b"# soon\n"})
    pushes(model, "ana/made-by-hand")
    assert front_matter(hub.model("ana/made-by-hand").files["README.md"].decode())["license"]


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_model_that_ar2diff_did_not_write_is_not_replaced(hub, fails, model, file):
    repo = hub.add_repo("ana/foreign", {file: b"{}"})
    assert "holds a model that ar2diff did not write" in fails(model, "ana/foreign")
    assert len(repo.commits) == 1


def test_another_model_is_not_replaced(hub, published, fails, base, train, tmp_path):
    other = Path(shutil.copytree(base, tmp_path / "other-llama"))
    said = fails(train(other, "other", steps=0), "ana/stories")
    assert "holds another model: its base is tiny-llama, not other-llama" in said
    assert len(published.commits) == 2


def test_an_adapter_does_not_replace_a_model(hub, published, fails, adapter):
    said = fails(adapter, "ana/stories", "--base", "ana/stories")
    assert "its kind is a whole model, not an adapter" in said


def test_a_public_repository_is_not_pushed_to_as_private(hub, published, fails, model):
    assert "is public" in fails(model, "ana/stories", "--private")


# Interrupted


@pytest.mark.parametrize("fault", ["refuse", "drop"])
def test_a_push_that_fails_half_way_leaves_no_half_model(
    hub, client, fails, pushes, sharded, fault
):
    """One object arrives, the other breaks off; or both arrive, and the commit breaks off."""
    first, second = forget(hub, sharded)
    before = len(hub.uploaded)
    with hub.failing(fault, spared=[first]):
        said = fails(sharded, f"ana/half-{fault}")
    assert "failed" in said and "the repository is unchanged" in said
    repo = hub.model(f"ana/half-{fault}")
    assert set(repo.files) == {".gitattributes"} and len(repo.commits) == 1
    sent = [first] if fault == "refuse" else sorted([first, second])
    assert sorted(hub.uploaded[before:]) == sent

    before = len(hub.uploaded)
    pushes(sharded, f"ana/half-{fault}")  # resumed: what has arrived is not sent again
    assert hub.uploaded[before:] == [second] * (fault == "refuse")
    assert len(repo.commits) == 2 and {*PARTS} < set(repo.files)


def test_a_failed_update_leaves_the_old_model(hub, fails, published, sharded):
    repo = hub.add_repo("ana/updated", published.files)
    forget(hub, sharded)
    with hub.failing("refuse"):
        fails(sharded, "ana/updated")
    assert len(repo.commits) == 1


def test_a_connection_that_breaks_once_does_not_end_a_push(hub, pushes, sharded):
    forget(hub, sharded)
    with hub.failing("cut"):
        pushes(sharded, "ana/cut")
    assert len(hub.model("ana/cut").commits) == 2


@pytest.mark.slow
def test_a_killed_push_leaves_no_half_model(hub, pushes, sharded, tmp_path):
    first, _ = forget(hub, sharded)
    command = [sys.executable, "-m", "ar2diff.cli", "push", sharded, "ana/killed"]
    environment = hub_environment(tmp_path / "home", hub.url) | {"HF_TOKEN": TOKEN}
    with hub.failing("hang", spared=[first]):
        killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        assert hub.seen.wait(300)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    repo = hub.model("ana/killed")
    assert set(repo.files) == {".gitattributes"}
    pushes(sharded, "ana/killed")
    assert {*PARTS} < set(repo.files)


@pytest.mark.slow
def test_the_same_push_succeeds_after_each_of_twenty_kills(hub, sharded, tmp_path):
    with Client(tmp_path / "home", hub.url, TOKEN) as client:
        assert client.run("push", sharded, "ana/whole").code == 0
        whole = hub.model("ana/whole").files
        forget(hub, sharded)
        counts = client.run_in_a_child("push", sharded, "ana/counted", mark="upload")
        for number, moment in enumerate(moments(*counts)):
            forget(hub, sharded)
            name = f"ana/killed-{number}"
            client.run_in_a_child("push", sharded, name, kill=moment)
            repo = hub.repos.get(("model", name))
            assert repo is None or set(repo.files) in ({".gitattributes"}, set(whole)), moment
            done = client.run("push", sharded, name)
            assert done.code == 0, f"after a kill at call {moment}: {done.err}"
            assert set(hub.model(name).files) == set(whole)


@pytest.mark.slow
def test_a_connection_that_is_gone_ends_a_push_after_some_tries(hub, fails, sharded):
    forget(hub, sharded)
    with hub.failing("hang"):
        hub.released.set()  # it hangs up at once, each time
        assert "failed" in fails(sharded, "ana/gone")
    assert set(hub.model("ana/gone").files) == {".gitattributes"}


def test_a_repository_that_changes_meanwhile_is_not_overwritten(hub, fails, model):
    repo = hub.add_repo("ana/raced")
    with hub.failing("race"):
        assert "has changed since it was checked" in fails(model, "ana/raced")
    assert repo.messages[-1] == "somebody else's" and "model.safetensors" not in repo.files


def test_a_download_that_differs_is_seen(hub, fails, published, model):
    weights = bytearray(published.files["model.safetensors"])
    weights[-2:] = b"\x80\x40"  # the top half of a float32: 4.0
    hub.altered["model.safetensors"] = bytes(weights)
    try:
        assert "the download has different logits" in fails(model, "ana/stories")
        hub.altered = {f"{FOLDER}/samplers.py": b"x" * len(custom_generate()["samplers.py"])}
        assert "the downloaded model differs from the local one in its decoding code" in fails(
            model, "ana/stories"
        )
    finally:
        hub.altered = {}


# A dry run


def test_a_dry_run_shows_files_and_card_and_writes_nothing(hub, client, model, tmp_path):
    before = [request for request in hub.requests if not request.startswith(("GET", "HEAD"))]
    home = client.environment["HF_HOME"]
    files = {p: p.stat().st_mtime_ns for place in (model, Path(home)) for p in place.rglob("*")}
    done = client.run("push", model, "ana/unseen", "--dry-run", TMPDIR=str(tmp_path))
    assert done.code == 0, done.err
    size = (model / "model.safetensors").stat().st_size
    assert "these files would be pushed to ana/unseen" in done.out
    assert f"{size:14,}  model.safetensors" in done.out
    assert "base_model" not in done.out and 'name = "ana/unseen"' in done.out
    assert before == [r for r in hub.requests if not r.startswith(("GET", "HEAD"))]
    assert ("model", "ana/unseen") not in hub.repos
    after = {p: p.stat().st_mtime_ns for place in (model, Path(home)) for p in place.rglob("*")}
    assert files == after and not any(tmp_path.iterdir())


def test_a_dry_run_says_what_would_be_removed(hub, client, model, sharded):
    hub.add_repo("ana/dry", held(sharded))
    result = json.loads(client.run("push", model, "ana/dry", "--dry-run", "--json").out)
    assert result["dry_run"] and result["repository"] == "ana/dry"
    assert result["removed"] == [PARTS[0], PARTS[1], "model.safetensors.index.json"]
    assert result["files"]["model.safetensors"] == (model / "model.safetensors").stat().st_size
    assert set(PARTS) < set(hub.model("ana/dry").files)


def test_a_dry_run_needs_no_token_and_no_network(hub, client, unlicensed, adapter, published):
    done = client.run("push", unlicensed, "mine", "--dry-run", HF_TOKEN=None)
    assert done.code == 0, done.err
    assert "these files would be pushed to USER/mine:" in done.out
    assert (
        "note: the Hub was not asked whether USER/mine exists and what it holds: there is no "
        "token for the Hub\n" in done.out
    )
    assert "'s base is unknown" in done.out and "a push will need --license" in done.out
    with hub.away():
        done = client.run("push", adapter, "ana/x", "--base", "ana/stories", "--dry-run", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert front_matter(result["card"])["base_model"] == "ana/stories"
    assert ["cannot be reached" in note for note in result["notes"]] == [True, True]


# Adapters


@pytest.fixture(scope="module")
def published_adapter(hub, client, published, adapter):
    done = client.run("push", adapter, "ana/stories-lora", "--base", "ana/stories")
    assert done.code == 0, done.err
    return hub.model("ana/stories-lora")


def test_an_adapter_names_its_published_base(published, published_adapter, adapter):
    files = published_adapter.files
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "ana/stories"
    assert config["revision"] == published.head
    assert "model.safetensors" not in files and f"{FOLDER}/generate.py" not in files
    for name in ("adapter_model.safetensors", "diffusion.json", "tokenizer.json"):
        assert files[name] == (adapter / name).read_bytes()
    said = front_matter(files["README.md"].decode())
    assert said["base_model"] == "ana/stories" and said["base_model_relation"] == "adapter"
    assert said["license"] == "mit" and said["library_name"] == "peft"
    assert str(adapter.parent).encode() not in b"".join(files.values())


def test_an_adapter_on_a_base_of_this_machine_is_refused(fails, adapter, model):
    said = fails(adapter, "ana/lonely")
    assert f"is a folder on this machine, {model}" in said and "--base" in said


def test_an_adapter_on_another_base_is_refused_before_the_upload(hub, fails, adapter, base, train):
    wrong = held(train(base, "wrong", "train.seed=8", steps=0))
    hub.add_repo("ana/wrong", wrong | {"README.md": b"---\nlicense: mit\n---\n"})
    assert "are not the ones it was trained on" in fails(
        adapter, "ana/misled", "--base", "ana/wrong"
    )
    said = fails(adapter, "ana/misled", "--base", "ana/none")
    assert "there is no repository ana/none on the Hub" in said
    assert ("model", "ana/misled") not in hub.repos


# Draft adapters


@pytest.fixture(scope="module")
def draft(base, tmp_path_factory):
    """A draft adapter on `base`. Never write to it."""
    place = tmp_path_factory.mktemp("drafts")
    data = place / "stories.jsonl"
    data.write_text(json.dumps({"text": "the cat sat on the mat and saw a dog"}) + "\n")
    overrides = {"draft.rank": 2, "draft.head_rank": 2, "draft.block_length": 4, "eval.steps": 0,
                 "data.max_length": 32, "train.warmup_steps": 0}  # fmt: skip
    ar2diff.draft(base, None, place / "draft", data=data, max_steps=1, overrides=overrides)
    return place / "draft"


@pytest.fixture(scope="module")
def published_draft(hub, client, base, draft):
    card = b"---\nlicense: mit\n---\n"
    hub.add_repo(
        "ana/llama", {f.name: f.read_bytes() for f in base.iterdir()} | {"README.md": card}
    )
    done = client.run("push", draft, "ana/draft", "--base", "ana/llama")
    assert done.code == 0, done.err
    return hub.model("ana/draft")


def test_a_draft_adapter_names_its_published_base(hub, published_draft, draft):
    files = published_draft.files
    config = json.loads(files["draft.json"])
    assert (config["base"], config["revision"]) == ("ana/llama", hub.model("ana/llama").head)
    for name in ("draft.safetensors", "tokenizer.json", f"{FOLDER}/generate.py"):
        assert files[name] == (draft / name).read_bytes()
    assert not {"model.safetensors", "config.json", "adapter_config.json"} & files.keys()
    said = front_matter(hub_card(published_draft))
    assert said["base_model"] == "ana/llama" and "draft-adapter" in said["tags"]
    assert str(draft.parent).encode() not in b"".join(files.values())


def test_a_draft_adapter_is_pushed_with_its_own_base_alone(
    hub, fails, published_draft, draft, base
):
    assert "is a folder on this machine" in fails(draft, "ana/lonely-draft")
    weights = load_file(base / "model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, base.parent / "x", {"format": "pt"})
    files = hub.model("ana/llama").files | {"model.safetensors": (base.parent / "x").read_bytes()}
    hub.add_repo("ana/other-llama", files)
    said = fails(draft, "ana/misled-draft", "--base", "ana/other-llama")
    assert "are not the ones it was trained for" in said
    assert ("model", "ana/misled-draft") not in hub.repos


# The base on the Hub


def test_a_base_on_the_hub_is_named_with_its_licence(hub, client, pushes, base, tmp_path):
    card = b"---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n"
    held = {f.name: f.read_bytes() for f in base.iterdir()} | {"README.md": card}
    commit = hub.add_repo("rob/tiny", held).head
    done = client.run(
        "adapt", "rob/tiny", "--max-steps", 0, "--output-dir", tmp_path / "x", "data.max_length=32"
    )
    assert done.code == 0, done.err
    pushes(tmp_path / "x", "ana/from-the-hub")
    files = hub.model("ana/from-the-hub").files
    said = front_matter(files["README.md"].decode())
    assert said["base_model"] == "rob/tiny" and said["base_model_relation"] == "finetune"
    assert (said["license"], said["license_name"], said["license_link"]) == (
        "other", "tiny", "LICENSE",
    )  # fmt: skip
    record = json.loads(files["ar2diff.json"])
    assert (record["base_model"], record["base_commit"]) == ("rob/tiny", commit)


# Where ar2diff is not installed


REPOSITORIES = ("stories", "stories-lora", "stories-head", "stories-free", "draft")


@pytest.fixture(scope="module")
def published_head(hub, client, base, train):
    """The repository of a model with a diffusion head."""
    done = client.run(
        "push", train(base, "stories-head", "convert.head_rank=2"), "ana/stories-head"
    )
    assert done.code == 0, done.err
    assert "of the example are the same" in done.out
    return hub.model("ana/stories-head")


@pytest.fixture(scope="module")
def published_free(hub, client, base, train):
    """The repository of a model whose noise is drawn, also where tokens are not, and is fitted to
    its embeddings."""
    folder = train(base, "stories-free", "noise.kind=embedding")
    done = client.run("push", folder, "ana/stories-free")
    assert done.code == 0, done.err
    assert "of the example are the same" in done.out
    kept = (folder / "noise.safetensors").read_bytes()
    assert hub.model("ana/stories-free").files["noise.safetensors"] == kept
    return hub.model("ana/stories-free")


@pytest.fixture(scope="module")
def elsewhere(
    hub, published, published_adapter, published_head, published_free, published_draft,
    tmp_path_factory,
):  # fmt: skip
    """What the first code block of each card prints in a process without ar2diff, as it stands and
    without its `trust_remote_code=True`."""
    home = tmp_path_factory.mktemp("elsewhere")
    (home / "sitecustomize.py").write_text(BLOCKER)
    script = home / "elsewhere.py"
    script.write_text(
        "import contextlib, io, json, re, sys\n"
        "from huggingface_hub import hf_hub_download\n"
        "said = {}\n"
        "for repo in sys.argv[1:]:\n"
        "    card = open(hf_hub_download(repo, 'README.md')).read()\n"
        "    block = re.search('```python\\n(.*?)```', card, re.S)[1]\n"
        "    trust = ', trust_remote_code=True'\n"
        "    assert trust in block\n"
        "    for trusted in (True, False):\n"
        "        out = io.StringIO()\n"
        "        with contextlib.redirect_stdout(out):\n"
        "            if not trusted and 'draft=draft' in block: continue\n"
        "            exec(block if trusted else block.replace(trust, ''), {})\n"
        "        said[f'{repo} {trusted}'] = out.getvalue()\n"
        "try:\n"
        "    import ar2diff\n"
        "except ImportError as error:\n"
        "    said['ar2diff'] = str(error)\n"
        "print(json.dumps(said))\n"
    )
    done = subprocess.run(
        [sys.executable, script, *(f"ana/{name}" for name in REPOSITORIES)],
        env=hub_environment(home / "home", hub.url) | {"PYTHONPATH": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", REPOSITORIES)
def test_the_cards_first_block_denoises_without_ar2diff(hub, elsewhere, name):
    assert "blocked" in elsewhere["ar2diff"]
    (golden,) = json.loads(hub.model(f"ana/{name}").files["ar2diff.json"])["golden"]
    said = golden["prompt"] + golden["samples"][0]["text"].rstrip()
    assert elsewhere[f"ana/{name} True"].strip() == said


@pytest.mark.parametrize("name", ["stories", "stories-lora"])
def test_without_trust_it_is_silently_the_ar_mode(
    hub, elsewhere, published, published_adapter, model, adapter, name
):
    assert elsewhere[f"ana/{name} False"] == elsewhere[f"ana/{name} True"]  # the default: lossless
    checkpoint = load_checkpoint(str({"stories": model, "stories-lora": adapter}[name]))
    (golden,) = json.loads(hub.model(f"ana/{name}").files["ar2diff.json"])["golden"]
    inputs = checkpoint.tokenizer(golden["prompt"], return_tensors="pt")
    plain = checkpoint.model.generate(**inputs, max_new_tokens=TOKENS)
    text = checkpoint.tokenizer.decode(plain[0], skip_special_tokens=True)
    assert elsewhere[f"ana/{name} False"] == text + "\n"
    card = hub_card(published if name == "stories" else published_adapter)
    assert "Without `trust_remote_code=True` nothing fails and nothing warns" in card
    assert "the text is that of the AR mode" in card


def hub_card(repo) -> str:
    return repo.files["README.md"].decode()


# Bad input: two lines, exit 2, no secret


def test_no_token(fails, model):
    said = fails(model, "ana/x", HF_TOKEN=None)
    assert "there is no token for the Hub" in said and "hf auth login" in said


@pytest.mark.parametrize("token", ["hf_WrongSecret", "hf_with space", "hf_ümlaut", "hf_\x01bell"])
def test_a_wrong_token_is_refused_and_never_printed(fails, model, token):
    said = fails(model, "ana/x", HF_TOKEN=token)
    assert "the Hub does not recognize the token from HF_TOKEN" in said


def test_the_token_of_the_login_is_taken(hub, client, fails, pushes, model):
    saved = Path(client.environment["HF_HOME"]) / "token"
    saved.parent.mkdir(exist_ok=True)
    try:
        saved.write_text("hf_OldSecret")
        assert "the token from the login" in fails(model, "ana/login", HF_TOKEN=None)
        saved.write_text(TOKEN)
        pushes(model, "ana/login", HF_TOKEN=None)
    finally:
        saved.unlink()


def test_a_token_that_may_not_write(hub, fails, model):
    assert "is read-only" in fails(model, "reader/x", HF_TOKEN=READER)
    assert "the token has no write access to rob/x" in fails(model, "rob/x")
    hub.add_repo("rob/taken")
    assert "the token has no write access to rob/taken" in fails(model, "rob/taken")


def test_a_name_taken_by_a_data_set(fails, model):
    assert "is a data set on the Hub" in fails(model, "ana/data")


@pytest.mark.parametrize("name", ["a/b/c", "ana/sto ries", "ana/x--y", ".x", "ana/x.git", ""])
def test_a_name_that_is_none(hub, fails, model, name):
    assert f"repository {name!r}" in fails(model, name)


def test_no_network(hub, fails, model):
    with hub.away():
        said = fails(model, "ana/x")
    assert f"the Hub ({hub.url}) cannot be reached" in said


def test_a_folder_that_is_no_model_of_ours(fails, model, base, tmp_path):
    assert "does not exist" in fails(tmp_path / "none", "ana/x")
    assert "holds no model" in fails(tmp_path, "ana/x")
    assert "is not converted: its config.json has no diffusion block" in fails(base, "ana/x")
    (tmp_path / "ar2diff.json").write_text("{}")
    assert f"the run in {tmp_path} has not finished" in fails(tmp_path, "ana/x")
    folder = Path(shutil.copytree(model, tmp_path / "stripped"))
    (folder / "ar2diff.json").unlink()
    assert "ar2diff.json does not exist" in fails(folder, "ana/x")


def test_what_is_wrong_is_said_before_torch_is_imported(hub, model, tmp_path):
    hub.add_repo("ana/theirs", {"model.safetensors": b""})
    code = "import sys\nfrom ar2diff.cli.main import main\ntry:\n    main()\nfinally:\n"
    code += "    print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "push", model, "ana/theirs"],
        env=hub_environment(tmp_path, hub.url) | {"HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert "did not write" in done.stderr


@pytest.fixture(scope="module")
def unlicensed(tiny_checkpoint, train):
    return train(tiny_checkpoint, "unlicensed", steps=0)


def test_a_licence_that_is_not_known(hub, client, fails, unlicensed):
    said = fails(unlicensed, "ana/unlicensed")
    assert "'s base is unknown" in said and "--license" in said
    done = client.run("card", unlicensed)
    assert "license" not in front_matter(done.out)
    assert "'s base is unknown" in done.err and "a push will need --license" in done.err
    done = client.run("card", unlicensed, "--license", "bsd-3-clause")
    assert front_matter(done.out)["license"] == "bsd-3-clause"


def test_a_licence_that_the_hub_does_not_know(hub, fails, unlicensed):
    said = fails(unlicensed, "ana/unlicensed", "--license", "My Own")
    assert "the Hub rejects the card" in said
    assert set(hub.model("ana/unlicensed").files) == {".gitattributes"}


def test_a_prompt_that_is_none(fails, model):
    assert "--prompt" in fails(model, "ana/x", "--prompt", "")


# Training that publishes


@pytest.fixture
def training(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "the cat sat on the mat and saw a dog"}\n' * 8)
    return ["--data", data, "--max-steps", 1, "--output-dir", tmp_path / "out",
            "data.max_length=32", "convert.block_length=4"]  # fmt: skip


def test_a_run_publishes_what_it_made(hub, client, base, training, tmp_path):
    done = client.run("adapt", base, *training, "--push-to-hub", "ana/run")
    assert done.code == 0, done.err
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hub.model("ana/run").files["model.safetensors"] == weights
    assert f"{hub.url}/ana/run" in done.out


def test_a_run_that_could_not_publish_does_not_begin(hub, fails, base, training, tmp_path, model):
    def begins_not(model, repo, *more, **environment):
        said = fails(model, *training, "--push-to-hub", repo, *more, verb="adapt", **environment)
        assert not (tmp_path / "out").exists()
        return said

    assert "there is no token" in begins_not(base, "ana/new", HF_TOKEN=None)
    assert "does not recognize the token" in begins_not(base, "ana/new", HF_TOKEN="hf_WrongSecret")
    assert "is a data set" in begins_not(base, "ana/data")
    hub.add_repo("ana/weights", {"model.safetensors": b""})
    assert "did not write" in begins_not(base, "ana/weights")
    assert "a folder on this machine" in begins_not(model, "ana/new", "peft.r=2")
    with hub.away():
        assert "cannot be reached" in begins_not(base, "ana/new")


def test_a_dry_run_of_a_run_checks_the_hub_and_writes_nothing(hub, client, fails, base, training):
    done = client.run("adapt", base, *training, "--push-to-hub", "ana/planned", "--dry-run")
    assert done.code == 0, done.err
    assert ("model", "ana/planned") not in hub.repos
    fails(base, *training, "--push-to-hub", "ana/data", "--dry-run", verb="adapt")
