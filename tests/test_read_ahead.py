"""The batch of the next step is read while a step runs: in order, at its step's cost, with its own faults."""

import threading
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from flexivid.training.batches import micro_batch_rows, own_rows
from flexivid.training.config import Config
from flexivid.training.loop import train
from flexivid.training.parallel import launch
from flexivid.training.read_ahead import Later, ReadAhead, on_device


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.fixture(autouse=True)
def no_reader_is_left():
    yield
    assert readers() == []
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_batch_is_read_once_and_none_past_the_end():
    read = []
    with ReadAhead(lambda step: read.append(step) or step * 10, steps=5) as batches:
        taken = [batches.of(step) for step in (2, 2, 3, 3, 4, 4)]
        time.sleep(0.1)  # for what should not be read
    assert taken == [20, 20, 30, 30, 40, 40] and read == [2, 3, 4]
    assert batches.current == 4


def test_the_next_one_is_read_in_another_thread_and_outside_of_with_in_this_one():
    batches = ReadAhead(lambda step: threading.get_ident(), steps=3)
    here = threading.get_ident()
    assert [batches.of(step) for step in range(3)] == [here] * 3
    with batches:
        first, *others = [batches.of(step) for step in range(3)]
    assert first == here and len(set(others)) == 1 and here not in others


def test_reading_and_steps_overlap():
    """They take the longer of both, not the sum."""

    def read(step: int) -> int:
        time.sleep(0.2)
        return step

    began = time.perf_counter()
    with ReadAhead(read, steps=6) as batches:
        for step in range(6):
            batches.of(step)
            time.sleep(0.2)
    spent = time.perf_counter() - began
    assert 1.4 <= spent < 2.0, "one read and six steps are 1.4 s, six of both 2.4 s"
    assert 0.2 <= batches.waited < 0.8


def test_a_fault_is_raised_as_itself_at_the_step_that_wants_the_batch():
    def read(step: int) -> int:
        if step == 2:
            raise KeyError("clip 7")
        return step

    with ReadAhead(read, steps=4) as batches:
        assert [batches.of(0), batches.of(1)] == [0, 1]
        with pytest.raises(KeyError, match="clip 7"):
            batches.of(2)


def test_the_thread_ends_with_a_step_that_fails():
    read = []
    with pytest.raises(RuntimeError, match="no memory"), ReadAhead(read.append, steps=100) as batches:
        batches.of(0)
        assert len(readers()) == 1
        raise RuntimeError("no memory")
    assert readers() == [] and read in ([0], [0, 1])


def test_what_the_model_has_a_part_in_is_made_at_its_step():
    """At the weights of that step, and not while another one runs."""
    weight, here = [0], threading.get_ident()
    with ReadAhead(lambda step: Later(lambda: (weight[0], threading.get_ident())), steps=3) as batches:
        for step in range(3):
            weight[0] = step + 1
            assert batches.of(step) == batches.of(step) == (step + 1, here)


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.ones(2)
    assert on_device(tensor, torch.device("cpu")) is tensor


class Objective:
    facts = {}

    def __init__(self, steps: int, broken: int | None = None):
        torch.manual_seed(0)
        self.model, self.broken, self.seen = torch.nn.Linear(3, 2), broken, []
        self.batches = ReadAhead(self.read, steps)

    def read(self, step):
        if step == self.broken:
            raise OSError(f"the clip of step {step} is gone")
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))

    def loss(self, model, step, micro_batch):
        x = self.batches.of(step)
        self.seen.append(x)
        return model(x).square().mean()

    def flops(self, step):
        return 1000

    def sample(self, path):
        pass

    def save(self, folder):
        folder.mkdir()


def config_of(tmp_path, **more) -> Config:
    return Config(objective="distill", output=tmp_path / "out", steps=6, log_every=1, save_every=1, **more)


def test_a_run_reads_ahead_and_leaves_no_thread(tmp_path):
    config = config_of(tmp_path)
    objective = Objective(config.steps)
    train(config, objective, Accelerator(cpu=True))
    expected = [torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) for step in range(6)]
    assert all(torch.equal(x, y) for x, y in zip(objective.seen, expected, strict=True))


def test_a_run_whose_clip_is_gone_fails_there_and_goes_on_from_there(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(OSError, match="the clip of step 3 is gone"):
        train(config, Objective(config.steps, broken=3), Accelerator(cpu=True))
    assert readers() == []
    assert [path.name for path in config.output.glob("checkpoint-*")] == ["checkpoint-00000003.safetensors"]
    train(config, Objective(config.steps), Accelerator(cpu=True))
    assert (config.output / "result").exists()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_rows_of_all_processes_are_the_batch(tmp_path, micro_batches):
    config, rows = config_of(tmp_path, micro_batches=micro_batches), torch.arange(12)
    parts = []
    for process in range(2):

        class Accelerated:
            num_processes, process_index = 2, process

        own = rows[own_rows(Accelerated, config, 12)]
        assert len(own) == 6
        parts += [own[micro_batch_rows(config, len(own), part)] for part in range(micro_batches)]
    assert {len(part) for part in parts} == {6 // micro_batches} and torch.equal(torch.cat(parts), rows)


class TestFromMain:
    @pytest.fixture(autouse=True)
    def sent(self, monkeypatch):
        """What the main process has sent to the others; these find it in its place."""
        monkeypatch.setattr(launch, "broadcast_object_list", self.broadcast)
        self.is_main_process, self.found = True, None

    def broadcast(self, values: list) -> None:
        if self.is_main_process:
            self.found = list(values)
        values[:] = self.found

    def refused(self):
        raise AssertionError("the others were to wait")

    def test_the_others_get_what_it_finds(self):
        assert launch.from_main(self, lambda: {"vae": "abc"}) == {"vae": "abc"}
        self.is_main_process = False
        assert launch.from_main(self, self.refused) == {"vae": "abc"}

    def test_its_mistakes_are_those_of_all(self):
        with pytest.raises(ValueError, match="another run"):
            launch.from_main(self, lambda: int("another run"))
        self.is_main_process = False
        with pytest.raises(ValueError, match="another run"):
            launch.from_main(self, self.refused)
