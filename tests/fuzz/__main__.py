"""Attack the command line: `python tests/fuzz --minutes 10`, `--count 2000`, or `--case 17`.

Each case is a sound command with one to three things wrong in a checkpoint, its rows, its recipe
or its arguments. It has to end within its time with exit status 0, or with 2 and two lines that
say what is wrong. It runs no Python of a checkpoint, touches nothing but its output, and what it
has written is whole. All else is a finding, and the exit status is 1. A seed and a number make the
same case wherever the same libraries are installed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # its own modules, and the tests' foreign checkpoints


def start_hub() -> str:
    """The tests' stand-in for the Hub, in a process that ends with this one; its address."""
    from hub_server import Hub

    reading, writing = os.pipe()
    parent = os.getpid()
    if os.fork() == 0:
        with Hub() as hub:
            hub.add_user("a", "hf_fuzz")
            os.write(writing, hub.url.encode())
            os.close(writing)
            while os.getppid() == parent:
                time.sleep(0.5)
        os._exit(0)
    os.close(writing)
    with open(reading) as stream:
        return stream.read()


def prepare(root: Path) -> None:
    """The environment of all cases, before anything heavy is imported."""
    for name in [n for n in os.environ if n.startswith(("XDG_", "HF_", "HUGGING_FACE", "AR2DIFF"))]:
        del os.environ[name]
    os.environ.update(
        HOME=str(root / "case" / "home"),
        TMPDIR=str(root / "tmp"),
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        ARROW_DEFAULT_MEMORY_POOL="system",
        HF_ENDPOINT=start_hub(),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        NO_PROXY="127.0.0.1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_VERBOSITY="error",
        CUDA_VISIBLE_DEVICES="",
        HF_TOKEN="hf_fuzz",
        COLUMNS="120",
    )
    sys.dont_write_bytecode = True
    tempfile.tempdir = str(root / "tmp")  # it has looked already


def warm() -> None:
    """Import once what every case would."""
    import importlib
    import pkgutil

    import torch
    import transformers  # noqa: F401

    import ar2diff

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    for module in pkgutil.walk_packages(ar2diff.__path__, "ar2diff."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop then")
    parser.add_argument("--count", type=int, help="stop after so many cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one, show it whole, keep its folder")
    parser.add_argument(
        "--sound", action="store_true", help="with nothing wrong: all must exit with 0"
    )
    parser.add_argument("--list", type=Path, metavar="FILE", help="write findings there on the way")
    given = parser.parse_args()
    if given.count is None and given.minutes is None:
        given.minutes = 10
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        ready(root)
        return many(root, given) if given.case is None else one(root, given.seed, given.case)
    finally:
        if given.case is None:
            shutil.rmtree(root, ignore_errors=True)


def ready(root: Path) -> None:
    """Import everything and build the stock."""
    began = time.monotonic()
    prepare(root)
    (root / "tmp").mkdir()
    (root / "case" / "home").mkdir(parents=True)
    warm()

    import sandbox
    from stock import build

    build(root)
    sandbox.freeze()
    print(f"[warm after {time.monotonic() - began:.0f} s]", flush=True)


def one(root: Path, seed: int, number: int) -> int:
    """Run a case and show everything."""
    from judge import examine

    case, outcome, findings = examine(root, seed, number)
    print(
        f"case {number}: ar2diff {shlex.join(case.words)}".encode(
            "utf-8", "backslashreplace"
        ).decode()
    )
    for note in case.notes:
        print(f"  {note}")
    print(f"--- stdout\n{outcome.out[:20_000]}--- stderr\n{outcome.err[-20_000:]}")
    if outcome.stack:
        print(f"--- stack\n{outcome.stack[-6000:]}")
    print(f"exit {outcome.code}, signal {outcome.signal}, {outcome.seconds:.1f} s, in {case.work}")
    for finding in findings:
        print(f"finding: {finding.title}: {finding.detail}")
    return int(bool(findings))


def many(root: Path, given: argparse.Namespace) -> int:
    """Run cases until the time or their number is up; tell each new finding once."""
    from judge import examine

    seen: dict[tuple, list] = {}
    ended: Counter[str] = Counter()
    verbs: Counter[str] = Counter()
    slowest = (0.0, 0)
    began, number = time.monotonic(), given.first

    def more() -> bool:
        count = given.count is None or number < given.first + given.count
        return count and (given.minutes is None or time.monotonic() - began < given.minutes * 60)

    while more():
        case, outcome, findings = examine(root, given.seed, number, given.sound)
        verbs[case.verb] += 1
        slowest = max(slowest, (outcome.seconds, number))
        ended["ended well" if not findings else "with findings"] += 1
        ended["refused in two lines"] += outcome.code == 2 and not findings
        for finding in findings:
            entry = seen.setdefault(finding.key, [0, finding, case, number])
            entry[0] += 1
            if entry[0] == 1:
                print(told(entry), flush=True)
                if given.list:
                    given.list.write_text(table(seen, given.seed))
        number += 1
    minutes = (time.monotonic() - began) / 60
    print(table(seen, given.seed))
    kinds = Counter()
    for times, finding, *_ in seen.values():
        kinds[finding.kind] += times
    total = number - given.first
    print(f"{total} cases in {minutes:.1f} minutes ({total / minutes:.0f} a minute): {dict(ended)}")
    print(f"by verb: {dict(verbs)}; case {slowest[1]} took longest, {slowest[0]:.0f} s")
    distinct = Counter(entry[1].kind for entry in seen.values())
    print(
        "findings: "
        + (", ".join(f"{n} {k} ({distinct[k]} distinct)" for k, n in kinds.most_common()) or "none")
    )
    return int(bool(seen))


def told(entry: list) -> str:
    """A finding, what was done, and the line that does it again."""
    times, finding, case, number = entry
    line = shlex.join(w if len(w) < 80 else w[:60] + "..." for w in case.words)
    notes = "; ".join(case.notes)
    text = f"{times} x [{case.verb}] {finding.title}: {finding.detail}\n"
    text += f"    case {number}: ar2diff {line}  # {notes}"
    text = text.replace(str(case.work.parents[1]), "ROOT")
    return text.encode("utf-8", "backslashreplace").decode()


def table(seen: dict[tuple, list], seed: int) -> str:
    """All findings, by kind, the most frequent first."""
    entries = sorted(seen.values(), key=lambda e: (e[1].kind, -e[0]))
    together: dict[tuple[str, str], Counter[str]] = {}
    for times, finding, case, _ in entries:
        together.setdefault((finding.kind, finding.title), Counter())[case.verb] += times
    lines = ["in short, over all verbs:"]
    for (kind, title), verbs in sorted(together.items(), key=lambda e: (e[0][0], -e[1].total())):
        lines.append(f"{verbs.total():5} {kind:12} {title}  ({', '.join(sorted(verbs))})")
    lines += [f"again: python tests/fuzz --seed {seed} --case N", *map(told, entries)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
