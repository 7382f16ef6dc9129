"""Output folders: who may write one, what stays, what goes, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from ar2diff.checkpoint.output import (
    check_output,
    claimed,
    finished_record,
    recorded_files,
    run_record,
)
from ar2diff.config.recipe import load_recipe
from ar2diff.core.errors import Ar2DiffError
from ar2diff.training.adapt import AdaptTrainer, adapt


def write(folder: Path, text: str, *names: str, **flags: bool) -> None:
    """Write a model of config.json, weights and other files that all hold `text`."""
    with claimed(folder, **flags) as output, output.staged({"made": text}) as stage:
        for name in ("config.json", "model.safetensors", *names):
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(text)


def held(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file.read_bytes().decode(errors="replace")
        for file in folder.rglob("*")
        if file.is_file() and file.name != "ar2diff.json"
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def old(folder):
    """A folder with a model of ours and two files of the user's."""
    write(folder, "old", "tokenizer.json", "custom_generate/old.py")
    (folder / "my.safetensors").write_text("mine")
    (folder / "custom_generate" / "mine.py").write_text("mine")
    return folder


MINE = {"my.safetensors": "mine", "custom_generate/mine.py": "mine"}
NEW = {"config.json": "new", "model.safetensors": "new", "custom_generate/new.py": "new"}


def test_a_folder_holds_the_model_and_the_list_of_its_files_and_nothing_else(folder):
    write(folder, "new", "custom_generate/new.py")
    assert held(folder) == NEW
    record = json.loads((folder / "ar2diff.json").read_text())
    assert record == {"made": "new", "files": sorted([*NEW, "ar2diff.json"])}


def test_overwriting_replaces_recorded_files_and_leaves_all_others(old):
    write(old, "new", "custom_generate/new.py", overwrite=True)
    assert held(old) == NEW | MINE
    assert recorded_files(old) == sorted([*NEW, "ar2diff.json"])


def test_a_verb_that_fails_leaves_the_old_model(old):
    before = held(old)
    with pytest.raises(RuntimeError), claimed(old, overwrite=True) as output:
        output.begin_run({"made": "new"})
        assert held(old).items() >= before.items()
        with output.staged({}) as stage:
            (stage / "config.json").write_text("new")
            raise RuntimeError
    assert held(old) == before
    assert finished_record(old) == {"made": "old"}


def test_a_verb_that_fails_in_a_new_folder_leaves_none(folder):
    with pytest.raises(RuntimeError), claimed(folder) as output:
        output.begin_run({})
        raise RuntimeError
    assert not folder.exists()


@pytest.mark.parametrize("name", ["checkpoints", "custom_generate", "tokenizer.json"])
def test_a_link_is_neither_followed_nor_deleted(old, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    if (old / name).is_dir():
        (old / name).rename(tmp_path / "away")
    (old / name).unlink(missing_ok=True)
    (old / name).symlink_to(outside)
    before = held(old)
    with pytest.raises(
        Ar2DiffError, match=f"{name} is a symbolic link, but ar2diff would have to write there"
    ):
        write(old, "new", overwrite=True)
    assert (held(old), held(outside)) == (before, {"precious": "mine"})
    assert (old / name).is_symlink()


def test_a_link_that_is_not_in_the_way_stays(old, tmp_path):
    (tmp_path / "outside").write_text("mine")
    (old / "tokenizer_x").symlink_to(tmp_path / "outside")
    write(old, "new", overwrite=True)
    assert (old / "tokenizer_x").read_text() == "mine"


def test_a_recorded_file_that_became_a_link_is_left_alone(old, tmp_path):
    """No name that is to be written, so it is not in the way."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    record = json.loads((old / "ar2diff.json").read_text())
    record["files"] += ["linked/file", "link"]
    (old / "ar2diff.json").write_text(json.dumps(record))
    (old / "linked").symlink_to(tmp_path / "outside")
    (old / "link").symlink_to(tmp_path / "outside" / "file")
    write(old, "new", overwrite=True)
    assert (tmp_path / "outside" / "file").read_text() == "mine"
    assert (old / "link").is_symlink() and (old / "linked").is_symlink()


def test_a_file_of_the_users_that_is_in_the_way_is_named(old):
    (old / "chat_template.jinja").write_text("mine")
    before = held(old)
    with pytest.raises(Ar2DiffError, match=r"chat_template.jinja was not written by ar2diff"):
        check_output(old, overwrite=True)
    (old / "chat_template.jinja").rename(old / "vocabulary")
    before = held(old)
    with pytest.raises(Ar2DiffError, match="vocabulary was not written by ar2diff"):
        write(old, "new", "vocabulary", overwrite=True)
    assert held(old) == before


@pytest.mark.parametrize(
    "files",
    [None, "config.json", [1], ["../precious"], ["/etc/passwd"], ["a/../../b"], ["a\0b"], [""]],
    ids=str,
)
def test_a_folder_without_a_sound_list_is_not_overwritten(folder, files):
    folder.mkdir()
    (folder / "config.json").write_text("theirs")
    (folder / "ar2diff.json").write_text(json.dumps({"files": files} if files else {}))
    with pytest.raises(Ar2DiffError, match="did not write"):
        check_output(folder, overwrite=True)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "\ud800".encode(errors="surrogatepass")])
def test_a_damaged_record_is_no_record(folder, text):
    folder.mkdir()
    (folder / "ar2diff.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(Ar2DiffError, match="did not write"):
        check_output(folder, overwrite=True)


def test_a_complete_model_is_replaced_only_on_demand(old):
    with pytest.raises(Ar2DiffError, match="already holds a complete model"):
        check_output(old)
    check_output(old, overwrite=True)


# Runs


def test_a_run_keeps_the_old_model_until_its_own_is_complete(old):
    with pytest.raises(RuntimeError), claimed(old, overwrite=True) as output:
        output.begin_run({"made": "run"})
        (old / "checkpoints" / "checkpoint-1").mkdir()
        raise RuntimeError
    assert held(old)["model.safetensors"] == "old"
    assert run_record(old) == {"made": "run"}
    assert finished_record(old) is None
    with pytest.raises(Ar2DiffError, match="holds an unfinished run"):
        check_output(old)
    write(old, "run", resume=True)
    assert held(old) == {"config.json": "run", "model.safetensors": "run"} | MINE
    assert (old / "checkpoints" / "checkpoint-1").is_dir()  # resuming is over, the state stays
    assert finished_record(old) == {"made": "run"}


def test_a_run_that_is_alive_is_not_overwritten(tiny_checkpoint, old, write_jsonl, monkeypatch):
    rows = write_jsonl("rows.jsonl", [{"text": "the cat sat on the mat"}] * 4)
    settings = ["train.max_steps=1", "data.max_length=16", f"data.sources=[{rows}]"]
    recipe, step, refused = load_recipe(None, settings), AdaptTrainer.training_step, []

    def second_run(self, *args):
        assert held(old)["model.safetensors"] == "old"
        for flags in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(Ar2DiffError, match="another run is writing"):
                adapt(str(tiny_checkpoint), recipe, old, **flags)
            refused.append(flags)
        return step(self, *args)

    monkeypatch.setattr(AdaptTrainer, "training_step", second_run)
    adapt(str(tiny_checkpoint), recipe, old, overwrite=True)
    assert len(refused) == 2
    assert json.loads((old / "ar2diff.json").read_text())["steps"] == 1
    assert (old / "my.safetensors").read_text() == "mine"
    assert not (old / "checkpoints" / "ar2diff.json").exists()


def test_checkpoints_of_a_replaced_run_go_and_other_files_beside_them_stay(old):
    for name in ("checkpoint-1", "notes"):
        (old / "checkpoints" / name).mkdir(parents=True)
    write(old, "new", overwrite=True)
    assert [entry.name for entry in (old / "checkpoints").iterdir()] == ["notes"]


# Two at once


def in_a_child(work: object) -> int:
    """Run `work` in a forked process that ends without cleaning up."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def test_a_folder_that_is_being_written_is_refused_and_stays_as_it_is(old):
    with claimed(old, overwrite=True):
        for check in (check_output, lambda *args, **flags: write(old, "new", **flags)):
            with pytest.raises(Ar2DiffError, match="another run is writing") as error:
                check(old, overwrite=True)
            assert error.value.fix.startswith("wait until it has finished")
        assert (old / ".ar2diff.lock").exists()
    write(old, "new", overwrite=True)
    assert not (old / ".ar2diff.lock").exists()


def test_a_lock_dies_with_its_process(folder):
    read, written = os.pipe()

    def hold() -> None:
        with claimed(folder):
            os.write(written, b"!")
            signal.pause()

    pid = in_a_child(hold)
    os.read(read, 1)
    with pytest.raises(Ar2DiffError, match="another run is writing"):
        check_output(folder)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (folder / ".ar2diff.lock").exists()
    write(folder, "new")
    assert held(folder) == {"config.json": "new", "model.safetensors": "new"}


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(folder):
    """A worker of a data loader may outlive a parent that was killed."""
    (ready, is_ready), (end, ended) = os.pipe(), os.pipe()

    def hold() -> None:
        with claimed(folder):
            if os.fork():
                signal.pause()
            os.close(ended)
            os.write(is_ready, b"!")
            os.read(end, 1)
            os._exit(0)

    pid = in_a_child(hold)
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    write(folder, "new")  # while the child lives
    os.close(ended)


def test_a_forked_child_of_a_child_closes_nothing_of_its_own(folder):
    """The child gives the number of the lock that it closed to a file of its own."""
    with claimed(folder):
        child = os.fork()
        if not child:
            number, _ = os.pipe()
            grandchild = os.fork()
            if not grandchild:
                os.fstat(number)
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Kills

STEPS = [(Path, name) for name in ("replace", "mkdir", "chmod", "write_text")]
STEPS += [(os, "unlink"), (os, "rmdir")]  # those of `Path` and of `shutil.rmtree`


def killed_at(step: int, work: object) -> bool:
    """Kill a child just before its file operation number `step`; whether it came that far."""

    def doomed() -> None:
        left = iter(range(step))
        for owner, name in STEPS:
            plain = getattr(owner, name)

            def counted(*args, plain=plain, **kwargs):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*args, **kwargs)

            setattr(owner, name, counted)
        work()
        os._exit(0)

    return os.WIFSIGNALED(os.waitpid(in_a_child(doomed), 0)[1])


def test_the_same_command_succeeds_after_a_kill_at_any_moment(tmp_path):
    """Or the result is complete there, and that is said."""
    for step in range(1000):
        folder = tmp_path / str(step)
        if not killed_at(
            step, lambda folder=folder: write(folder, "new", "custom_generate/new.py")
        ):
            break
        try:
            write(folder, "new", "custom_generate/new.py")
        except Ar2DiffError as error:
            assert "already holds a complete model" in error.what
        assert held(folder).items() - {(".ar2diff.lock", "")} == NEW.items()
    assert step > 20


@pytest.mark.slow
def test_a_kill_at_any_moment_of_overwriting_leaves_a_whole_model_or_none(tmp_path):
    for step in range(1000):
        folder = tmp_path / str(step)
        write(folder, "old", "tokenizer.json", "custom_generate/old.py")
        (folder / "notes.txt").write_text("mine")

        def replace(folder=folder):
            write(folder, "new", "custom_generate/new.py", overwrite=True)

        if not killed_at(step, replace):
            break
        if (folder / "config.json").exists():
            whole = {name: text for name, text in held(folder).items() if name[0] != "."}
            assert {*whole.values()} in ({"old", "mine"}, {"new", "mine"})
        replace()
        assert held(folder) == NEW | {"notes.txt": "mine"}
    assert step > 25


@pytest.mark.slow
def test_a_run_killed_at_any_moment_of_its_end_can_be_resumed(tmp_path):
    for step in range(1000):
        folder = tmp_path / str(step)
        with pytest.raises(RuntimeError), claimed(folder) as output:
            output.begin_run({"made": "new"})
            (folder / "checkpoints" / "checkpoint-1").mkdir()
            raise RuntimeError
        if not killed_at(step, lambda folder=folder: write(folder, "new", resume=True)):
            break
        if finished_record(folder) is None:
            assert run_record(folder)["made"] == "new"
            write(folder, "new", resume=True)
        assert held(folder).items() >= {"config.json": "new", "model.safetensors": "new"}.items()
        assert (folder / "checkpoints" / "checkpoint-1").is_dir()
    assert step > 20


def test_a_run_killed_at_any_moment_of_making_way_leaves_a_folder_of_ours(tmp_path):
    """First a run is overwritten; then the new one fails before its first checkpoint, and is told
    to end as it tidies up."""

    def run(folder, saved, **flags):
        with suppress(RuntimeError), claimed(folder, **flags) as output:
            output.begin_run({"made": "run"})
            (folder / "log").mkdir()
            (folder / "log" / "metrics.jsonl").touch()
            (folder / "checkpoints" / saved).mkdir(parents=True)
            for name in "ab":
                (folder / "checkpoints" / saved / name).touch()
            raise RuntimeError

    for step in range(1000):
        folder = tmp_path / str(step)
        run(folder, "checkpoint-1")
        if not killed_at(
            step, lambda folder=folder: run(folder, ".partial/checkpoint-2", overwrite=True)
        ):
            break
        for saved in folder.glob("checkpoints/checkpoint-*"):
            assert {file.name for file in saved.iterdir()} == {*"ab"}
        write(folder, "new", overwrite=True)
        assert held(folder) == {"config.json": "new", "model.safetensors": "new"}
    assert step > 20


def test_the_folder_may_be_a_link(tmp_path, folder):
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    write(folder, "new")
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "new"
