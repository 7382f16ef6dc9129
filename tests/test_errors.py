"""Errors name options as the surface that the user sits at does."""

from __future__ import annotations

import pickle

import pytest
import typer
from ar2diff.cli.main import Verb

from ar2diff.core.errors import Ar2DiffError, nearest, option, shortened

ERROR = Ar2DiffError(
    f"{option('top_k')} is -1 and {option('data.max_length')} is 3",
    f"set {option('top_k', 5)} or {option('overwrite', True)}, see {option('model')}",
)


def test_python_names_keywords():
    assert (ERROR.what, ERROR.fix) == (
        "top_k is -1 and data.max_length is 3", "set top_k=5 or overwrite=True, see model"
    )  # fmt: skip
    assert str(ERROR) == f"{ERROR.what} (fix: {ERROR.fix})"
    assert ERROR.option == "top_k"
    assert Ar2DiffError("no option", "fix").option is None


def test_the_command_line_names_its_own_flags_and_leaves_recipe_keys_alone():
    app = typer.Typer()

    @app.command(cls=Verb)
    def verb(model: str, top_k: int = 1, overwrite: bool = typer.Option(False, "--overwrite")):
        raise ERROR

    with pytest.raises(Ar2DiffError) as caught:
        app(["m"], standalone_mode=False)
    assert caught.value.what == "--top-k is -1 and data.max_length is 3"
    assert caught.value.fix == "set --top-k 5 or --overwrite, see MODEL"


def test_a_recipe_names_the_section():
    within = ERROR.within("rl.sampler")
    assert within.option == "rl.sampler.top_k"
    assert within.fix.startswith("set rl.sampler.top_k=5")


def test_an_error_survives_a_process_and_a_subject_with_its_options():
    back = pickle.loads(pickle.dumps(ERROR)).about("row 3")
    assert back.named(lambda name, value: name.upper()).what.startswith("row 3: TOP_K is -1")


def test_text_of_the_user_is_never_taken_for_an_option():
    assert Ar2DiffError("{top_k} --top-k top_k %s", "{}").what == "{top_k} --top-k top_k %s"


def test_an_error_is_two_short_printable_lines_whatever_it_quotes():
    huge = Ar2DiffError("file " + "x" * 10**6 + " is bad", "a\x1b[2J\nb \udcff é")
    assert len(huge.what) <= 400 and huge.what.startswith("file x") and huge.what.endswith("is bad")
    assert huge.fix == "a\\x1b[2J\\nb \\udcff é"
    assert huge.about("row 3").what.startswith("row 3: file x")


@pytest.mark.parametrize(
    "value, shown",
    [
        ("abc", "'abc'"),
        ("x" * 10**6, f"'{'x' * 76}..."),
        ([1] * 10**5, f"[{'1, ' * 25}1..."),
        (10**5000, "an integer of 16610 bits"),
        ([10**5000], "a list"),
    ],
    ids=["text", "long text", "long list", "integer", "list of an integer"],
)
def test_a_quoted_value_is_cut(value, shown):
    assert shortened(value) == shown and len(shown) <= 80


def test_the_nearest_name_is_suggested_only_if_it_is_near():
    assert nearest("learning_rat", ["steps", "learning_rate"]) == "; did you mean learning_rate?"
    assert nearest("modle", ["rl.samples", "data.max_length"]) == ""
    assert nearest("x" * 10**6, ["steps"]) == ""
