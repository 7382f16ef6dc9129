"""The sentences of a report: they follow the figures, their errors, and who is called the model."""

from __future__ import annotations

import re

import pytest
from reports import (
    BASE,
    BASELINE,
    CONTROL,
    LOOKUP,
    MODEL,
    apart,
    figure,
    plain,
    random_report,
    realistic,
    report,
    swapped,
    widened,
)

from ar2diff.reports.figures import QUESTIONS, TOKEN_BY_TOKEN, check
from ar2diff.reports.sentences import claims, not_measured
from ar2diff.reports.words import number, quantity

SEEDS = range(200)
OPPOSITE = {"better": "worse", "worse": "better", "none": "none"}
SAYS = {  # what a first sentence says of verdicts
    "speed": {"better": "x as fast", "worse": "slower", "none": "no faster"},
    "quality": {"better": "it is better", "worse": "it is worse", "none": "no difference"},
    "length": {"better": " pays off ", "worse": "slower", "none": "no faster"},
    "control": {"better": ": more than", "worse": ": fewer than", "none": "no difference"},
}


def verdicts(given, question):
    """The verdicts of a question, without the names of settings."""
    found = claims(given)[question].verdicts
    return {place.partition(",")[0]: verdict for place, verdict in found.items()}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_sentence_says_what_the_figures_say(question):
    for seed in SEEDS:
        given = random_report(seed)
        check(given, "it")
        claim = claims(given)[question]
        found = set(claim.verdicts.values())
        said = {verdict for verdict, words in SAYS[question].items() if words in claim.first}
        if question == "length":  # in words where nothing or everything pays off
            said -= {"better"} if "pays off at no length" in claim.first else set()
            said |= {"better"} if "is faster than" in claim.first else set()
        assert said == found, (seed, claim.first)


@pytest.mark.parametrize("question", QUESTIONS)
def test_swapping_base_and_model_flips_every_claim(question):
    seen = set()
    for seed in SEEDS:
        given = random_report(seed)
        turned = {place: OPPOSITE[v] for place, v in verdicts(given, question).items()}
        assert verdicts(swapped(given), question) == turned, seed
        seen |= set(turned.values())
        if set(turned.values()) != {"none"}:
            first = [claims(r)[question].first for r in (given, swapped(given))]
            assert first[0] != first[1], seed
    assert seen == set(OPPOSITE)


@pytest.mark.parametrize("question", ["speed", "length", "control"])
def test_each_side_is_taken_at_its_best_whoever_is_called_the_model(question):
    for seed in SEEDS:
        given = random_report(seed, settings=3)
        turned = {place: OPPOSITE[v] for place, v in verdicts(given, question).items()}
        assert verdicts(swapped(given), question) == turned, seed


@pytest.mark.parametrize("question", QUESTIONS)
def test_wide_errors_turn_every_claim_into_none(question):
    for seed in SEEDS:
        claim = claims(widened(random_report(seed), 1000))[question]
        assert set(claim.verdicts.values()) == {"none"}, (seed, claim.first)
        assert SAYS[question]["none"] in claim.first
        assert not [w for v, w in SAYS[question].items() if v != "none" and w in
                    claim.first.replace("pays off at no length", "")], claim.first  # fmt: skip


def test_the_sentences_of_a_report():
    said = {question: plain(claim.first) for question, claim in claims(realistic()).items()}
    assert said == {
        "speed": f"At equal exact match, {MODEL} is 1.8x as fast as {BASE} at batch 1, 1.5x at 4 "
        "and 1.07x at 8, and slower at 16 (0.96x).",
        "quality": f"Against {BASE}: in exact match and stories cloze, there is no difference with "
        "ar, lossless chain, diffusion 0.95, diffusion 0.9 and diffusion token by token (at most "
        "−1.4 ± 0.9 points and −1.5 ± 0.9 points), but it is worse with diffusion 0.7 "
        "(−7.1 ± 0.9 points and −8.0 ± 0.9 points).",
        "length": f"At equal exact match, {MODEL} pays off up to 288 tokens of prompt and answer "
        f"together; from 384 on it is slower than {BASE}.",
        "control": f"Given both sides, {MODEL} fills 41.5 ± 2.1 % of the gaps exactly: more than "
        f"{BASE} with ar (29.2 ± 2.0 %) and with transformers (11.2 ± 1.4 %).",
    }  # fmt: skip
    every = [text for claim in claims(realistic()).values() for text in (claim.first, *claim.more)]
    broken = re.compile(r"\d (±|%|tokens|points|nats)|± \d")  # a line could end there
    assert any("±" in text for text in every) and not list(filter(broken.search, every))
    more = claims(realistic())["quality"].more
    assert any("1.874" in line and "that is a bound, not a likelihood" in line for line in more)


def speeds(*rows, quality=()):
    """A report on speeds at batch 1: (subject, setting, tokens/s), with qualities of settings."""
    return report(
        [figure("speed", "tokens_per_second", value, 0.01 * value, who, setting, batch=1)
         for who, setting, value in rows]
        + [figure("quality", "exact_match", value, 1.0, who, setting)
           for who, setting, value in quality]
    )  # fmt: skip


def test_the_base_has_its_faster_way_too():
    rows = [("model", "ar", 900), ("base", BASELINE, 400), ("base", LOOKUP, 800)]
    quality = [("model", "ar", 40), ("base", BASELINE, 40)]
    claim = claims(speeds(*rows, quality=quality))["speed"]
    assert "is 1.1x as fast" in claim.first and "(ar against prompt lookup)" in claim.more[0]


def test_a_fast_setting_that_is_worse_does_not_lead():
    rows = [("model", "diffusion 0.7", 2000), ("model", "ar", 390), ("base", BASELINE, 400)]
    quality = [("model", "diffusion 0.7", 20), ("model", "ar", 40), ("base", BASELINE, 41)]
    claim = claims(speeds(*rows, quality=quality))["speed"]
    assert claim.first == f"At equal exact match, {MODEL} is no faster than {BASE} at batch 1."
    assert "Diffusion 0.7 is 5.0x as fast as transformers at batch 1, and costs" in claim.more[1]
    only = claims(speeds(rows[0], rows[2], quality=[quality[0], quality[2]]))["speed"]
    assert only.first.startswith(f"With no equal exact match at any setting, {MODEL} is 5.0x")


def test_drafts_that_are_verified_have_the_quality_of_the_text_that_they_write():
    rows = [("model", "lossless chain", 800), ("base", BASELINE, 400)]
    quality = [("model", "ar", 40), ("base", BASELINE, 41)]
    assert claims(speeds(*rows, quality=quality))["speed"].first.startswith("At equal exact match")
    unknown = claims(speeds(*rows))["speed"].first
    assert unknown.startswith("With its quality at these settings unmeasured")


def test_paired_differences_go_before_errors_of_single_values():
    rows = [
        figure("quality", "exact_match", 43.0, 5.0, setting="ar", difference=apart(3.0, 0.5)),
        figure("quality", "exact_match", 40.0, 5.0, "base", BASELINE),
    ]
    assert verdicts(report(rows), "quality") == {"exact_match": "better"}
    alone = [row.model_copy(update={"difference": None}) for row in rows]
    assert verdicts(report(alone), "quality") == {"exact_match": "none"}


def test_the_largest_gain_is_one_that_is_sure():
    rows = []
    for answer, value, error in ((32, 0.0010, 0.00001), (64, 0.0005, 0.0004)):
        at = {"prompt": 8, "answer": answer}
        rows.append(figure("length", "seconds_per_token", value, error, setting="ar", **at))
        rows.append(figure("length", "seconds_per_token", 0.0011, 1e-5, "base", BASELINE, **at))
    claim = claims(report(rows))["length"]
    first, most = plain(claim.first), plain(claim.more[0])
    assert "pays off up to 40 tokens of prompt and answer together; from 72 on" in first
    assert most.startswith("It gains most at 8 + 32 tokens")


def test_a_lower_likelihood_is_better_and_a_bound_is_called_one():
    rows = [figure("quality", "ar_nll", value, 0.001, who) for who, value in
            (("model", 1.5), ("base", 1.4))]  # fmt: skip
    rows.append(figure("quality", "bound", 1.3, 0.001))
    claim = claims(report(rows))["quality"]
    assert claim.verdicts == {"ar_nll": "worse"}
    assert plain(claim.first).endswith(
        f"predicts held-out text worse than {BASE}, by 0.1000 ± 0.0014 nats/token."
    )
    assert "is at most 1.3000 ± 0.0010 nats/token" in plain(claim.more[0])


def test_what_was_not_measured_is_listed_and_said():
    empty = report([])
    assert claims(empty)["speed"].first == "Speed was not measured."
    assert [item.question for item in not_measured(empty)] == list(QUESTIONS)
    without = empty.model_copy(update={"subjects": {"model": empty.subjects["model"]}})
    assert "the base" in [item.what for item in not_measured(without)]
    alone = speeds(("model", "ar", 900))
    assert "there is no base to compare it with" in claims(alone)["speed"].first
    assert [m.what for m in not_measured(realistic())] == [
        "batch 32 and 64", "gaps held to a JSON schema",
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "error", "shown"), [
    (812.34, 9.1, "812 ± 9"), (1.8765, 0.0213, "1.877 ± 0.021"), (0.9612, 0.0041, "0.961 ± 0.004"),
    (12345.6, 310, "12,346 ± 310"), (-7.13, 0.9, "−7.1 ± 0.9"), (3, None, "3"),
    (2.71828, None, "2.72"), (-0.01, 0.4, "0.0 ± 0.4"),
])  # fmt: skip
def test_numbers_have_the_digits_that_matter(value, error, shown):
    assert plain(quantity(value, error)) == shown


def test_units_are_those_that_numbers_can_be_read_in():
    assert plain(quantity(0.00234, 0.00001, "s")) == "2.340 ± 0.010 ms"
    assert quantity(31e6, None, "bytes") == "31\u00a0MB"
    assert re.fullmatch(r"\+1\.\d", number(1.0, 0.3, sign=True))


def test_quality_token_by_token_is_told_beside_the_speed_that_goes_with_it():
    def told(*figures):
        every = [f for f in figures if f]
        return [text for text in claims(report(every))["quality"].more if "Token by token" in text]

    def both(setting, right, error, pace):
        return (
            figure("quality", "exact_match", right, error, "model", setting),
            figure("speed", "tokens_per_second", pace, 10.0, "model", setting, batch=1),
        )

    slow, fast = both(TOKEN_BY_TOKEN, 55.0, 3.0, 310.0), both("diffusion 0.7", 34.0, 3.0, 1410.0)
    between = both("diffusion 0.9", 50.0, 3.0, 900.0)
    (said,) = told(*slow, *between, *fast)
    assert "55 ± 3 % at 310 ± 10 tokens/s" in plain(said)
    assert "with diffusion 0.7, it is 34 ± 3 % at 1,410 ± 10" in plain(said)
    assert not told(*slow, *both("diffusion 0.7", 50.0, 3.0, 1410.0))  # no difference
    assert not told(*slow) and not told(*fast, *between)


def test_free_text_is_judged_under_the_base_where_no_answer_can_be_right():
    def both(setting, pace, nats, who="model"):
        far = apart(nats - 0.5, 0.01) if who == "model" else None
        return (
            figure("speed", "tokens_per_second", pace, 1.0, who, setting, batch=1),
            figure("quality", "base_nll", nats, 0.05, who, setting, 5, far, temperature=0.0),
            figure("quality", "base_nll", 9.0, 0.05, who, setting, temperature=1.0),
        )

    rows = [*both(BASELINE, 100.0, 0.5, "base"), *both("ar", 120.0, 0.505),
            *both("diffusion 0.7", 400.0, 1.5)]  # fmt: skip
    found = claims(report(rows))
    assert found["speed"].first.startswith(f"At equal NLL of its text under the base, {MODEL}")
    assert found["speed"].verdicts == {"batch 1": "better"}
    assert "costs 1.000 ± 0.010 nats/token" in plain(found["speed"].more[1])
    assert found["quality"].verdicts == {
        "base_nll, ar": "none", "base_nll, diffusion 0.7": "worse",
    }  # fmt: skip
    right = [figure("quality", "exact_match", 40.0, 1.0, who, setting)
             for who, setting in (("model", "ar"), ("base", BASELINE))]  # fmt: skip
    assert "equal exact match" in claims(report([*rows, *right]))["speed"].first


def test_the_control_tells_what_the_conversion_did_apart_from_the_data():
    def said(change, error):
        rows = [figure("quality", "ar_nll", 1.4, 0.1, "base"),
                figure("quality", "ar_nll", 1.4 + change, 0.1,
                       difference=apart(change, error, None)),
                figure("quality", "ar_nll", 1.3, 0.1, "control",
                       difference=apart(-0.1, 0.003, None))]  # fmt: skip
        given = report(rows)
        control = given.subjects["base"].model_copy(update={"name": "tuned"})
        subjects = given.subjects | {"control": control}
        claim = claims(given.model_copy(update={"subjects": subjects}))["quality"]
        return [plain(text) for text in (claim.first, *claim.more) if "Beside tuned" in text]

    assert said(0.0, 0.004)[0].endswith("it is worse, by 0.100 ± 0.005 nats/token.")
    assert "there is no difference" in said(-0.1, 0.004)[0]
    assert "it is better, by 0.100" in said(-0.2, 0.004)[0]


def test_drafting_is_told_beside_the_ar_mode_that_writes_the_same():
    given = speeds(("base", BASELINE, 400), ("model", "ar", 400), ("model", "lossless", 600))
    (said,) = [text for text in claims(given)["speed"].more if "own AR mode" in text]
    assert plain(said).endswith("speed of its own AR mode: 1.500 ± 0.021 at batch 1.")
    alone = speeds(("base", BASELINE, 400), ("model", "lossless", 600))
    assert "own AR mode" not in " ".join(claims(alone)["speed"].more)


def test_another_conversion_is_compared_setting_by_setting():
    rows = [figure("quality", "exact_match", value, 1.0, who, setting)
            for who, setting, value in (("model", "ar", 60.0), ("model", "diffusion 0.7", 40.0),
                                        ("against 1", "ar", 60.0),
                                        ("against 1", "diffusion 0.7", 40.0))]  # fmt: skip
    given = report([])
    subjects = {"model": given.subjects["model"], "against 1": given.subjects["model"]}
    (said,) = claims(report(rows, subjects=subjects))["quality"].more
    assert "no difference with ar and diffusion 0.7" in said and "worse" not in said


def held(*rows, matches=100.0):
    """What is said of gaps held to a regex: (subject, setting, right, its error, difference)."""
    figures = [figure("control", "constrained_exact_match", right, error, who, setting, 200,
                      difference, constraint="regex")
               for who, setting, right, error, difference in rows]  # fmt: skip
    figures += [figure("control", "constrained_matches", matches if who == "base" else 100.0, 0.7,
                       who, setting, 200, constraint="regex")
                for who, setting, *_ in rows]  # fmt: skip
    check(report(figures), "it")
    return [plain(text) for text in claims(report(figures))["control"].more]


def test_gaps_that_must_match_are_told_beside_the_base_and_the_control():
    said = [plain(text) for text in claims(realistic())["control"].more if "eld to" in text]
    assert said == [
        "Held to a regex, it finds the right content of 38.0 ± 2.4 % of the gaps: no difference "
        f"from {BASE} with ranked ar (37.0 ± 2.4 %) and {CONTROL} with ar (33.0 ± 2.4 %), and more "
        f"than {BASE} with ar (31.0 ± 2.4 %). It takes 1.60 ± 0.10 forwards and 6.40 ± 0.20 ms for "
        f"a gap with diffusion 0.9; {BASE} takes 2.40 ± 0.10 forwards and 9.60 ± 0.20 ms for a gap "
        "with ar."
    ]


def test_a_gap_s_content_is_called_better_only_beyond_its_errors():
    theirs = ("base", "ar", 30.0, 3.0, None)
    for right, error, difference, words in (
        (40.0, 3.0, None, "more than"), (34.0, 3.0, None, "no difference from"),
        (20.0, 3.0, None, "fewer than"), (34.0, 3.0, apart(4.0, 1.0, "ar"), "more than"),
        (40.0, 3.0, apart(10.0, 6.0, "ar"), "no difference from"),
    ):  # fmt: skip
        (told, _) = held(("model", "diffusion 0.9", right, error, difference), theirs)
        assert f": {words} {BASE} with ar" in told, told


def test_gaps_that_do_not_match_are_told():
    rows = [("model", "diffusion 0.9", 40.0, 3.0, None), ("base", "ar", 30.0, 3.0, None)]
    assert held(*rows)[-1] == "All of these gaps match, whoever filled them."
    assert held(*rows, matches=99.0)[-1] == (
        f"Of the gaps that {BASE} filled with ar, held to a regex, only 99.0 ± 0.7 % match."
    )
