"""Running tasks of lm-evaluation-harness on a checkpoint, with an error beside every figure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import copysign, erf, exp, inf, log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError, first_line, nearest, option, shortened
from ..diffusion.estimate import difference_of
from .documents import TASKS

if TYPE_CHECKING:
    from .harness import Harness

RESAMPLES = 1000  # of the documents, for the standard error of a metric that is not a mean
CHOICE = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        name, filter: as the harness calls the metric, and the filter of the answers before it.
        standard_error: due to the choice of documents, which includes what noise draws did to each
            of them; None for a single document, or a metric that has none.
        bound_error: the part of it that is due to the noise draws of the bounds, for accuracies of
            multiple choice; None where nothing is estimated from draws.
        better: `high`, `low`, or None if the task does not say.
        documents: how many there are.
    """

    name: str
    filter: str
    value: float
    standard_error: float | None
    bound_error: float | None
    better: str | None
    documents: int


@dataclass(frozen=True)
class TaskResult:
    """A task at one setting.

    Attributes:
        setting: the options of the sampler that were set, by name, and its mode.
        bound: whether the scores that the harness calls log-likelihoods are minus upper bounds.
        metrics: every figure of the task.
        rows: for each document and filter: `id`, `filter`, `arguments` and `answers` of its
            requests, `target`, `bound_errors` (the standard error of each bound, if there are any)
            and, by its name, the value of each metric.
    """

    task: str
    setting: dict[str, Any]
    bound: bool
    metrics: tuple[Metric, ...]
    rows: tuple[dict[str, Any], ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values, without the rows."""
        return {
            "task": self.task,
            "setting": self.setting,
            "bound": self.bound,
            "metrics": [asdict(metric) for metric in self.metrics],
        }


@dataclass(frozen=True)
class Difference:
    """The mean over documents of one result's metric minus another's, and its standard error."""

    value: float
    standard_error: float
    documents: int


def run_tasks(
    model: str | Path | Checkpoint,
    tasks: Sequence[str],
    settings: dict[str, Any] | None = None,
    *,
    limit: int | None = None,
    samples: int = 8,
    seed: int = 0,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    fewshot: int | None = None,
    chat_template: bool = False,
    dtype: str = "auto",
) -> list[TaskResult]:
    """Run tasks of lm-evaluation-harness on a model, decoded at one setting.

    Args:
        model: folder or Hub id of a model, converted or not, of an adapter or of a draft adapter;
            or a loaded checkpoint.
        tasks: names of tasks or groups: those shipped (`shipped_tasks`), those in `include_path`,
            or the harness's own, most of which need a network.
        settings: options of `ar2diff generate` by their names in Python, such as `mode`.
        limit: maximum number of documents per task, from the first; None for all.
        samples: masked copies from which a bound is estimated, in mode diffusion.
        include_path: folder with more tasks as YAML.
        fewshot: examples in each prompt, for tasks that do not fix their number.
        chat_template: render prompts by the tokenizer's chat template.

    Raises:
        Ar2DiffError: lm-eval is not installed, a task is not known or has no data, or the model
            cannot do what the settings ask for.
    """
    Harness, evaluate = _lm_eval()
    found = load_tasks(tasks, include_path)
    for task in found["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    checkpoint = model if isinstance(model, Checkpoint) else str(model)
    harness = Harness(
        checkpoint, samples=samples, seed=seed, batch_size=batch_size, dtype=dtype,
        **(settings or {}),
    )  # fmt: skip
    results = evaluate(
        harness, found, limit=limit, bootstrap_iters=RESAMPLES, apply_chat_template=chat_template
    )
    return [_result(harness, name, results) for name in found["tasks"]]


def shipped_tasks() -> list[str]:
    """Names of the tasks that come with ar2diff."""
    return sorted(file.stem for file in TASKS.glob("*.yaml"))


def difference(ours: TaskResult, theirs: TaskResult, metric: str, filter: str) -> Difference:
    """How much higher a metric is in one result than in another, paired by document.

    Args:
        metric, filter: of a `Metric` that is a mean over documents.

    Raises:
        Ar2DiffError: the two results do not have the same documents.
    """
    values = [
        {row["id"]: float(row[metric]) for row in result.rows if row["filter"] == filter}
        for result in (ours, theirs)
    ]
    if values[0].keys() != values[1].keys() or not values[0]:
        raise Ar2DiffError(
            f"the results of task {ours.task} are not about the same documents",
            f"run both with the same {option('limit')}",
        )
    apart = torch.tensor([values[0][key] - values[1][key] for key in values[0]]).double()
    error = apart.std().item() / sqrt(len(apart)) if len(apart) > 1 else float("nan")
    return Difference(apart.mean().item(), error, len(apart))


def _lm_eval() -> tuple[type[Harness], Any]:
    try:
        from lm_eval.evaluator import evaluate
    except ImportError as error:
        raise Ar2DiffError(
            f"tasks are run by lm-eval, which cannot be imported ({first_line(error)})",
            "pip install 'ar2diff[eval]'",
        ) from error
    from .harness import Harness

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return Harness, evaluate


def load_tasks(names: Sequence[str], include_path: str | Path | None) -> Any:
    """The tasks of the given names, as the harness loads them. Its own index of thousands of files
    is read only if a name is in no other place."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise Ar2DiffError(
            f"{option('include_path')} {shortened(str(include_path))} is not a folder",
            "name the folder that contains the YAML files of your tasks",
        )
    places = [str(place) for place in (TASKS, include_path) if place is not None]
    manager = TaskManager(include_path=places, include_defaults=False)
    if not {*names} <= {*manager.all_tasks}:
        manager = TaskManager(include_path=places)
    for name in names:
        if name not in manager.all_tasks:
            raise Ar2DiffError(
                f"{option('tasks')} {shortened(name)} is not a task"
                f"{nearest(name, manager.all_tasks)}",
                f"use {', '.join(shipped_tasks())}, or a task of lm-eval "
                "('python -m ar2diff.lm_eval ls tasks')",
            )
    try:
        return manager.load([*names])
    except Ar2DiffError:
        raise
    except Exception as error:  # whatever loads the data set of a task may raise
        raise Ar2DiffError(
            f"the data of {option('tasks')} {', '.join(names)} cannot be loaded "
            f"({first_line(error)})",
            "check the network connection, or use tasks whose data is on this machine: "
            + ", ".join(shipped_tasks()),
        ) from error


def _result(harness: Harness, task: str, results: dict[str, Any]) -> TaskResult:
    """One task of the harness's results."""
    rows = [_row(harness, sample) for sample in results["samples"][task]]
    found = results["results"][task]
    high = results["higher_is_better"][task]
    metrics = []
    for key, value in found.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr"):
            continue
        error = found.get(f"{name}_stderr,{kind}")
        of_kind = [row for row in rows if row["filter"] == kind]
        metrics.append(
            Metric(
                name, kind, float(value),
                float(error) if isinstance(error, int | float) else _ratio_error(name, of_kind),
                _bound_error(harness, name, of_kind),
                {True: "high", False: "low"}.get(high.get(name)),
                len(of_kind),
            )
        )  # fmt: skip
    bound = not harness.exact and any("bound_errors" in row for row in rows)
    setting = {**harness.settings, "mode": harness.options.mode}
    return TaskResult(task, setting, bound, tuple(metrics), tuple(rows))


def _row(harness: Harness, sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one document: JSON values, and those of the metrics."""
    arguments = [tuple(pair) for pair in sample["arguments"]]
    row = {
        "id": sample["doc_id"],
        "filter": sample["filter"],
        "target": sample["target"],
        "arguments": [list(pair) for pair in arguments],
        "answers": [answers[0] for answers in sample["resps"]],
        **{name: _plain(sample[name]) for name in sample["metrics"]},
    }
    written = any(isinstance(part, dict) for pair in arguments for part in pair)
    estimates = [] if written else [harness.bounds[p] for p in arguments if p in harness.bounds]
    if estimates:
        row["bound_errors"] = [estimate.error * estimate.tokens.item() for estimate in estimates]
    return row


def _plain(value: Any) -> Any:
    """A metric's value without types of numpy."""
    return value.item() if hasattr(value, "item") else value


def _bound_error(harness: Harness, metric: str, rows: Sequence[dict[str, Any]]) -> float | None:
    """The standard error of a metric due to the noise draws of bounds alone: of an accuracy, by how
    likely other draws are to change which choice is the best; of a perplexity, by the errors of the
    texts. None if the metric is neither, or nothing was drawn."""
    if not rows or any("bound_errors" not in row for row in rows):
        return None
    if metric in CHOICE and all(isinstance(row["target"], int) for row in rows):
        chances = [_chance(harness, row, CHOICE[metric]) for row in rows]
        return sqrt(sum(chance * (1 - chance) for chance in chances)) / len(rows)
    if metric in ROLLING:
        nats = sqrt(sum(row["bound_errors"][0] ** 2 for row in rows))
        return nats * _slope(metric, rows)
    return None


def _ratio_error(metric: str, rows: Sequence[dict[str, Any]]) -> float | None:
    """The standard error, due to the choice of texts, of a perplexity, for which the harness has
    none: that of a ratio of sums. None for another metric."""
    if metric not in ROLLING or len(rows) < 2:
        return None
    nats, sizes = (sum(row[metric][part] for row in rows) for part in (0, 1))
    apart = [row[metric][0] - nats / sizes * row[metric][1] for row in rows]
    spread = sum(value**2 for value in apart) * len(rows) / (len(rows) - 1)
    return sqrt(spread) * _slope(metric, rows)


def _slope(metric: str, rows: Sequence[dict[str, Any]]) -> float:
    """How much a perplexity moves for a nat in the sum over all texts."""
    nats, sizes = (sum(row[metric][part] for row in rows) for part in (0, 1))
    return (1 / log(2) if metric == "bits_per_byte" else exp(-nats / sizes)) / sizes


def _chance(harness: Harness, row: dict[str, Any], size: Callable[[str], int]) -> float:
    """How likely the right choice of a document is to come out best with other noise draws, by its
    closest rival. Choices share their draws, so the error is that of their difference."""
    pairs = [tuple(pair) for pair in row["arguments"]]
    right = pairs[row["target"]]
    closest = inf
    for pair in pairs:
        if pair != right:
            estimates = harness.bounds[pair], harness.bounds[right]
            apart, error = difference_of(*estimates, size(pair[1].strip()), size(right[1].strip()))
            closest = min(closest, apart / error if error else copysign(inf, apart))
    return 0.5 * (1 + erf(closest / sqrt(2)))
