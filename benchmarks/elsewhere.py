"""A converted folder denoises where ar2diff is not installed: each way to run it, one line each.

    python benchmarks/elsewhere.py make FOLDER     needs ar2diff: converts the demo's model
    python benchmarks/elsewhere.py check FOLDER    must not have it: exits with 1 if a check failed

`make elsewhere` does the first here and the second in a fresh environment.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTS = ["Once upon a time", "Tom had a", "The sun was"]
NEW = 24
SEED = 7
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
REFERENCE = "reference.json"  # beside the folder: what ar2diff itself writes there
TASK = """task: elsewhere
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["said"], max_gen_toks: {new}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def make(folder: Path, attention: str = "causal_context") -> None:
    """Convert the demo's model without training it, and note what ar2diff writes with it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ar2diff.demo
    from ar2diff.config.recipe import load_recipe
    from ar2diff.core.generate import generate
    from ar2diff.training.adapt import adapt

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        shutil.copytree(Path(ar2diff.demo.__file__).parent / "model", base, dirs_exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(base)
        values = ["train.max_steps=0", "data.max_length=128", f"convert.attention={attention}"]
        values += ["convert.block_length=null"] * (attention == "full")
        adapt(base, load_recipe(None, values), folder, overwrite=folder.exists())
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.mode = "diffusion"  # also where a program passes no options of ours
    model.generation_config.save_pretrained(folder)
    reference = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        done = generate(ids, model=model, max_new_tokens=NEW, return_dict_in_generate=True)
        drawn = generate(ids, model=model, max_new_tokens=NEW, temperature=0.8, seed=SEED)
        ar = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        reference[prompt] = {
            "prompt": ids[0].tolist(),
            "diffusion": done.sequences[0, ids.shape[1] :].tolist(),
            "forwards": int(done.forwards),
            "drawn": drawn[0, ids.shape[1] :].tolist(),
            "ar": ar[0, ids.shape[1] :].tolist(),
        }
        assert reference[prompt]["diffusion"] != reference[prompt]["ar"]
    Path(f"{folder}-{REFERENCE}").write_text(json.dumps(reference))


class Folder:
    """What the checks work on: the folder, its tokenizer, its model, what ar2diff wrote."""

    def __init__(self, path: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.path = str(path.resolve())
        self.reference = json.loads(Path(f"{path}-{REFERENCE}").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        self.untrusted = AutoModelForCausalLM.from_pretrained(path)

    def ids(self, prompt: str) -> Any:
        return self.tokenizer(prompt, return_tensors="pt").input_ids

    def text(self, prompt: str, kind: str = "diffusion") -> str:
        """What follows a prompt."""
        return self.tokenizer.decode(self.reference[prompt][kind], skip_special_tokens=True)

    def new(self, sequences: Any, prompt: str) -> list[int]:
        """The new tokens of one row; checks that it starts with its prompt and holds no mask."""
        row, given = sequences[0].tolist(), self.reference[prompt]["prompt"]
        assert row[: len(given)] == given, row
        assert self.tokenizer.mask_token_id not in row, row
        return row[len(given) :]


def ar2diff_is_not_here(_folder: Folder) -> str:
    try:
        import ar2diff
    except ImportError as error:
        return str(error)
    raise AssertionError(f"ar2diff is importable: {ar2diff.__file__}")


def generate_after_from_pretrained(folder: Folder) -> str:
    tokens = forwards = 0
    for prompt, wanted in folder.reference.items():
        done = folder.model.generate(
            folder.ids(prompt), max_new_tokens=NEW, return_dict_in_generate=True
        )
        assert folder.new(done.sequences, prompt) == wanted["diffusion"]
        assert int(done.forwards) == wanted["forwards"]
        assert len(wanted["diffusion"]) <= NEW
        tokens, forwards = tokens + len(wanted["diffusion"]), forwards + wanted["forwards"]
    assert forwards < tokens
    return f"{tokens} tokens in {forwards} forwards, what ar2diff itself writes"


def generate_without_loss(folder: Folder) -> str:
    if not folder.model.config.diffusion["ar_mode"]:
        return "no AR mode"
    for prompt, wanted in folder.reference.items():
        done = folder.model.generate(folder.ids(prompt), max_new_tokens=NEW, mode="speculative")
        assert folder.new(done, prompt) == wanted["ar"]
    return "mode speculative writes the text of the AR mode"


def generate_returns_a_plain_tensor(folder: Folder) -> str:
    import torch

    for limit in (0, 1, 5):
        done = folder.model.generate(folder.ids(PROMPTS[0]), max_new_tokens=limit)
        assert type(done) is torch.Tensor and done.dtype == torch.long
        assert len(folder.new(done, PROMPTS[0])) == limit
    return "int64, exactly 0, 1 and 5 new tokens"


def generate_with_a_seed(folder: Folder) -> str:
    for prompt, wanted in folder.reference.items():
        done = folder.model.generate(
            folder.ids(prompt), max_new_tokens=NEW, temperature=0.8, seed=SEED
        )
        assert folder.new(done, prompt) == wanted["drawn"] != wanted["diffusion"]
    return "the draws are those of ar2diff itself"


def generate_a_ragged_batch(folder: Folder) -> str:
    folder.tokenizer.padding_side = "left"
    batch = folder.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    done = folder.model.generate(**batch, max_new_tokens=NEW)
    for row, wanted in zip(done.tolist(), folder.reference.values(), strict=True):
        new = row[batch.input_ids.shape[1] :][: len(wanted["diffusion"])]
        assert new == wanted["diffusion"]
    return f"{len(PROMPTS)} rows, padded on the left, as each alone"


def custom_generate_of_a_call(folder: Folder) -> str:
    done = folder.untrusted.generate(
        folder.ids(PROMPTS[0]),
        max_new_tokens=NEW,
        custom_generate=folder.path,
        trust_remote_code=True,
    )
    assert folder.new(done, PROMPTS[0]) == folder.reference[PROMPTS[0]]["diffusion"]
    return "generate(custom_generate=FOLDER) denoises"


def without_trust(folder: Folder) -> str:
    from transformers import pipeline

    pipe = pipeline("text-generation", model=folder.path, device="cpu")
    options = {"max_new_tokens": NEW, "do_sample": False}
    for prompt, wanted in folder.reference.items():
        done = folder.untrusted.generate(folder.ids(prompt), **options)
        assert folder.new(done, prompt) == wanted["ar"]
        said = pipe(prompt, return_full_text=False, **options)[0]["generated_text"]
        assert said == folder.text(prompt, "ar")
    return "plain AR decoding, no error; the pipeline too"


def half_precision(folder: Folder) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(
            folder.path, trust_remote_code=True, dtype=dtype
        )
        done = model.generate(
            folder.ids(PROMPTS[0]), max_new_tokens=NEW, return_dict_in_generate=True
        )
        assert 0 < len(folder.new(done.sequences, PROMPTS[0])) <= NEW
        assert int(done.forwards) < NEW
    return "bfloat16 and float16 load and denoise"


def hub_layout(folder: Folder) -> str:
    """A Hub id takes another path through transformers than a folder: each module by itself."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as cache:
        repository = Path(cache) / "models--someone--stories"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder.path, repository / "snapshots" / ("0" * 40))
        model = AutoModelForCausalLM.from_pretrained(
            "someone/stories", trust_remote_code=True, cache_dir=cache, local_files_only=True
        )
    done = model.generate(folder.ids(PROMPTS[0]), max_new_tokens=NEW)
    assert folder.new(done, PROMPTS[0]) == folder.reference[PROMPTS[0]]["diffusion"]
    return "loaded by its id from a cache of the Hub, offline"


def text_generation_pipeline(folder: Folder) -> str:
    from transformers import pipeline

    pipe = pipeline("text-generation", model=folder.path, trust_remote_code=True, device="cpu")
    options = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    for prompt in PROMPTS:
        assert pipe(prompt, **options)[0]["generated_text"] == folder.text(prompt)
        chat = [{"role": "user", "content": prompt}]
        assert pipe(chat, **options)[0]["generated_text"] == folder.text(prompt)
    batch = pipe(PROMPTS, batch_size=len(PROMPTS), **options)
    assert [said["generated_text"] for [said] in batch] == [folder.text(p) for p in PROMPTS]
    drawn = pipe(PROMPTS[0], max_new_tokens=NEW, stop_sequence="said", num_return_sequences=2)
    assert not any(folder.tokenizer.mask_token in said["generated_text"] for said in drawn)
    return "texts, chats, a batch, two draws of one prompt"


def streamers(folder: Folder) -> str:
    from transformers import TextIteratorStreamer, TextStreamer

    ids, options = folder.ids(PROMPTS[0]), {"skip_prompt": True, "skip_special_tokens": True}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        streamer = TextStreamer(folder.tokenizer, **options)
        folder.model.generate(ids, max_new_tokens=NEW, streamer=streamer)
    assert shown.getvalue().rstrip("\n") == folder.text(PROMPTS[0]).rstrip("\n")
    streamer = TextIteratorStreamer(folder.tokenizer, timeout=60, **options)
    thread = threading.Thread(
        target=folder.model.generate,
        args=(ids,),
        kwargs={"max_new_tokens": NEW, "streamer": streamer},
    )
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == folder.text(PROMPTS[0])
    return f"TextStreamer, and TextIteratorStreamer in {len(pieces)} pieces"


def streamer_that_cancels(folder: Folder) -> str:
    class Cancelled(Exception):
        pass

    class Streamer:
        puts = 0

        def put(self, value: Any) -> None:
            assert value.dim() == 1 and all(type(i) is int for i in value.tolist())
            self.puts += 1
            if self.puts == 3:
                raise Cancelled

        def end(self) -> None:
            raise AssertionError("it was cancelled")

    try:
        folder.model.generate(folder.ids(PROMPTS[0]), max_new_tokens=NEW, streamer=Streamer())
    except Cancelled:
        return "1-D puts; an exception of put() ends it"
    raise AssertionError("the exception of put() was lost")


def peft_wrapped(folder: Folder) -> str:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder.path, trust_remote_code=True)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    done = model.generate(input_ids=folder.ids(PROMPTS[0]), max_new_tokens=NEW)
    assert folder.new(done, PROMPTS[0]) == folder.reference[PROMPTS[0]]["diffusion"]
    return "a fresh LoRA changes nothing"


def lm_eval_task(folder: Folder) -> str:
    """A batch that stop strings cut: each row is what it would be alone."""
    stopped = 0
    for prompt, said in _lm_eval(f"pretrained={folder.path},trust_remote_code=True").items():
        wanted = folder.text(prompt).split("said")[0]
        assert said == wanted != folder.text(prompt, "ar").split("said")[0], (said, wanted)
        stopped += "said" in folder.text(prompt)
    assert stopped
    return f"--model hf, {len(PROMPTS)} rows in a batch, {stopped} of them ended by a stop string"


def lm_eval_task_without_trust(folder: Folder) -> str:
    for prompt, said in _lm_eval(f"pretrained={folder.path}").items():
        assert said == folder.text(prompt, "ar").split("said")[0], said
    return "plain AR decoding, no error"


def _lm_eval(model: str) -> dict[str, str]:
    """What the stock command line has a model write on a local task: {prompt: answer}."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rows = [{"text": prompt, "answer": "-"} for prompt in PROMPTS]
        (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (work / "elsewhere.yaml").write_text(TASK.format(data=work / "rows.jsonl", new=NEW))
        command = [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
            *("--model_args", f"{model},max_length=128", "--tasks", "elsewhere"),
            *("--include_path", name, "--batch_size", str(len(PROMPTS))),
            *("--output_path", str(work / "out"), "--log_samples"),
        ]
        ran = subprocess.run(command, cwd=name, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-2000:]
        samples = next((work / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    said = {s["doc"]["text"]: s["resps"][0][0] for s in map(json.loads, samples)}
    assert sorted(said) == sorted(PROMPTS)
    return said


def transformers_serve(folder: Folder) -> str:
    with _served(folder.path, "--trust-remote-code") as ask:
        for prompt in PROMPTS:
            wanted, chat = folder.reference[prompt], _chat(folder, prompt)
            whole = json.loads(ask("/v1/chat/completions", chat))
            assert whole["choices"][0]["message"]["content"] == folder.text(prompt), whole
            assert whole["usage"]["completion_tokens"] == len(wanted["diffusion"]) <= NEW
            events = ask("/v1/chat/completions", {**chat, "stream": True}).split("\n\n")
            chunks = [json.loads(e[6:]) for e in events if e.startswith("data: {")]
            parts = [c["choices"][0]["delta"].get("content") for c in chunks if c["choices"]]
            assert "".join(part or "" for part in parts) == folder.text(prompt), events
            short = json.loads(ask("/v1/chat/completions", {**chat, "max_tokens": 3}))
            assert short["usage"]["completion_tokens"] == 3
            assert short["choices"][0]["finish_reason"] == "length"
        options = json.dumps({"threshold": 1.0, "block_length": 4, "do_sample": False})
        slow = json.loads(ask("/v1/chat/completions", {**chat, "generation_config": options}))
        assert slow["choices"][0]["message"]["content"] != folder.text(prompt)
        again = json.loads(ask("/v1/completions", _completion(folder, PROMPTS[0])))
        assert again["choices"][0]["text"] == folder.text(PROMPTS[0]), again
    return "chats whole and streamed, completions, limits, options of the sampler in a request"


def transformers_serve_without_trust(folder: Folder) -> str:
    with _served(folder.path) as ask:
        whole = json.loads(ask("/v1/chat/completions", _chat(folder, PROMPTS[0])))
    assert whole["choices"][0]["message"]["content"] == folder.text(PROMPTS[0], "ar"), whole
    return "plain AR decoding, no error"


def _chat(folder: Folder, prompt: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": folder.path, "messages": messages, "max_tokens": NEW, "temperature": 0}


def _completion(folder: Folder, prompt: str) -> dict[str, Any]:
    return {"model": folder.path, "prompt": prompt, "max_tokens": NEW, "temperature": 0}


@contextlib.contextmanager
def _served(path: str, *flags: str) -> Iterator[Any]:
    """A server of the stock command line; yields ask(route, body) -> the answer's text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).parent / "transformers"), "serve", path, *flags]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]

    def ask(route: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            address + route, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(240):
                assert server.poll() is None, "the server ended"
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    ask("/health")
                    break
                time.sleep(0.5)
            yield ask
        except Exception as error:
            log.seek(0)
            raise AssertionError(f"{error!r}; the server said: {log.read()[-2000:]}") from error
        finally:
            server.terminate()
            server.wait(30)


CHECKS = [  # (check, the packages it needs)
    (ar2diff_is_not_here, ()),
    (generate_after_from_pretrained, ()),
    (generate_without_loss, ()),
    (generate_returns_a_plain_tensor, ()),
    (generate_with_a_seed, ()),
    (generate_a_ragged_batch, ()),
    (custom_generate_of_a_call, ()),
    (without_trust, ()),
    (half_precision, ()),
    (hub_layout, ()),
    (text_generation_pipeline, ()),
    (streamers, ()),
    (streamer_that_cancels, ()),
    (peft_wrapped, ("peft",)),
    (lm_eval_task, ("lm_eval",)),
    (lm_eval_task_without_trust, ("lm_eval",)),
    (transformers_serve, ("fastapi", "uvicorn", "openai")),
    (transformers_serve_without_trust, ("fastapi", "uvicorn", "openai")),
]


def check(path: Path, wanted: list[str]) -> int:
    """Run the checks of these names, or all; 0 if all held."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, failed = Folder(path), 0
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}")
    for function, packages in CHECKS:
        if wanted and function.__name__ not in wanted:
            continue
        name = function.__name__.replace("_", " ").strip()
        absent = [p for p in packages if importlib.util.find_spec(p) is None]
        start = time.monotonic()
        try:
            state, said = ("skipped", f"needs {', '.join(absent)}") if absent else ("ok", "")
            said = said or function(folder)
        except Exception as error:
            state, said, failed = "failed", f"{type(error).__name__}: {error}", failed + 1
            traceback.print_exc()
        print(f"{state:8}{name:34}{time.monotonic() - start:6.1f} s  {said}", flush=True)
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["make", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("checks", nargs="*", help="names of checks; all if none is given")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:  # nothing of the user's caches, and no network
        os.environ.update(HF_HOME=home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        if given.verb == "check":
            return check(given.folder, given.checks)
        make(given.folder)
        return 0


if __name__ == "__main__":
    sys.exit(main())
