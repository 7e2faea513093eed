"""A kill before, inside and after every file operation of the checkpoint store, and of files that appear atomically.

Not by luck: the operations are counted, and a kill is injected at each of them in turn. What lies on the disk then must
hold a valid checkpoint, the newest complete one, for a fresh process, before and after it has cleaned up.
"""

import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import link_atomic, remove_asides, write_atomic
from ssm_train.record.checkpoint import Position, read_checkpoint
from ssm_train.record.store import CheckpointStore

from ..run_meta import META

NAMES = ("replace", "rename", "symlink", "unlink", "rmdir", "mkdir", "fsync")


class Killed(BaseException):
    """Passes everything that handles errors, as a kill does."""


class Kills:
    """Counts operations that change files, and dies at one of them: `at` 3k is before number k, 3k + 1 in the middle of
    it (half of a file is written; otherwise the same as before), 3k + 2 after it. The dead change nothing any more."""

    def __init__(self, at: float) -> None:
        self.at, self.count = at, 0

    def step(self, act: Callable, half: Callable = lambda: None) -> object:
        number, self.count = self.count, self.count + 1
        if self.at <= 3 * number + 1:
            if self.at == 3 * number + 1:
                half()
            raise Killed
        result = act()
        if self.at == 3 * number + 2:
            raise Killed
        return result


class File:
    """A file opened for writing, of which every write counts."""

    def __init__(self, file, kills: Kills) -> None:
        self._file, self._kills = file, kills

    def write(self, data) -> object:
        return self._kills.step(lambda: self._file.write(data), lambda: self._file.write(data[: len(data) // 2]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


@contextmanager
def kills(at: float) -> Iterator[Kills]:
    """Inside, the process dies at operation `at`."""
    counter = Kills(at)
    originals = {name: getattr(os, name) for name in NAMES}
    original_open = builtins.open

    def counted(act):
        return lambda *args, **options: counter.step(lambda: act(*args, **options))

    def counted_open(file, mode="r", *args, **options):
        if mode[0] == "r":
            return original_open(file, mode, *args, **options)
        return File(counter.step(lambda: original_open(file, mode, *args, **options)), counter)

    with pytest.MonkeyPatch.context() as patch:
        for name, act in originals.items():
            # a synchronisation changes nothing that a kill would show, and takes long
            patch.setattr(os, name, counted((lambda *_: None) if name == "fsync" else act))
        patch.setattr(builtins, "open", counted_open)
        with suppress(Killed):
            yield counter


def operations(work: Callable[[], object]) -> int:
    """How many there are."""
    with kills(float("inf")) as counter:
        work()
    return counter.count


def snapshot(folder: Path) -> tuple:
    """All that lies there: two equal ones need only one look."""
    kinds = ((path, os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()) for path in
             sorted(folder.rglob("*")))  # fmt: skip
    return tuple((str(path.relative_to(folder)), what) for path, what in kinds)


def states_after_kills(work: Callable[[Path], object], start: Path, folder: Path) -> Iterator[Path]:
    """`folder` as copy of `start`, in every different state that a kill during `work(folder)` can leave."""

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder, symlinks=True)

    fresh()
    seen = set()
    for at in range(3 * operations(lambda: work(folder)) + 1):
        fresh()
        with kills(at):
            work(folder)
        state = snapshot(folder)
        if state not in seen:
            seen.add(state)
            yield folder


def save(folder: Path, position: Position, value: float) -> None:
    """A checkpoint whose content is `value`."""
    weights = {"weight": torch.full((3,), value)}
    CheckpointStore(folder, 2).save(position, model=weights, ema=weights, train_state={"value": value}, meta=META)


def value_of(checkpoint) -> float:
    return load_file(checkpoint.folder / "model.safetensors")["weight"][0].item()


def damage(folder: Path, position: Position) -> None:
    path = folder / position.name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


FIRST, SECOND, THIRD = Position(1), Position(1, 500), Position(2)
LINKS = {"last": SECOND, "best": FIRST}


def start_with(folder: Path, *saved: tuple[Position, float], damaged: tuple[Position, ...] = ()) -> None:
    folder.mkdir()
    for position, value in saved:
        save(folder, position, value)
    CheckpointStore(folder, 99).link(
        {"last": max(p for p, _ in saved), "best": min(p for p, _ in saved)} if saved else {}
    )
    for position in damaged:
        damage(folder, position)


# name: (what is there, what is done, the answers that are right afterwards: position and value)
TWO = ((FIRST, 1.0), (SECOND, 2.0))
WORK = {
    "first save": ((), (), lambda x: save(x, FIRST, 1.0), {None, (FIRST, 1.0)}),
    "next save": (TWO, (), lambda x: save(x, THIRD, 3.0), {(SECOND, 2.0), (THIRD, 3.0)}),
    "save again": (TWO, (), lambda x: save(x, SECOND, 4.0), {(SECOND, 2.0), (SECOND, 4.0)}),
    "save the only one again": (TWO[:1], (), lambda x: save(x, FIRST, 4.0), {(FIRST, 1.0), (FIRST, 4.0)}),
    "save a damaged one again": (TWO, (SECOND,), lambda x: save(x, SECOND, 4.0), {(FIRST, 1.0), (SECOND, 4.0)}),
    "link": (TWO, (), lambda x: CheckpointStore(x, 2).link({"last": FIRST, "best": SECOND}), {(SECOND, 2.0)}),
    "prune": ((*TWO, (THIRD, 3.0)), (), lambda x: CheckpointStore(x, 1).link({"last": THIRD}), {(THIRD, 3.0)}),
    "clean": (TWO, (), lambda x: CheckpointStore(x, 2).clean(), {(SECOND, 2.0)}),
    "newest": (TWO, (SECOND,), lambda x: CheckpointStore(x, 2).newest_valid(), {(FIRST, 1.0)}),
}  # fmt: skip


def newest(folder: Path) -> tuple[Position, float] | None:
    """What a fresh process finds."""
    found = CheckpointStore(folder, 2).newest_valid()
    return found and (found.position, value_of(found))


def assert_clean(folder: Path) -> None:
    """No rubbish, nothing half-written that looks like a checkpoint, no link into nothing that was not there before."""
    assert not list(folder.glob(".*"))
    kept = CheckpointStore(folder, 2).positions().values()
    assert all(p.is_symlink() or p in kept or p.name.startswith("unverified_") for p in folder.iterdir())


@pytest.fixture
def started(tmp_path):
    """started(name) -> the folder that the work begins with"""

    def make(name: str) -> Path:
        saved, damaged, *_ = WORK[name]
        start_with(tmp_path / "start", *saved, damaged=damaged)
        return tmp_path / "start"

    return make


@pytest.mark.parametrize("name", WORK)
def test_a_kill_at_any_operation_loses_nothing(name, started, tmp_path):
    start, (_, damaged, work, right) = started(name), WORK[name]
    answers = set()
    for folder in states_after_kills(work, start, tmp_path / "run"):
        before = newest(folder)
        CheckpointStore(folder, 2).clean()
        assert before == newest(folder) in right
        assert_clean(folder)
        for position, path in CheckpointStore(folder, 2).positions().items():
            assert position in damaged or read_checkpoint(path).position == position
        answers.add(before)
    assert answers == right, "every answer is that of some instant"


@pytest.mark.parametrize("name", ["save again", "save the only one again", "save a damaged one again", "prune"])
def test_a_second_kill_while_cleaning_up(name, started, tmp_path):
    start, (*_, work, right) = started(name), WORK[name]
    count = 0
    for folder in states_after_kills(work, start, tmp_path / "run"):
        expected = newest(folder)
        shutil.rmtree(tmp_path / "left", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "left", symlinks=True)
        for again in states_after_kills(lambda f: CheckpointStore(f, 2).clean(), tmp_path / "left", tmp_path / "again"):
            assert newest(again) == expected and expected in right
            CheckpointStore(again, 2).clean()
            assert newest(again) == expected
            assert_clean(again)
            count += 1
    assert count > 10


@pytest.mark.parametrize("name", ["save again", "save the only one again"])
def test_saving_goes_on_after_any_kill(name, started, tmp_path):
    """Without cleaning up, as after an exception that the process survives."""
    start, (_, _, work, _) = started(name), WORK[name]
    for folder in states_after_kills(work, start, tmp_path / "run"):
        save(folder, THIRD, 9.0)
        assert newest(folder) == (THIRD, 9.0)
        assert_clean(folder)


def test_adopting(tmp_path):
    start_with(tmp_path / "other", (SECOND, 2.0))
    # under any name, with something beside it that is none of its files
    os.rename(tmp_path / "other" / SECOND.name, tmp_path / "other/kept")
    (tmp_path / "other/kept/notes").mkdir()
    checkpoint = read_checkpoint(tmp_path / "other/kept")
    (tmp_path / "start").mkdir()
    answers = []
    for folder in states_after_kills(
        lambda f: CheckpointStore(f, 2).adopt(checkpoint), tmp_path / "start", tmp_path / "run"
    ):
        CheckpointStore(folder, 2).clean()
        answers.append(newest(folder))
        assert_clean(folder)
    assert set(answers) == {None, (SECOND, 2.0)} and answers[-1] == (SECOND, 2.0)
    assert value_of(checkpoint) == 2.0


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_at_a_rename_is_undone(number, started, tmp_path, monkeypatch):
    """The process lives on: what was there has its name again."""
    folder = started("save again")
    before, rename, calls = snapshot(folder), os.rename, []

    def failing(*args):
        calls.append(args)
        if len(calls) == number:
            raise OSError(5, "Input/output error")
        rename(*args)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        save(folder, SECOND, 4.0)
    assert snapshot(folder) == before


def test_what_cannot_be_read_is_not_removed(started, tmp_path, monkeypatch):
    """An error of the file system says nothing of a checkpoint."""
    folder = started("save the only one again")
    os.rename(folder / FIRST.name, folder / f".old-{FIRST.name}")

    def failing(path):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("ssm_train.record.checkpoint.open_regular", failing)
        with pytest.raises(UserError, match="Input/output error"):
            CheckpointStore(folder, 2).clean()
    assert newest(folder) == (FIRST, 1.0)


def test_files_and_links_appear_whole(tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start/file").write_text("old text")
    (tmp_path / "start/link").symlink_to("old")

    def work(folder: Path) -> None:
        write_atomic(folder / "file", "new, longer text")
        link_atomic(folder / "link", "new")

    found = []
    for folder in states_after_kills(work, tmp_path / "start", tmp_path / "run"):
        found.append(((folder / "file").read_text(), os.readlink(folder / "link")))
        remove_asides(folder)
        assert {path.name for path in folder.iterdir()} == {"file", "link"}
    old, new = ("old text", "old"), ("new, longer text", "new")
    assert set(found) == {old, (new[0], old[1]), new} and found[0] == old and found[-1] == new
