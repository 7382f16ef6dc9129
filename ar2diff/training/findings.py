"""What the logs of a run say that a person should act on. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# An AR NLL of so many times the base's, and so many nats more, is worth a warning.
WORSE, LEAST = 1.05, 0.01
SLOW = 1.2  # tokens per forward below which drafting hardly pays
ALIKE = 0.9  # share of groups without a difference in reward
MANY = 0.1  # share of conversations that are too long
Rows = Sequence[dict[str, Any]]


def reached(rows: Rows, names: Sequence[str] = ()) -> tuple[dict[str, float], dict[str, float]]:
    """What was reached before and after training, by the names of the logs: the first and last
    evaluations where there are any, else the means of the first and last tenth of the logs.

    Args:
        rows: lines of the metrics. names: of the logs to average where nothing was evaluated.
    """
    judged = [row for row in rows if any(name.startswith("eval_") for name in row)]
    if judged:
        first, last = (
            {n: v for n, v in row.items() if n.startswith(("eval_", "base_")) and v is not None}
            for row in (judged[0], judged[-1])
        )
        return (first if judged[0]["step"] == 0 else {}), last
    logs = [row for row in rows if any(name in row for name in names)]
    part = max(1, len(logs) // 10)
    return _means(logs[:part], names), _means(logs[-part:], names)


def findings(verb: str, rows: Rows, settled: bool, **facts: Any) -> dict[str, str]:
    """What a person should act on, a sentence by a short name for each.

    Args:
        rows: lines of the metrics so far. settled: whether the run is over; before that, only what
            at least three logs show.
        facts: what the verb's trainer knows of the data (`answers`), and `max_length`.
    """
    found: dict[str, str] = {}
    bad = next((row for row in rows if "loss" in row and row["loss"] is None), None)
    if bad is not None:
        found["nan"] = (
            f"the loss was no longer a number at step {bad['step']}; lower train.learning_rate"
        )
    if verb == "rl":
        judged = [row for row in rows if row.get("reward") is not None]
        found |= _of_rewards(judged, 1 if settled else 3)
    if verb == "sft" and facts:
        found |= _of_answers(**facts)
    before, after = reached(rows)
    if settled and after:
        found |= _of_likelihood(before, after)
        rate = after.get("eval_tokens_per_forward")
        if rate is not None and rate < SLOW:
            found["slow"] = (
                f"with {rate:.2f} tokens per forward, drafting will hardly be faster; train on "
                "more tokens, or raise draft.rank"
            )
    return found


def _of_likelihood(before: dict[str, float], after: dict[str, float]) -> dict[str, str]:
    found = {}
    bound, start = after.get("eval_bound"), before.get("eval_bound")
    if bound is not None and start is not None and bound >= start:
        found["bound"] = (
            f"the bound on held-out rows has not improved ({start:.3f} to {bound:.3f}); train for "
            "more steps, or change train.learning_rate"
        )
    nll, base = after.get("eval_ar_nll"), before.get("eval_ar_nll")
    if nll is not None and base is not None and nll > max(WORSE * base, base + LEAST):
        who, weight = "the AR mode has become worse than that of", "raise objective.ar_weight, or "
        if bound is None:  # an AR control, which has no other loss
            who, weight = "the model has become worse than", ""
        found["ar"] = (
            f"{who} the base (NLL {base:.3f} to {nll:.3f}); {weight}lower train.learning_rate"
        )
    return found


def _of_answers(answers: dict[str, Any], conversations: int, max_length: int) -> dict[str, str]:
    found, cut = {}, answers["rows_over_max_length"]
    if cut >= MANY * conversations:
        found["cut"] = (
            f"{cut:,} of {conversations:,} conversations are longer than data.max_length "
            f"{max_length}, and what is beyond it was not learned; raise it"
        )
    if unended := answers["turns"] - answers["ended"]:
        found["unended"] = (
            f"{unended:,} of {answers['turns']:,} answers have no end token, so the model may not "
            "stop; raise data.max_length, or check the chat template"
        )
    return found


def _of_rewards(rows: Rows, least: int) -> dict[str, str]:
    if len(rows) < least:
        return {}
    found, last = {}, rows[-1]["step"]
    fired = any(row["reward"] or row.get("reward_std") for row in rows)
    alike = [row["frac_reward_zero_std"] for row in rows if "frac_reward_zero_std" in row]
    recent = alike[-max(least, len(alike) // 4) :]
    if not fired:
        found["no reward"] = (
            f"no completion has earned a reward in {last:,} steps, so nothing is learned; use "
            "easier prompts, a reward that gives partial credit, or sft first"
        )
    elif recent and sum(recent) >= ALIKE * len(recent):
        found["alike"] = (
            f"in {sum(recent) / len(recent):.0%} of the groups all completions earn the same, so "
            "little is learned; raise rl.num_generations or the temperature in rl.sampler, or use "
            "prompts of another difficulty"
        )
    stops = [row["stop_rate"] for row in rows if "stop_rate" in row]
    if stops and not any(stops):
        found["never stops"] = (
            f"no completion has ended by itself in {last:,} steps; raise "
            "rl.max_completion_length, or tune with sft first"
        )
    elif len(stops) > 1 and stops[-1] < stops[0] / 2:
        found["stops less"] = (
            f"the share of completions that end by themselves fell from {stops[0]:.0%} to "
            f"{stops[-1]:.0%}; set rl.beta above 0, or lower train.learning_rate"
        )
    return found


def _means(rows: Rows, names: Sequence[str]) -> dict[str, float]:
    found = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found
