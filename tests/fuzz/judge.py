"""What is wrong with how a case ended."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import cases
import sandbox
from checkpoints import CANARY

LINE = 1000  # characters of an error line
FLOOD = 4 << 20  # bytes of output
FRAME = re.compile(r'File "([^"]+)", line (\d+)(?:,)? in (\S+)')
TRAINING = ("adapt", "sft", "rl")
TRACE = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Finding:
    """A fault of one case; those with the same `key` are told once."""

    kind: str
    key: tuple
    title: str
    detail: str = ""


def examine(
    root: Path, seed: int, number: int, sound: bool = False
) -> tuple[cases.Case, sandbox.Outcome, list[Finding]]:
    """Make a case, run it, judge it; a sound one has to end well."""
    case = cases.make(root, seed, number, sound)
    before = sandbox.snapshot(root / "case")
    outcome = sandbox.run(root, case.words, case.stdin, lambda: loadable(case), case.seconds)
    after = sandbox.snapshot(root / "case")
    findings = list(judge(case, outcome, before, after))
    if sound and outcome.code != (2 if case.refused else 0):
        error = outcome.err.strip()[-300:]
        findings.append(
            Finding("refused", (case.verb, _gist(error)), "a sound case is refused", error)
        )
    return case, outcome, findings


def judge(case, outcome, before, after):
    """The findings."""
    yield from _ending(case, outcome)
    yield from _foreign(case, outcome, after)
    yield from _touched(case, outcome, before, after)
    if not outcome.hang and not outcome.signal:
        yield from _written(case, outcome, before, after)
    if outcome.code == 0 and case.refusal and case.verb != "memory":  # which reads no weights
        yield Finding("outside", (case.verb, "outside"), f"exit 0, and {case.refusal}")


def _ending(case, outcome):
    err = outcome.err
    if outcome.hang:
        if not case.patient:
            where = innermost(outcome.stack, newest_first=True)
            where = "loading what was written" if " in loadable" in outcome.stack else where
            yield Finding("hang", (case.verb, "hang", where), f"hang at {where}")
        return
    if outcome.code is None:
        where = innermost(outcome.stack, newest_first=True)
        words = re.findall(r"^.*(?:terminate|what\(\)|atal|abort|panicked).*$", err, re.M)
        title = f"signal {outcome.signal} at {where}"
        yield Finding("signal", (case.verb, title), title, " ".join(words)[:200])
        return
    if outcome.code not in (0, 2) or TRACE in err:
        name, message = last_error(err)
        where = innermost(err) if TRACE in err else "no traceback"
        title = f"{name} at {where}" if TRACE in err else f"exit {outcome.code}"
        yield Finding("traceback", (case.verb, name, where), title, message)
        return
    lines = err.splitlines()
    said = [i for i, line in enumerate(lines) if line.startswith("error:")]
    if outcome.code == 2 and not said and not outcome.out.strip():
        yield Finding("silent", (case.verb, "silent"), "exit 2 without a word", err[-200:])
    if outcome.code == 2 and said and case.verb != "chat":
        rest = lines[said[0] :]
        if len(rest) != 2 or not rest[1].startswith("  fix:"):
            shape = f"error of {len(rest)} lines" if len(rest) < 4 else "error of many lines"
            yield Finding(
                "shape", (case.verb, shape, _gist(rest[0])), shape, " | ".join(rest)[:300]
            )
    long = [li for li in lines if len(li) > LINE and li.lstrip().startswith(("error:", "fix:"))]
    if long:
        length = f"line of {len(long[0])} characters"
        yield Finding("long", (case.verb, "long", _gist(long[0])), length, long[0][:150])
    if len(outcome.out) >= FLOOD or len(err) >= FLOOD:
        yield Finding("flood", (case.verb, "flood"), "megabytes of output", outcome.out[:80])


def _foreign(case, outcome, after):
    ran = sorted({name for name in after if re.match(r"home/(ran$|.*huggingface/modules)", name)})
    names = outcome.foreign or ran
    if names:
        name = re.sub(r"[0-9a-f]{16,}", "*", names[0])
        yield Finding(
            "foreign code", (case.verb, "foreign", name), f"ran {name}", ", ".join(names[:3])
        )


def _touched(case, outcome, before, after):
    work = case.work.parent
    named = [w for w in case.words[1:] if w and not w.startswith("-")]
    allowed = {case.output} | {case.work / w for w in named if "\x00" not in w and len(w) < 4000}
    allowed -= {*case.files.values(), None}
    if case.verb in TRAINING:
        allowed.add(case.work / "runs")
    dry = "--dry-run" in case.words
    for path in sandbox.changed(before, after):
        full = work / path
        inside = any(full == a or a in full.parents or full in a.parents for a in allowed)
        native = re.match(r"home/(\.cache(/|$)(?!.*huggingface/modules)|\.triton|\.config)", path)
        if (inside and not dry) or native or path == "home/ran" or "huggingface/modules" in path:
            continue
        what = "changed" if path in before and path in after else "new" if path in after else "gone"
        yield Finding("touched", (case.verb, "touched", path), f"{what} outside: {path}")
        return
    asked = [p for p in outcome.refused if not any(p.startswith(w) for w in named if w[:1] in "/.")]
    if asked:
        yield Finding("touched", (case.verb, "asked", asked[0][:40]), f"wanted to write {asked[0]}")


def _written(case, outcome, before, after):
    if case.output is None:
        return
    name = str(case.output.relative_to(case.work.parent))
    here = {p: t for p, t in after.items() if p == name or p.startswith(f"{name}/")}
    partial = [p for p in after if p.endswith(".partial")]
    old = {p: t for p, t in before.items() if p == name or p.startswith(f"{name}/")}
    if set(partial) - set(before):
        yield Finding("half-written", (case.verb, "partial"), "a .partial is left", partial[0])
    if case.old:
        lost = [p for p in (f"{name}/diary.txt", f"{name}/my.safetensors") if p not in after]
        if lost:
            yield Finding("touched", (case.verb, "lost"), "deleted the user's file", lost[0])
        if outcome.code != 0 and (gone := sandbox.changed(old, here)):
            yield Finding(
                "half-written", (case.verb, "old"), "failed, the old folder is not whole", gone[0]
            )
    elif outcome.code != 0 and here and case.output.is_dir():
        left = sorted(here)[1:] or [f"{name} (empty)"]
        yield Finding(
            "half-written",
            (case.verb, "left", left[0]),
            "failed, and left files",
            ", ".join(left[:4]),
        )
    if outcome.problem:
        kind = outcome.problem.partition(":")[0]
        yield Finding(
            "unloadable",
            (case.verb, "unloadable", kind),
            "written, not loadable",
            outcome.problem[:200],
        )
    if outcome.code == 0 and case.output.is_dir():
        for file in case.output.rglob("*"):
            if file.is_symlink() or (file.is_file() and CANARY.encode() in file.read_bytes()):
                yield Finding(
                    "outside", (case.verb, "copied"), f"of outside the folder: {file.name}"
                )
                return


def loadable(case: cases.Case) -> str:
    """Why what the command has written cannot be loaded; runs in the child, after the command."""
    folder = case.output
    if folder is None or not folder.exists() or "--dry-run" in case.words or not folder.is_dir():
        return ""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        adapter = (folder / "adapter_config.json").is_file()
        config = json.loads(
            (folder / ("adapter_config.json" if adapter else "config.json")).read_text()
        )
        files = [f for f in folder.glob("*.safetensors") if f.name != "my.safetensors"]
        if not files:
            return "no weights"
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():
                    opened.get_tensor(name)
        if not adapter and "sdar" not in config["model_type"].lower():
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _roots() -> tuple[str, ...]:
    """The folders of ar2diff's own modules."""
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "ar2diff"]
    return tuple({str(Path(m.__file__).parent) for m in modules if getattr(m, "__file__", None)})


def innermost(text: str, newest_first: bool = False) -> str:
    """The frame of ar2diff that is nearest to the fault, in a traceback or a stack."""
    roots = _roots()
    frames = [
        f for f in FRAME.findall(text) if f[0].startswith(roots) and "site-packages" not in f[0]
    ]
    if not frames:
        return "no frame of ar2diff"
    file, line, function = frames[0] if newest_first else frames[-1]
    return f"{Path(file).name}:{line} {function}"


def last_error(text: str) -> tuple[str, str]:
    """Class and message of the last exception in a traceback."""
    found = re.findall(
        r"^([A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Panic\w*|Iteration|NotFound|Timeout|"
        r"Warning|error))(?::[ \t]*(.*))?$",
        text,
        re.M,
    )
    name, message = found[-1] if found else ("nothing", text[-200:])
    return name.rpartition(".")[2], message[:160]


def _gist(line: str) -> str:
    """A message without what differs from case to case."""
    return re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "*", line)[:60]
