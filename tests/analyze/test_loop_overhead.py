"""The overhead of the training loop: what is compared, and how it is summed up."""

import pytest

from analyze.impl import loop_overhead
from analyze.loop_overhead import main
from ssm_train.common import timing


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """The numbers go to runs/analyze below where the command is called."""
    monkeypatch.chdir(tmp_path)


class Clock:
    """Returns times at which the bare steps took 1, 2, 3 ... s and the loop a quarter more."""

    def __init__(self, lengths):
        self.now, self.lengths, self.calls = 0.0, iter(lengths), 0

    def __call__(self):
        self.calls += 1
        if self.calls % 2 == 0:
            self.now += next(self.lengths)
        return self.now


def test_medians_of_pairs(monkeypatch, capsys):
    """The first pair warms up; the others give medians per update."""
    taken = []
    monkeypatch.setattr(loop_overhead, "_bare_steps", lambda run, images, targets, updates: taken.append("bare"))
    monkeypatch.setattr(loop_overhead, "_loop", lambda trainer: taken.append("loop"))
    lengths = [99, 7, 8, 10, 4, 5, 12, 15]  # bare, loop, bare, loop, ...
    monkeypatch.setattr(timing.time, "perf_counter", Clock(lengths))
    assert main(["--repeats", "3", "--updates", "2", "--batch-size", "4", "--device", "cpu"]) == 0
    assert taken == ["bare", "loop"] * 4
    # bare 8, 4, 12 s and loop 10, 5, 15 s of two updates each
    assert "bare step 4000.00 ms, loop 5000.00 ms; the loop adds 1000.00 ms (25.0%" in capsys.readouterr().out


def test_both_make_the_same_number_of_updates(monkeypatch):
    """The loop that is timed is the trainer's: as many steps of the optimizer as the bare one."""
    steps = []
    original = loop_overhead.prepare

    def prepare(*arguments):
        run = original(*arguments)
        run.optimizer.register_step_post_hook(lambda *_: steps.append(None))
        return run

    monkeypatch.setattr(loop_overhead, "prepare", prepare)
    assert main(["--repeats", "1", "--updates", "3", "--batch-size", "2", "--device", "cpu"]) == 0
    assert len(steps) == 2 * 2 * 3


def test_mistakes(capsys):
    assert main(["--cfg", "absent.yaml"]) == 2
    assert "absent.yaml" in capsys.readouterr().err
    assert loop_overhead.Overhead(10.0, 10.3, 0.3).share == pytest.approx(0.03)
