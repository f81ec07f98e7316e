"""Runs that are killed, by real signals to real processes, and go on as if nothing had happened."""

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import configure, fill, make_trainer, metrics, refusal, small_disk
from processes import Child, differences, flipped, in_a_tensor, kill_myself, wait_until

import multitask_classifier
from models.checkpoint import load, save
from training.feature_cache import CachedData
from training.meters import StepResult
from training.optimizers import Scaler
from training.resume import CheckpointInterval
from training.run_directory import RunDirectory
from training.task_sampling import Step
from training.trainer import Trainer
from utils.console import run_script

# Runs of nine batches an epoch with all that has a state of its own.
RUNS: dict[str, list[object]] = {
    "averaged": [
        "--routine", "interleave", "--epochs", 2, "--sst_smart", 0.5, "--sts_bregman", 0.5, "--average", "ema",
        "--ema_warmup", "--lora_mode", "all-lin", "--lora_rank", 2, "--lora_dropout", 0.1, "--optim", "AdamW",
        "--lr_schedule", "linear", "--clip", 0.5, "--micro_batch_size", 5,
    ],
    "joint": [
        "--routine", "joint", "--pcgrad", "--epochs", 2, "--arch", "yin-yang", "--pal", "low-rank",
        "--pal_low_rank_size", 4, "--average", "swa", "--fine_tune_mode", "full-model", "--lr_schedule", "cyclic",
    ],
    "frozen": ["--cache_frozen", "--epochs", 2, "--sst_fraction", 0.6, "--optim", "RAdam", "--ema_every", "epoch",
               "--average", "ema"],
    "drawn": ["--routine", "annealed", "--epochs", 2, "--refresh_batchnorm", "--patience", 2, "--lora_mode", "attn",
              "--dora", "--quora_epoch_eval", 2, "--optim", "SGD", "--lr", 1e-2],
}  # fmt: skip
BATCHES = {"averaged": 9, "joint": 9, "frozen": 8, "drawn": 9}  # in an epoch


class Recorder:
    """Writes what a run does into files beside its folder, a line at once, so that a kill loses none."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.train_step = trainer, trainer.train_step
        self.path = trainer.checkpointer.run.path
        trainer.train_step = self.step  # type: ignore[method-assign]
        trainer.say = trainer.checkpointer.say = self.say

    def step(self, step: Step, measure_norm: bool) -> StepResult:
        result, number = self.train_step(step, measure_norm), self.trainer.progress.batches
        rates = [group["lr"] for group in self.trainer.optimizers.for_step(step).param_groups]
        for i, (batch, found) in enumerate(zip(step.batches, result.batches, strict=True)):
            ids = self.trainer.loader.examples[batch.task].examples.ids
            drawn = [ids[index] for index in batch.indices]
            self.write("trace", json.dumps([number + i, batch.task, drawn, found.loss.item().hex(), rates]))
        return result

    def say(self, text: str) -> None:
        self.write("said", json.dumps(text))

    def write(self, kind: str, line: str) -> None:
        with self.path.with_suffix(f".{kind}").open("a") as file:
            file.write(line + "\n")


def build(flags: list[str], run: Path, *more: object) -> Trainer:
    """Return a recorded trainer with a gradient scaler, which fp16 needs."""
    trainer = make_trainer(flags, run, *more)
    trainer.optimizers.scaler = Scaler("cpu", growth_interval=7)
    Recorder(trainer)
    return trainer


def run_child(flags: list[str], run: Path, *more: object, sabotage: Callable[[Trainer], object] | None = None) -> int:
    """Return the exit status of a process that trains; `sabotage` may put a kill into its trainer."""

    def work() -> None:
        trainer = build(flags, run, *more)
        if sabotage is not None:
            sabotage(trainer)
        trainer.fit()

    return Child(work, run.with_suffix(".log")).wait()


def at(name: str, when: Callable[[Trainer], bool], do: Callable[[], object] = kill_myself, after: bool = False) -> Any:
    """Return a sabotage: `do` before, or after, the trainer's method `name` once `when` holds."""

    def sabotage(trainer: Trainer) -> None:
        original = getattr(trainer, name)

        def method(*arguments: Any) -> Any:
            hit = when(trainer)
            if hit and not after:
                do()
            result = original(*arguments)
            if hit and after:
                do()
            return result

        setattr(trainer, name, method)

    return sabotage


def at_step(number: int, do: Callable[[], object] = kill_myself) -> Any:
    """Return a sabotage before the step after so many batches, or after it if the number is odd."""
    return at("train_step", lambda trainer: trainer.progress.batches == number, do, after=number % 2 == 1)


def around_evaluation(moment: str, epoch: int) -> Any:
    """Return a kill when the epoch's steps are done, best.pt is written, metrics.jsonl has the epoch, or later."""
    name = {"trained": "evaluate", "judged": "update_best", "recorded": "save_state", "saved": "save_state"}[moment]
    return at(name, lambda trainer: trainer.progress.epoch == epoch and not trainer.progress.step,
              after=moment in ("judged", "saved"))  # fmt: skip


def before_fit(sabotage: Callable[[Trainer], object]) -> None:
    """Put a sabotage into every trainer of this process when it begins to train."""
    fit = Trainer.fit
    Trainer.fit = lambda trainer: (sabotage(trainer), fit(trainer))[1]  # type: ignore[method-assign]


def said(run: Path) -> list[str]:
    """Return all that was printed."""
    return [json.loads(line) for line in run.with_suffix(".said").read_text().splitlines()]


def tables(run: Path) -> list[str]:
    """Return the last printed table of each epoch, without what the clock says."""
    found = [text for text in said(run) if text.startswith("\nEpoch")]
    return list({text.split(":")[0]: re.sub(r"[\d,]+ s, .* at most", "", text) for text in found}.values())


def batches_made(run: Path) -> int:
    """Return how many batches the processes of a run have trained on, those that were made again included."""
    return len(run.with_suffix(".trace").read_text().splitlines())


def batches_saved(path: Path) -> int:
    """Return after how many batches a state was saved."""
    return int(load(path)["progress"]["batches"])


def assert_same_run(whole: Path, run: Path) -> None:
    """Check weights, optimizers, averages, generators; losses, rates and order of examples; figures and tables."""
    states = [load(path / "resume.pt") for path in (whole, run)]
    for state in states:
        del state["lengths"]  # timing.jsonl has the clock's digits
    assert differences(*states) == []
    bests = [load(path / "best.pt") for path in (whole, run)]
    assert differences(*({key: best[key] for key in ("weights", "scores", "epoch", "step")} for best in bests)) == []
    assert (whole / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert len({(run / name).read_bytes().count(b"\n") for name in ("timing.jsonl", "metrics.jsonl")}) == 1
    wanted = whole.with_suffix(".trace").read_text().splitlines()
    found = run.with_suffix(".trace").read_text().splitlines()
    assert sorted(set(found), key=lambda line: json.loads(line)[0]) == wanted  # steps made twice are the same twice
    assert tables(run) == tables(whole) and len(tables(run)) == states[0]["progress"]["epoch"]
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Callable[[str], Path]:
    """The folder of the uninterrupted run of a name in RUNS."""
    folder, made = tmp_path_factory.mktemp("whole"), set()

    def get(name: str) -> Path:
        if name not in made:
            assert run_child(tiny_flags, folder / name, *RUNS[name]) == 0, (folder / f"{name}.log").read_text()
            made.add(name)
        return folder / name

    return get


@pytest.mark.parametrize(
    ("name", "every", "moment"),
    [("averaged", 4, 15), ("joint", 2, 15), ("joint", 1, "recorded"), ("frozen", 3, "trained"), ("drawn", 1, "saved")],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tiny_flags: list[str], tmp_path: Path, whole: Callable[[str], Path], name: str, every: int, moment: int | str
) -> None:
    wanted, run = whole(name), tmp_path / "run"
    flags = [*RUNS[name], "--save_every", every]
    sabotage = around_evaluation(moment, 1) if isinstance(moment, str) else at_step(moment)
    assert run_child(tiny_flags, run, *flags, sabotage=sabotage) == -signal.SIGKILL
    made = batches_made(run)
    assert run_child(tiny_flags, run, *flags, "--resume") == 0, run.with_suffix(".log").read_text()
    assert_same_run(wanted, run)
    twice = batches_made(run) - batches_made(wanted)
    assert 0 <= twice <= every + 2 * (name == "joint") and made > twice


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_every_single_step(
    tiny_flags: list[str], tmp_path: Path, whole: Callable[[str], Path], name: str
) -> None:
    """And at each moment of its evaluations."""
    wanted = whole(name)
    flags = [*RUNS[name], "--save_every", 1]
    epochs = load(wanted / "resume.pt")["progress"]["epoch"]
    moments = [at_step(number) for number in range(3, BATCHES[name] * epochs, 3 if name == "joint" else 1)]
    for epoch in range(1, epochs + 1):
        moments += [around_evaluation(kind, epoch) for kind in ("trained", "judged", "recorded", "saved")]
    for number, moment in enumerate(moments):
        run = tmp_path / f"run{number}"
        assert run_child(tiny_flags, run, *flags, sabotage=moment) == -signal.SIGKILL
        assert run_child(tiny_flags, run, *flags, "--resume") == 0
        assert_same_run(wanted, run)
        shutil.rmtree(run)
    print(f"{name}: {len(moments)} kills survived")


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_random_times(
    tiny_flags: list[str], tmp_path: Path, whole: Callable[[str], Path], name: str
) -> None:
    """From outside, again and again, whatever it is doing: starting, training, saving, evaluating, resuming."""
    wanted, run, log, kills = whole(name), tmp_path / "run", tmp_path / "log", 0
    flags, generator = [*RUNS[name], "--save_every", 1], random.Random(name)
    while True:
        more = ["--resume"] if RunDirectory(run).states() else ["--overwrite"]
        if more == ["--overwrite"]:
            for kind in ("trace", "said"):
                run.with_suffix(f".{kind}").unlink(missing_ok=True)
        child = Child(lambda more=more: build(tiny_flags, run, *flags, *more).fit(), log)
        end = time.monotonic() + generator.uniform(0.2, 0.9) * (1 + 0.05 * kills)  # on a slow machine it ends, too
        while child.running() and time.monotonic() < end:
            time.sleep(0.002)
        if not child.running():
            break
        child.send(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert child.code == 0, log.read_text()
    assert_same_run(wanted, run)
    print(f"{name}: {kills} kills at random times survived")


def test_minutes_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    minutes, steps = CheckpointInterval("2m"), CheckpointInterval("10")
    assert not minutes.is_due(1000) and not steps.is_due(9) and steps.is_due(10)
    clock[0] += 119.9
    assert not minutes.is_due(1000)
    clock[0] += 0.2
    assert minutes.is_due(0)
    minutes.saved(1000)
    steps.saved(25)  # at the end of an epoch
    assert not minutes.is_due(2000) and not steps.is_due(34) and steps.is_due(35)


def test_what_is_no_interval_is_refused() -> None:
    for value in ("0", "0m", "-5", "1.5m", "10 m", "10h", "m", "", "1e3"):
        message = refusal(configure, f"--save_every={value}")
        assert message.startswith("--save_every ") and "give steps, such as 500, or minutes, such as 30m" in message


@pytest.mark.parametrize("what", ["count", "order", "label", "vocabulary"])
def test_other_data_are_no_data_to_resume_with(
    tiny_flags: list[str], tiny_bert: Path, small_data: Path, tmp_path: Path, what: str
) -> None:
    """A run of an earlier version has no inputs.json; its state knows the examples."""
    data, bert = shutil.copytree(small_data, tmp_path / "data"), shutil.copytree(tiny_bert, tmp_path / "bert")
    flags = ["--train_sst", "--save_every", 1, "--data_dir", data, "--pretrained", bert]
    assert run_child(tiny_flags, tmp_path / "run", *flags, sabotage=at_step(2)) == -signal.SIGKILL
    (tmp_path / "run" / "inputs.json").unlink()
    file = bert / "vocab.txt" if what == "vocabulary" else data / "ids-sst-train.csv"
    lines = file.read_text().splitlines(keepends=True)
    if what == "count":
        del lines[-2:]
    elif what == "label":
        cells = lines[1].rstrip("\n").split("\t")
        lines[1] = "\t".join([*cells[:-1], str((float(cells[-1]) + 1) % 5)]) + "\n"
    else:
        first = 5 if what == "vocabulary" else 1  # after the special tokens, or the header
        lines[first:] = reversed(lines[first:])
    file.write_text("".join(lines))
    message = refusal(make_trainer(tiny_flags, tmp_path / "run", *flags, "--resume").fit)
    wanted = "the training examples of SST sentiment are not those, in that order"
    if what == "count":
        wanted = "the run began with {'sst': 20} training examples, and there are {'sst': 18}"
    assert f"--resume {tmp_path}/run: {wanted}" in message


def test_a_state_whose_parts_are_odd_is_named(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--train_sst", "--average", "ema", "--epochs", 1]
    make_trainer(tiny_flags, tmp_path / "run", *flags).fit()
    path = tmp_path / "run" / "resume.pt"
    whole = load(path)
    parts = {"optimizers": {}, "average": {}, "generators": {}, "meters": [1], "weights": 3, "progress": {"epoch": 1}}
    for part, value in parts.items():
        save(path, {**whole, part: value})
        message = refusal(make_trainer(tiny_flags, tmp_path / "run", *flags, "--resume").fit)
        assert message.startswith(f"{path}: "), part


def test_tensorboard_has_each_point_once(tiny_flags: list[str], tmp_path: Path) -> None:
    """Killed with points in the files that are made again, and with points that no file has yet."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    words = [*tiny_flags, "--routine", "interleave", "--num_sst_trains", "4", "--save_every", "4", "--log_every", "5"]

    def train(run: Path, *more: str, sabotage: Any = None) -> int:
        def work() -> None:
            if sabotage is not None:
                before_fit(sabotage)
            multitask_classifier.main([*words, *more, "--run_dir", str(run)])

        return Child(work, run.with_suffix(".log")).wait()

    assert train(tmp_path / "whole") == 0
    broken = tmp_path / "broken"

    def flush_and_die(trainer: Trainer) -> None:
        at_step(7, lambda: (trainer.logger.flush(), kill_myself()))(trainer)

    assert train(broken, sabotage=flush_and_die) == -signal.SIGKILL
    for sabotage in (around_evaluation("recorded", 1), around_evaluation("saved", 1)):
        assert train(broken, "--resume", sabotage=sabotage) == -signal.SIGKILL
    assert train(broken, "--resume") == 0
    for run in (tmp_path / "whole", broken):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
        events.Reload()
        points = {tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        scalars = {tag: [p[0] for p in curve] if tag.startswith("perf/") else curve for tag, curve in points.items()}
        images = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
        found.append((scalars, images, len(events.Tensors("config/text_summary"))))
    assert found[0] == found[1]
    assert len(found[0][0]["dev/score"]) == 2 and len(found[0][0]["loss/sst"]) == 8  # 18 steps an epoch


def test_a_signal_ends_the_run_when_its_step_is_saved(
    tiny_flags: list[str], tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    """A second one while the state is being written harms nothing."""
    codes = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138, signal.SIGINT: 130}
    for number, (signum, code) in enumerate(codes.items()):
        run = tmp_path / f"run{number}"

        def sabotage(trainer: Trainer, signum: signal.Signals = signum) -> None:
            at_step(12, lambda: kill_myself(signum))(trainer)
            again = signal.SIGTERM if signum == signal.SIGINT else signum  # a second Ctrl-C ends at once
            at("save_state", lambda trainer: trainer.progress.batches == 13, lambda: kill_myself(again))(trainer)

        assert run_child(tiny_flags, run, *RUNS["averaged"], sabotage=sabotage) == code
        goes_on = f"the same command with --run_dir {run} --resume goes on after step 13"
        assert said(run)[-1] == f"\nstopped by {signum.name}; {goes_on}"
        assert f"{signum.name}: stopping after this step" in run.with_suffix(".log").read_text()
        assert batches_saved(run / "resume.pt") == batches_made(run) == 13
    assert run_child(tiny_flags, run, *RUNS["averaged"], "--resume") == 0
    assert_same_run(whole("averaged"), run)


@pytest.mark.parametrize(("name", "epoch"), [("averaged", 2), ("frozen", 1)])
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(
    tiny_flags: list[str], tmp_path: Path, whole: Callable[[str], Path], name: str, epoch: int
) -> None:
    """The weights are those that train, not the average that was being evaluated; nothing trains twice."""
    run = tmp_path / "run"
    term = at("evaluate", lambda trainer: trainer.progress.epoch == epoch, lambda: kill_myself(signal.SIGTERM))
    for more in ([], ["--resume"]):  # the second time it is the state's own evaluation that is broken off
        assert run_child(tiny_flags, run, *RUNS[name], *more, sabotage=term) == 143
        told = run / "metrics.jsonl"  # begins with the first epoch that is evaluated
        assert (len(metrics(run)) if told.exists() else 0) == epoch - 1
        assert load(run / "resume.pt")["progress"]["evaluating"]
        assert batches_saved(run / "resume.pt") == epoch * BATCHES[name]
    assert run_child(tiny_flags, run, *RUNS[name], "--resume") == 0
    assert_same_run(whole(name), run)
    assert batches_made(run) == 2 * BATCHES[name]


def test_a_signal_while_frozen_layers_are_computed(
    tiny_flags: list[str], tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    """Which takes minutes with the real data, in the middle of a step."""
    run = tmp_path / "run"

    def sabotage(trainer: Trainer) -> None:
        original = CachedData.fill

        def filling(data: CachedData, indices: np.ndarray) -> None:
            if trainer.progress.batches == 11:
                kill_myself(signal.SIGTERM)
            original(data, indices)

        CachedData.fill = filling  # type: ignore[method-assign]

    assert run_child(tiny_flags, run, *RUNS["frozen"], "--save_every", 1, sabotage=at_step(11)) == -signal.SIGKILL
    assert run_child(tiny_flags, run, *RUNS["frozen"], "--resume", sabotage=sabotage) == 143
    assert batches_saved(run / "resume.pt") == 11
    assert run_child(tiny_flags, run, *RUNS["frozen"], "--resume") == 0
    assert_same_run(whole("frozen"), run)


def test_a_second_ctrl_c_ends_at_once(tiny_flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*tiny_flags, "--run_dir", str(run), "--no_tensorboard", "--overwrite"]

    def twice() -> None:
        kill_myself(signal.SIGINT)
        kill_myself(signal.SIGINT)
        time.sleep(60)

    def work() -> None:
        before_fit(at_step(12, twice))
        run_script(multitask_classifier.main, words)

    assert Child(work, tmp_path / "log").wait() == 130
    lines = (tmp_path / "log").read_text().splitlines()
    goes_on = f"the same command with --run_dir {run} --resume in place of --overwrite goes on after step 9"
    assert f"stopped at once; {goes_on}" in lines and "stopped" in lines and "Traceback" not in "".join(lines)


def test_a_damaged_state_is_named_and_the_one_before_it_used(
    tiny_flags: list[str], tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    run = tmp_path / "run"
    flags = [*RUNS["averaged"], "--save_every", 2]
    assert run_child(tiny_flags, run, *flags, sabotage=at_step(13)) == -signal.SIGKILL
    assert [batches_saved(path) for path in RunDirectory(run).states()] == [13, 11]
    (run / "resume.pt").write_bytes(flipped((run / "resume.pt").read_bytes(), in_a_tensor(run / "resume.pt"), 3))
    assert run_child(tiny_flags, run, *flags, "--resume", sabotage=at_step(12)) == -signal.SIGKILL
    (line,) = [line for line in said(run) if "going on from the state before it, resume-previous.pt" in line]
    assert line.startswith(f"{run}/resume.pt: ") and "going on after step 11" in said(run)
    assert [batches_saved(path) for path in RunDirectory(run).states()] == [11]  # only what is whole counts
    assert run_child(tiny_flags, run, *flags, "--resume") == 0
    assert_same_run(whole("averaged"), run)


def test_a_disk_that_is_full_in_the_middle_of_an_epoch(tiny_flags: list[str], tmp_path: Path) -> None:
    """One line and exit code 2; when there is space again, the run goes on."""
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        run = disk / "run"
        words = [*tiny_flags, "--run_dir", str(run), "--save_every", "2"]

        def work() -> None:
            before_fit(at_step(5, lambda: fill(disk)))
            run_script(multitask_classifier.main, words)

        assert Child(work, tmp_path / "log").wait() == 2
        (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")]
        assert str(run) in line and "no space left on the disk" in line
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert [path.name for path in run.iterdir() if path.name.endswith("tmp")] == []
        (disk / "filler").unlink()
        multitask_classifier.main([*words, "--resume"])
        assert (run / "scores.json").exists() and not RunDirectory(run).states()


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tiny_flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*tiny_flags, "--no_tensorboard", "--run_dir", str(run), "--epochs", "100000"]

    def start(log: str, *more: str) -> Child:
        return Child(lambda: run_script(multitask_classifier.main, [*words, *more]), tmp_path / log)

    first = start("first")
    wait_until((run / "resume.pt").exists, first)
    for more in ([], ["--resume"], ["--overwrite"]):
        name = f"second{''.join(more)}"
        assert start(name, *more).wait() == 2
        (line,) = [line for line in (tmp_path / name).read_text().splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: --run_dir {run}: a run is going on here (process {first.pid} on ")
    assert first.running()
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third, log = start("third", "--resume"), tmp_path / "third"
    wait_until(lambda: log.exists() and "Epoch" in log.read_text(), third)
    third.send(signal.SIGTERM)
    assert third.wait() == 143
