"""The table of decoding speeds that the README and docs/results show, made from reports.

    python benchmarks/speed_table.py REPORT [REPORT ...]      folders of `ar2diff report`, or files

A row for each setting of each model: tokens per forward, the speed at the smallest batch and at a
batch of 8 as a multiple of the base's, and its text: right answers where there were questions, else
the NLL of greedy text under the base.
"""

from __future__ import annotations

import argparse
from pathlib import Path, PurePath

from ar2diff.reports.figures import BASELINE, Figure, Report, read_report
from ar2diff.reports.pairs import quality_at
from ar2diff.reports.words import quantity, with_error

SECOND = 8  # the other batch size, or the largest that was measured


def table(reports: list[Report]) -> list[str]:
    """The lines of the table.

    Args:
        reports: measured at the same batch sizes.
    """
    paces = reports[0].of("speed", "tokens_per_second", subject="model")
    sizes = sorted({figure.at["batch"] for figure in paces})
    batches = (sizes[0], SECOND if SECOND in sizes else sizes[-1])
    heads = ["model", "how it decodes", "tokens a forward"]
    heads += [*(f"batch {batch}" for batch in batches), "its text"]
    lines = [heads, ["---"] * len(heads)]
    for report in reports:
        for setting in dict.fromkeys(
            f.setting for f in report.of("speed", "tokens_per_second", subject="model")
        ):
            lines.append(row(report, setting, batches))
    return ["| " + " | ".join(line).replace("\u00a0", " ") + " |" for line in lines]


def row(report: Report, setting: str, batches: tuple[int, int]) -> list[str]:
    """A setting of a report's model."""
    name = PurePath(report.subjects["model"].name).name
    (forward,) = report.of(
        "speed", "tokens_per_forward", subject="model", setting=setting, batch=batches[0]
    ) or [None]
    return [
        name, setting, "–" if forward is None else f"{forward.value:.2f}",
        *(times(report, setting, batch) for batch in batches), text(report, setting),
    ]  # fmt: skip


def times(report: Report, setting: str, batch: int) -> str:
    """`1.67 ± 0.02x`: the speed as a multiple of that of transformers' `generate` on the base."""
    found = report.of("speed", "tokens_per_second", subject="model", setting=setting, batch=batch)
    if not found or found[0].difference is None:
        return "–"
    apart = found[0].difference
    return f"{with_error(apart.value, apart.error)}x"


def text(report: Report, setting: str) -> str:
    """How good its text is, and the base's."""
    right = quality_at(report, "exact_match", "model", setting)
    if right is not None:
        return f"{shown(right)} right{beside(quality_at(report, 'exact_match', 'base', BASELINE))}"
    greedy = {"temperature": 0.0}
    found = report.of("quality", "base_nll", subject="model", setting=setting, **greedy)
    base = report.of("quality", "base_nll", subject="base", setting=BASELINE, **greedy)
    if not found:
        verified = report.settings[setting].get("mode") == "speculative"
        return "that of the AR mode" if verified else "–"
    return f"{shown(found[0])} under the base{beside(base[0] if base else None)}"


def shown(figure: Figure) -> str:
    return quantity(figure.value, figure.error, figure.unit)


def beside(base: Figure | None) -> str:
    return "" if base is None else f" (base: {shown(base)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path)
    print("\n".join(table([read_report(path) for path in parser.parse_args().reports])))


if __name__ == "__main__":
    main()
