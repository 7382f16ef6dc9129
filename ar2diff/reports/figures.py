"""`report.json`: the figures of a report, and the rules that make one honest.

Every figure says what was measured, of whom, at which setting and with which error. A report with
figures that would mislead is neither written nor read (see `lies`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ..checkpoint.output import write_json
from ..config.safe_json import parse_json
from ..core.conflicts import CONSTRAINTS
from ..core.errors import Ar2DiffError, first_line

FORMAT = 1
FILE = "report.json"
PNG = "data:image/png;base64,"
MOST_PICTURE = 200_000  # characters of a picture in a report
MOST_PICTURES, MOST_SEEN = 4, 16  # in a question, and questions with pictures
STOCK = "transformers.GenerationMixin.generate"  # what a base is timed with
OWN = "ar2diff.core.generate.generate"  # what everything else is timed with
# Settings of the stock `generate`: the baseline, its cheap rival, and drawn texts that are ranked.
AR = "ar"
BASELINE, LOOKUP, RANKED = STOCK_SETTINGS = "transformers", "prompt lookup", "ranked draws"
# The diffusion mode that decides the surest token of each forward alone: the setting at which
# papers like to quote quality, beside the speed of another one.
TOKEN_BY_TOKEN = "diffusion token by token"

Question = Literal["speed", "quality", "length", "control"]
QUESTIONS: tuple[Question, ...] = ("speed", "quality", "length", "control")
Better = Literal["high", "low"]

# {question: {metric: (unit, which is better)}}; tasks of the harness are called `task:NAME`.
METRICS: dict[str, dict[str, tuple[str, Better | None]]] = {
    "speed": {
        "tokens_per_second": ("tokens/s", "high"),
        "tokens_per_forward": ("tokens/forward", "high"),
        "seconds_to_first_text": ("s", "low"),
        "seconds_per_token_p50": ("s", "low"),  # of one answer after its first text; batch 1
        "seconds_per_token_p95": ("s", "low"),
        "p_cache": ("tokens/row", "high"),  # generated tokens per token row after the prefill
        "peak_bytes": ("bytes", "low"),
        "acceptance": ("%", "high"),  # of drafts, at slot 1, 2, ...
    },
    "quality": {
        "bound": ("nats/token", "low"),
        "ar_nll": ("nats/token", "low"),
        "bits_per_byte": ("bits/byte", "low"),  # of the AR NLL
        "bound_bits_per_byte": ("bits/byte", "low"),
        "exact_match": ("%", "high"),
        "base_nll": ("nats/token", "low"),  # of free text, under the base
        "entropy": ("nats", None),  # of the tokens in a text
        "distinct_2": ("%", "high"),  # different pairs of tokens among those of a text
        "repeated_4grams": ("%", "low"),  # 4-grams of a text that it has written before
        "same_as_ar": ("%", "high"),  # texts that are those of the model's AR mode
    },
    "length": {
        "seconds_per_token": ("s", "low"),
        "peak_bytes": ("bytes", "low"),
        "bound": ("nats/token", "low"),  # at positions
        "ar_nll": ("nats/token", "low"),
        "base_nll": ("nats/token", "low"),
        "repeated_4grams": ("%", "low"),
        "stopped": ("%", None),  # answers that ended by themselves within the limit
        "answer_tokens": ("tokens", None),
    },
    "control": {
        "infill_exact_match": ("%", "high"),
        "infill_base_nll": ("nats/token", "low"),  # of the filled text and what follows
        "infill_ar_nll": ("nats/token", "low"),  # of the true middle, given what precedes it
        "infill_bound": ("nats/token", "low"),  # of the true middle, given both sides
        "forced_kept": ("%", "high"),
        "revision_exact_match": ("%", "high"),
        "revision_forwards": ("forwards", "low"),
        # of gaps that must match a constraint, and of the texts around them
        "constrained_matches": ("%", "high"),
        "constrained_exact_match": ("%", "high"),
        "constrained_base_nll": ("nats/token", "low"),  # of the gap and what follows
        "constrained_forwards": ("forwards", "low"),  # for a gap
        "constrained_seconds": ("s", "low"),
    },
}  # fmt: skip
NO_ERROR = ("peak_bytes",)  # metrics that are counted, not sampled
EXACT = (
    "ar_nll", "bits_per_byte", "base_nll", "infill_ar_nll", "infill_base_nll",
    "constrained_base_nll",
)  # fmt: skip
# Arguments that say how long an answer may be. All others make up a setting.
SAMPLING = ("do_sample", "top_k", "seed")  # that go with the temperature in `at`
LENGTHS = ("max_new_tokens", "min_new_tokens", "eos_token_id", "stop_strings", "suppress_tokens")


class Row(BaseModel):
    """A mapping in the file: unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Subject(Row):
    """Somebody who is measured.

    Attributes:
        kind: `ar` is a model that is not converted, `draft` one with a draft adapter.
        parameters: number of them. block_length, trained_length, context: in tokens.
    """

    name: str
    kind: Literal["conversion", "draft", "ar"]
    parameters: int
    block_length: int | None = None
    trained_length: int | None = None
    context: int | None = None


class Difference(Row):
    """A figure minus that of another subject, from pairs.

    Attributes:
        to, setting: with whom it is compared, and at which setting.
        ratio: `value` is the quotient instead, where 1 means none.
    """

    to: str
    setting: str | None = None
    value: FiniteFloat
    error: FiniteFloat = Field(ge=0)
    ratio: bool = False


class Figure(Row):
    """A measured value.

    Attributes:
        metric: of `METRICS`, or `task:NAME`. unit: of the value.
        subject: a key of the report's subjects. setting: one of its settings; None if the model
            was scored and did not write.
        at: where on the axes: `{"batch": 8}`, `{"prompt": 64, "answer": 128}`,
            `{"temperature": 0.8}`, `{"position": 96}`, `{"slot": 3}`, `{"constraint": "regex"}`.
        error: standard error; None for what is counted.
        n: rows, questions or repeats behind the value.
        evidence: what a reader needs to repeat it; of text that was written, `callable`,
            `arguments`, `dtype`, `threads`, `forwards`, `tokens`, and `steps`, the tokens of the
            longest answer of each batch.
    """

    question: Question
    metric: str
    unit: str
    subject: str
    setting: str | None = None
    at: dict[str, int | float | str] = Field(default_factory=dict)
    value: FiniteFloat
    error: FiniteFloat | None = Field(default=None, ge=0)
    n: int = Field(ge=1)
    difference: Difference | None = None
    better: Better | None = None
    evidence: dict[str, Any] = Field(default_factory=dict)

    def __str__(self) -> str:
        at = "".join(f", {name} {value}" for name, value in self.at.items())
        setting = "" if self.setting is None else f", {self.setting}"
        return f"{self.question}: {self.metric} of {self.subject}{setting}{at}"


class Text(Row):
    """What a subject wrote after a prompt, to be read beside the others."""

    question: Question
    prompt: str
    subject: str
    setting: str
    text: str


class Order(Row):
    """When each token of an answer was decided: the forward, from 1, and how probable it was."""

    prompt: str
    tokens: list[str]
    forward: list[int]
    confidence: list[float]


class Picture(Row):
    """A small copy of an image.

    Attributes:
        data: it, as a data URI of a PNG. width, height: pixels of the image itself.
    """

    data: str = Field(max_length=MOST_PICTURE, pattern=rf"^{PNG}[A-Za-z0-9+/]+={{0,2}}$")
    width: int = Field(gt=0)
    height: int = Field(gt=0)


class Reply(Row):
    """What a subject answered to a question about images."""

    subject: str
    setting: str
    text: str
    right: bool
    tokens: int = Field(ge=0)
    forwards: int = Field(ge=0)


class Seen(Row):
    """A question about images, the answer of the data, and what was answered."""

    question: Question
    prompt: str
    answer: str
    pictures: list[Picture] = Field(max_length=MOST_PICTURES)
    replies: list[Reply]


class Missing(Row):
    """What was not measured, and why."""

    question: Question
    what: str
    why: str


class Report(Row):
    """All that was measured.

    Attributes:
        subjects: `model`, and maybe `base`, `control`, `against 1`, ...; the order is the page's.
        settings: the options of each setting, by name.
        protocol: `command`, `hardware`, `versions`, `threads`, `dtype`, `seed`, `data`, `when`,
            `seconds`, and `callable`, by setting.
    """

    format: Literal[1] = FORMAT
    title: str
    quick: bool
    subjects: dict[str, Subject]
    figures: list[Figure] = Field(default_factory=list)
    texts: list[Text] = Field(default_factory=list)
    orders: list[Order] = Field(default_factory=list)
    seen: list[Seen] = Field(default_factory=list, max_length=MOST_SEEN)
    missing: list[Missing] = Field(default_factory=list)
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    protocol: dict[str, Any] = Field(default_factory=dict)

    def of(self, question: str, metric: str, **where: Any) -> list[Figure]:
        """The figures of a metric, of which `where` names a subject, a setting or a place."""
        return [
            figure
            for figure in self.figures
            if (figure.question, figure.metric) == (question, metric)
            and all(_value_of(figure, name) == value for name, value in where.items())
        ]


def _value_of(figure: Figure, name: str) -> Any:
    return getattr(figure, name) if name in ("subject", "setting") else figure.at.get(name)


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.json` into a folder; never half of it.

    Raises:
        Ar2DiffError: a figure would mislead, or the disk refuses.
    """
    check(report, "the report")
    path = folder / FILE
    write_json(path, report.model_dump(mode="json"))
    return path


def read_report(path: Path) -> Report:
    """The report in a file, or in a folder that holds one.

    Raises:
        Ar2DiffError: there is none, it is damaged, or a figure would mislead.
    """
    path = path / FILE if path.is_dir() else path
    again = "make it again with 'ar2diff report'"
    try:
        report = Report.model_validate(parse_json(path.read_bytes(), constants=False))
    except OSError as error:
        raise Ar2DiffError(f"{path}: {error.strerror or error}", again) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Ar2DiffError(f"{path}: {where}: {first['msg']}", again) from error
    except ValueError as error:
        raise Ar2DiffError(f"{path} is not JSON: {first_line(error)}", again) from error
    check(report, str(path))
    return report


def check(report: Report, name: str) -> None:
    """Refuse a report with figures that would mislead.

    Raises:
        Ar2DiffError: for the first of them.
    """
    for lie in lies(report):
        raise Ar2DiffError(f"{name}: {lie}", "measure it again with 'ar2diff report'")


def lies(report: Report) -> Iterator[str]:
    """What is wrong with the figures of a report: a value without an error, a baseline that is not
    what users run, a bound that passes for a likelihood, a setting that means one thing where
    speed is measured and another where quality is, or a constraint that not all were held to."""
    dtypes: dict[tuple[str, str], Any] = {}
    held: dict[Any, Any] = {}
    for figure in report.figures:
        yield from (f"{figure}: {what}" for what in _wrong(figure, report))
        if figure.setting is not None and "dtype" in figure.evidence:
            dtype = figure.evidence["dtype"]
            if dtypes.setdefault((figure.subject, figure.setting), dtype) != dtype:
                yield f"{figure}: the number type is not that of the other figures of the setting"
        name, own = figure.at.get("constraint"), _constraint(figure)
        said = name is not None, figure.metric.startswith("constrained_")
        if said != (bool(own), bool(own)):
            yield f"{figure}: what it was held to is not what it says"
        elif own and held.setdefault(name, own) != own:
            yield f"{figure}: it was held to another constraint than the other figures"
    replies = [reply for seen in report.seen for reply in seen.replies]
    for text in [*report.texts, *replies]:
        if text.subject not in report.subjects or text.setting not in report.settings:
            yield f"a text of {text.subject}, {text.setting}, which the report does not describe"


def _constraint(figure: Figure) -> dict[str, Any]:
    arguments = figure.evidence.get("arguments", {})
    return {name: arguments[name] for name in CONSTRAINTS if name in arguments}


def _wrong(figure: Figure, report: Report) -> Iterator[str]:
    known = METRICS[figure.question].get(figure.metric)
    if known is None and not figure.metric.startswith("task:"):
        yield "this is not a metric"
    elif known is not None and known != (figure.unit, figure.better):
        yield f"its unit is {known[0]}, and better is {known[1]}"
    if figure.subject not in report.subjects:
        yield "the report has no such subject"
    if figure.error is None and figure.metric not in NO_ERROR:
        yield "it has no standard error"
    yield from _wrong_estimator(figure)
    yield from _wrong_setting(figure, report)
    yield from _wrong_difference(figure, report)


def _wrong_estimator(figure: Figure) -> Iterator[str]:
    """Bounds are called bounds."""
    bound = figure.evidence.get("estimator") == "bound"
    if bound != ("bound" in figure.metric):
        yield "a bound must be called one, and nothing else may be"
    elif figure.metric in EXACT and figure.evidence.get("estimator") != "exact":
        yield "its evidence does not say that it is exact"


def _wrong_setting(figure: Figure, report: Report) -> Iterator[str]:
    if figure.setting is None:
        if figure.question == "speed":
            yield "it has no setting"
        return
    if figure.setting not in report.settings:
        yield "the report does not describe its setting"
        return
    missing = {"callable", "arguments", "dtype", "threads", "forwards"} - figure.evidence.keys()
    if missing:
        yield f"its evidence lacks {', '.join(sorted(missing))}"
        return
    used, stated = figure.evidence["arguments"], report.settings[figure.setting]
    free = {*LENGTHS, *figure.at, *(SAMPLING if "temperature" in figure.at else ())}
    free |= {*CONSTRAINTS} if "constraint" in figure.at else set()
    for name in sorted((used.keys() | stated.keys()) - free):
        if used.get(name) != stated.get(name):
            yield f"{name} is {used.get(name)}, but {stated.get(name)} in its setting"
    if figure.evidence["callable"] != (STOCK if figure.setting in STOCK_SETTINGS else OWN):
        yield f"it was measured with {figure.evidence['callable']}"
    if figure.setting == BASELINE:
        yield from _wrong_baseline(figure.evidence)
    if (figure.setting, figure.metric) == (TOKEN_BY_TOKEN, "tokens_per_forward"):
        if figure.value > 1:
            yield "more than one token is decided in a forward"


def _wrong_baseline(evidence: dict[str, Any]) -> Iterator[str]:
    """The baseline is the stock `generate` with its cache: one forward for each token."""
    arguments = evidence["arguments"]
    if arguments.get("use_cache") is not True:
        yield "the baseline does not use its cache"
    if any("lookup" in name or "assistant" in name for name in arguments):
        yield "the baseline drafts"
    if evidence["forwards"] != evidence.get("steps"):
        yield (
            f"the baseline took {evidence['forwards']} forwards for {evidence.get('steps')} tokens"
        )


def _wrong_difference(figure: Figure, report: Report) -> Iterator[str]:
    apart = figure.difference
    if apart is None:
        return
    if apart.to not in report.subjects:
        yield f"it is compared with {apart.to}, which the report does not have"
    elif apart.ratio and not report.of(
        figure.question, figure.metric, subject=apart.to, setting=apart.setting, **figure.at
    ):
        yield f"what it is compared with ({apart.to}, {apart.setting}) is not in the report"
    if figure.question == "speed" and apart.to == "base" and apart.setting != BASELINE:
        yield f"speed is compared with {apart.setting} of the base, not with {BASELINE}"
