"""lm-evaluation-harness with the model `ar2diff` and the tasks that come with ar2diff:

    python -m ar2diff.lm_eval run --model_args pretrained=FOLDER,mode=diffusion --tasks TASK

takes the arguments of `lm_eval`. Without `--model` the model is `ar2diff`; without `--include_path`
the tasks are also those of ar2diff.
"""

from __future__ import annotations

import sys

from .core.errors import Ar2DiffError, first_line
from .evaluation.documents import TASKS

# What is added to the arguments, unless one of these is there.
ADDED = {
    ("--model", "-M", "--config", "-C"): ["--model", "ar2diff"],
    ("--include_path",): ["--include_path", str(TASKS)],
}


def main() -> None:
    """Run lm-evaluation-harness."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        told = f"lm-eval cannot be imported ({first_line(error)})"
        _exit(Ar2DiffError(told, "pip install 'ar2diff[eval]'"))
    model_registry.register("ar2diff", target="ar2diff.evaluation.harness:Harness")
    words = [word.split("=")[0] for word in sys.argv[1:]]
    if "ls" not in words and "validate" not in words and len(words) > 1:
        for names, arguments in ADDED.items():
            if not {*names} & {*words}:
                sys.argv += arguments
    try:
        cli_evaluate()
    except Ar2DiffError as error:
        _exit(error)


def _exit(error: Ar2DiffError) -> None:
    print(f"error: {error.what}\n  fix: {error.fix}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
