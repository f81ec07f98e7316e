"""The one training loop: every task, routine and method goes through `Trainer.train_step`."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from config import Config
from datasets import Batches, TaskData
from evaluation.metrics import Scores, overall, probabilities, score_task
from models.checkpoint import FORMAT, check_base_weights, copy, load, model_checkpoint, save
from models.multitask_bert import MultitaskBERT
from optimizer import OPTIMIZERS, Schedule, local
from tasks import Task
from text.packing import Batch
from text.tokenizer import Tokenizer
from training import signals
from training.auxiliary_losses import terms_of
from training.averaging import AVERAGES, REFRESH_BATCHES, NoAverage
from training.cuda_graphs import passes_of
from training.distributed import ONE, World
from training.feature_cache import FrozenCache
from training.grad_cache import Memory
from training.health import Scaler, refuse_bad_losses, refuse_ruined, states_of
from training.loader import Feed
from training.logger import Epoch, Telemetry, describe_freezing, epoch_table, parameter_table
from training.losses import LOSSES
from training.meters import StepClock, StepGauge, TaskMeter
from training.pcgrad import NoSurgery, PCGrad
from training.profiling import Profiler
from training.resume import SaveEvery, cut_back, lengths, newest_state, save_state
from training.run_directory import RunDirectory
from training.seen import Seen
from training.smart import Teacher
from training.task_sampling import ROUTINES, Plan, Step, task_batches
from utils.console import progress
from utils.device import Device, random_state
from utils.errors import UserError, first_line, is_out_of_memory
from utils.files import cause

NOT_MEASURED = torch.tensor(math.nan)
LOG_EVERY = 10  # steps between points of the curves within an epoch: the gradient's norm costs a pass over memory


def make_optimizers(config: Config, model: MultitaskBERT) -> tuple[dict[str, str], dict[str, Optimizer]]:
    """The name of each task's optimizer, and the optimizers: one for each task, or a single one for --routine joint.

    A group of parameters has the rates and decays of the tasks that it serves, in the mean.
    """
    reach = {name: model.task_parameters(name) for name in model.tasks}
    groups: dict[str, list[dict[str, Any]]]
    if config.train.routine == "joint":
        served: dict[tuple[str, ...], list[torch.nn.Parameter]] = {}
        for parameter in dict.fromkeys(p for own in reach.values() for p in own):
            names = tuple(name for name, own in reach.items() if any(parameter is p for p in own))
            served.setdefault(names, []).append(parameter)
        groups = {"joint": [{"params": own, "tasks": names} for names, own in served.items()]}
        optimizer_of = dict.fromkeys(reach, "joint")
    else:
        groups = {name: [{"params": own, "tasks": (name,)}] for name, own in reach.items()}
        optimizer_of = {name: name for name in reach}
    base = config.train.scaled_lr()
    for group in (group for own in groups.values() for group in own):
        count = len(group["tasks"])
        group["lr"] = sum(base * config.tasks[name].lr_multiplier for name in group["tasks"]) / count
        group["weight_decay"] = sum(config.tasks[name].weight_decay for name in group["tasks"]) / count
    decoupled = {"decoupled": True} if config.train.decoupled else {}
    kind = OPTIMIZERS[config.train.optim]
    return optimizer_of, {name: kind(own, lr=base, **decoupled) for name, own in groups.items()}


def make_schedule(config: Config, task: Task) -> Schedule:
    """The course of a task's learning rate."""
    options = config.train
    return Schedule(
        options.lr_schedule,
        options.scaled_lr() * config.tasks[task.name].lr_multiplier,
        options.epochs,
        gamma=options.lr_lambda,
        floor=task.lr_floor,
        warmup=options.warmup,
        restart=options.lr_cycle == "restart",
    )


class Trainer:
    """Trains a model as a configuration says and keeps its run directory up to date."""

    meter = TaskMeter

    def __init__(
        self,
        config: Config,
        model: MultitaskBERT,
        tokenizer: Tokenizer,
        train: Mapping[str, TaskData],
        dev: Mapping[str, TaskData],
        device: Device,
        run: RunDirectory,
        say: Callable[[str], None] = print,
        world: World = ONE,
    ) -> None:
        self.config, self.model, self.tokenizer = config, model.to(device.device), tokenizer
        self.given: Mapping[str, TaskData] = train
        self.train_data: Mapping[str, Batches] = train
        self.dev_data: Mapping[str, Batches] = dev
        self.device, self.run, self.say, self.world = device, run, say, world
        world.attach(self.model)
        self.frozen = None
        if config.train.cache_frozen:
            self.frozen = FrozenCache(config, model, train, dev, device, say)
            self.train_data, self.dev_data = self.frozen.train, self.frozen.dev
        self.tasks = model.tasks
        options = config.train
        self.plan = Plan.of(options, config.tasks, {name: len(data) for name, data in train.items()})
        self.optimizer_of, self.optimizers = make_optimizers(config, model)
        everything = list(dict.fromkeys(p for name in self.tasks for p in model.task_parameters(name)))
        self.surgery = PCGrad(everything, options.seed) if options.pcgrad else NoSurgery()
        self.schedules = {name: make_schedule(config, task) for name, task in self.tasks.items()}
        self.terms = {name: terms_of(config, name) for name in self.tasks}
        self.feed = Feed(self.train_data, device.device, options.cuda_graphs, world)
        self.passes = passes_of(config, self.model, device, self.terms, self.forward_backward, say)
        self.scaler = Scaler(device.device.type, enabled=device.scaled)
        self.memory = Memory(
            config, self.model, self.train_data, device.device, say, world.size == 1, lambda: self.passes.release()
        )
        self.average = AVERAGES[options.average](self.model, options, self.pass_batches)
        self.teacher = NoAverage(self.model, options, self.pass_batches)
        if any(own.bregman > 0.0 for own in config.tasks.values()):
            moves = sum(step.moves for epoch in range(options.epochs) for step in self.steps_of(epoch))
            self.teacher = Teacher(self.model, options, moves)
        self.clock = (StepClock if config.run.benchmark is None else StepGauge)(device)
        self.profiled: Callable[[Iterable[Step]], Iterator[Step]] = (
            Profiler(run.path, device, say) if config.run.profile and world.leads else iter
        )
        self.trainable_layers: int | None = None
        self.epoch, self.step, self.best, self.stale = 0, 0, -math.inf, 0
        self.done = 0  # steps of the epoch
        self.evaluating = False  # whether all of them are done, and only the epoch's evaluation is left
        self.meters: dict[str, TaskMeter] = {}  # the epoch's figures so far
        self.seconds = 0.0  # that former processes spent on the epoch
        self.gradient_waits = False  # whether a joint step's gradients wait for those of other tasks
        self.saves = SaveEvery(config.run.save_every)
        self.left_out = model.frozen_parameter_names(options.fine_tune_mode)  # of the weights that are saved

    def fit(self) -> Scores:
        """Train to the end, or until --patience runs out; returns the best dev scores.

        Where a signal ends the run, the state is saved; raises SystemExit.
        """
        if not self.model.trained(self.config.train):
            raise UserError(
                f"--fine_tune_mode {self.config.train.fine_tune_mode} freezes the backbones in all --epochs "
                f"{self.config.train.epochs}, and a bare cosine has no weights, so nothing would be learned; choose "
                "another mode, more epochs, or --sts_projection"
            )
        torch.manual_seed(self.world.seed(self.config.train.seed))
        if self.config.run.resume:
            self.restore()
        self.telemetry = Telemetry(self.run, self.config, self.tasks)
        best: Scores = {}
        with signals.noted():
            try:
                while self.evaluating or (self.epoch < self.config.train.epochs and not self.out_of_patience()):
                    record = self.train_epoch()
                    if record.dev and record.is_best:
                        best = record.dev
                    self.say(epoch_table(self.tasks, record, self.config.train.epochs))
                    self.save_resume()
                    self.pause()
                if not best and self.world.leads:
                    best = load(self.run.best)["scores"]
                self.telemetry.close(best)
            except signals.Stopped as stopped:
                self.save_if_new()
                self.say(f"\nstopped by {stopped.name}; {self.how_to_go_on()}")
                raise SystemExit(stopped.code) from None
            except KeyboardInterrupt:
                self.say(f"\nstopped at once; {self.how_to_go_on()}")
                raise
            except BrokenPipeError:  # who read our output has gone; the run's folder is well
                if self.world.size == 1:  # others would not know of it
                    self.save_if_new()
                raise
            except OSError as error:
                raise UserError(f"{self.run.path}: cannot be written ({cause(error, self.run.path)})") from error
        return best

    def how_to_go_on(self) -> str:
        """For people: what of the run is saved, and the flags that go on from there."""
        if self.saves.step is None:
            return "nothing of the run is saved yet, --overwrite starts it again"
        flags = f"--run_dir {self.run.path} --resume" + " in place of --overwrite" * self.config.run.overwrite
        return f"the same command with {flags} goes on after step {self.saves.step}"

    def out_of_patience(self) -> bool:
        """Whether --patience evaluations have passed without a better score."""
        return self.config.train.patience is not None and self.stale >= self.config.train.patience

    def train_epoch(self) -> Epoch:
        """One epoch of training, or what a former process left to do of it, its evaluation if due, and its records."""
        self.began = time.perf_counter() - self.seconds
        epoch = self.epoch - 1 if self.evaluating else self.epoch
        trainable_layers = self.model.freeze_for_epoch(self.config.train, epoch)
        if trainable_layers != self.trainable_layers:
            self.trainable_layers = trainable_layers
            self.say(f"\nFrom epoch {epoch + 1}:\n{parameter_table(self.model)}")
        steps = self.steps_of(epoch)
        if self.frozen is not None:
            self.frozen.begin_epoch(steps)
        if not self.evaluating:
            self.run_steps(steps)
            self.epoch += 1
            refuse_ruined(self.model.state_dict().items())
            self.average.after_epoch(self.epoch)
            self.done, self.evaluating = 0, True
        figures = {name: meter.result(self.tasks[name]) for name, meter in self.meters.items()}
        trains = describe_freezing(self.model, trainable_layers, self.config.train.fine_tune_mode)
        record = Epoch(self.epoch, trains, self.step, figures)
        record.trainable_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        record.device = self.world.named(self.device.name)
        with self.stoppable(), self.average.applied():
            dev = self.evaluate(self.due())
            self.judge(record, dev)
        record.conflicts = self.surgery.conflicting()
        record.skipped_steps = self.scaler.skipped_steps()
        record.seconds = time.perf_counter() - self.began
        record.peak_memory = max([self.device.peak_memory(), *(done.peak_memory for done in figures.values())])
        self.telemetry.epoch(record, dev)
        self.evaluating, self.meters, self.seconds = False, {}, 0.0
        return record

    def due(self) -> list[str]:
        """The tasks whose dev set is evaluated after this epoch: all of them after the last one."""
        last = self.epoch == self.config.train.epochs
        if self.epoch % self.config.train.eval_every and not last:
            return []
        return [name for name in self.tasks if last or self.epoch % self.config.tasks[name].epoch_eval == 0]

    def steps_of(self, epoch: int) -> list[Step]:
        """The batches of an epoch."""
        return ROUTINES[self.config.train.routine](self.plan, epoch)

    def run_steps(self, steps: Sequence[Step]) -> None:
        """Those optimizer steps of the current epoch that are not done yet."""
        self.model.train()
        named = {step.task for step in steps}
        self.meters = {name: self.meters.get(name) or self.meter() for name in self.tasks if name in named}
        moves = max(1, sum(step.moves for step in steps))
        batches = len(steps) // moves  # of an optimizer step
        unseen: list[Tensor] = []  # losses that nobody has looked at yet
        name = f"epoch {self.epoch + 1}/{self.config.train.epochs}"
        bar = progress(steps[self.done :], name, "step", done=self.done)
        for step in self.profiled(bar):
            self.pause()
            self.clock.start()
            meter = self.meters[step.task]
            made = self.done // batches - self.scaler.skipped  # the batches of a joint step have one rate
            lr = self.set_rates(step.task, self.epoch + made / moves)
            log = len(meter.losses) % LOG_EVERY == 0
            loss, outputs, labels, norm = self.train_step(step, log)
            if self.done + 1 < len(steps):
                self.feed.expect(steps[self.done + 1])
            meter.add(self.done, loss, outputs, labels, len(step.indices), lr, *self.clock.stop())
            self.gradient_waits = not step.moves
            unseen.append(loss)
            if log:
                if not torch.stack(unseen).isfinite().all():
                    refuse_bad_losses(self.meters, steps, self.epoch + 1, self.train_data, self.run)
                unseen.clear()
                bar.set_postfix_str(f"{step.task} loss {loss.item():.3f}", refresh=False)
                self.telemetry.step(self.step, step.task, loss.item(), lr, float(norm))
            self.step += 1
            self.done += 1
        started = time.perf_counter()
        self.device.synchronize()
        self.meters[steps[-1].task].seconds += time.perf_counter() - started
        for name, meter in self.meters.items():
            drawn = np.concatenate([step.indices for step in steps if step.task == name])
            meter.tokens = int(self.train_data[name].lengths[drawn].sum())
        refuse_bad_losses(self.meters, steps, self.epoch + 1, self.train_data, self.run)
        if (line := self.passes.report()) is not None:
            self.say(line)

    def pause(self) -> None:
        """Between two steps: end here if a signal asked for it, and save if it is time; never within a joint step.

        What one process has to end or save for, all have.
        """
        if not self.gradient_waits and self.done % self.world.pace == 0:
            signal, save = self.world.largest(signals.received(), int(self.saves.due(self.step)))
            signals.stop(signal)
            if save:
                self.save_resume()

    def stoppable(self) -> AbstractContextManager[None]:
        """Inside, a signal ends an evaluation between two batches; several processes end it in `Ranks.predict`."""
        return signals.checked_before_batches(self.model) if self.world.size == 1 else nullcontext()

    def set_rates(self, task: str, position: float) -> float:
        """Set the learning rates of the optimizer of `task` after `position` epochs; returns the task's own."""
        rates = {name: schedule.at(position) for name, schedule in self.schedules.items()}
        for group in self.optimizers[self.optimizer_of[task]].param_groups:
            group["lr"] = sum(rates[name] for name in group["tasks"]) / len(group["tasks"])
        return rates[task]

    def train_step(self, step: Step, measure: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One batch and, if it moves the weights, an optimizer step.

        Returns loss, outputs, labels and the norm of the gradient moved by (NaN where there is none, or nobody asked).
        """
        loss, outputs, labels = self.memory.run(step, lambda: self.passed(step))
        self.surgery.take()
        norm = self.move(self.optimizers[self.optimizer_of[step.task]], measure) if step.moves else NOT_MEASURED
        return loss, outputs, labels, norm

    def passed(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, outputs and labels of one batch, without their history; its gradients are added to those at hand."""
        batch, labels = self.feed.take(step)
        if step.task in self.memory.sizes:
            self.passes.refuse(step.task, "whose batches go in parts")
        return *self.passes(step, batch, labels), labels

    def forward_backward(self, step: Step, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What `passed` returns but the labels, as `passes` runs it."""
        own, terms = self.config.tasks[step.task], self.terms[step.task]
        state = random_state(self.device.device) if terms else None
        with self.device.autocast():
            embedding = self.model.embed(step.task, batch)
            outputs = self.world.gather(self.model.outputs(step.task, embedding))
            seen = Seen(
                self.model, step.task, batch, embedding, outputs, labels, state, self.step, self.teacher, self.world
            )
            further = [term(seen) for term in terms]
        loss = sum(further, start=own.weight * LOSSES[own.loss](outputs, labels))
        self.backward(loss, step)
        return loss.detach(), outputs.detach()

    def backward(self, loss: Tensor, step: Step) -> None:
        """Add a batch's gradients to those at hand."""
        with self.world.summed(step.task, step.moves or self.surgery.per_task):
            if loss.requires_grad:  # not so where all that a task has is frozen, as a bare cosine on a frozen backbone
                self.scaler.scale(loss * step.share).backward()

    def move(self, optimizer: Optimizer, measure: bool) -> Tensor:
        """An optimizer step by the gradients at hand, if there are any; returns their norm as `bound_gradient` does."""
        self.surgery.put()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return NOT_MEASURED
        norm = self.bound_gradient(optimizer, gradients, measure)
        if self.scaler.moves(optimizer):
            self.average.after_step()
            self.teacher.after_step()
        self.memory.clear_gradients()
        return norm

    def pass_batches(self) -> None:
        """Run the first batches that the last epoch had of each task through the model, if an evaluation is due."""
        names = self.tasks if self.due() else ()
        steps = [step for name in names for step in task_batches(self.plan, self.epoch - 1, name)[:REFRESH_BATCHES]]
        with self.device.autocast():
            for step in progress(steps, "batch norm", "batch", leave=False):
                data = self.train_data[step.task]
                own = self.world.shard(step.indices, data.lengths)
                self.model(step.task, data.batch(own).to(self.device.device))

    def bound_gradient(self, optimizer: Optimizer, gradients: Sequence[Tensor], measure: bool) -> Tensor:
        """Clip the gradient's norm to --clip, if given; returns the norm before, or NaN where nobody asked for it."""
        clip = self.config.train.clip
        if clip is None and not measure:
            return NOT_MEASURED
        self.scaler.unscale_(optimizer)
        norm = self.world.norm(gradients)
        if clip is not None:  # as torch's clip_grads_with_norm_, which takes no shards beside whole tensors
            share = (clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(own) for own in gradients], share)
        return norm

    def evaluate(self, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Values (probabilities or similarities) and labels of the dev sets of the tasks `names`."""
        out = {}
        for name in names:
            data = self.dev_data[name]
            outputs = self.world.predict(self.model, data, self.device, self.config.compute.eval_batch_size)
            assert data.examples.labels is not None
            out[name] = probabilities(self.tasks[name], outputs), data.examples.labels
        return out

    def judge(self, record: Epoch, dev: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Put the scores of `dev` into the epoch's record; if all tasks have one and it is the best, save the model."""
        record.dev = {name: score_task(self.tasks[name], *pair) for name, pair in dev.items()}
        if len(dev) == len(self.tasks):
            record.dev = overall(self.tasks, record.dev)
            record.is_best = record.dev["score"] > self.best
            self.stale = 0 if record.is_best else self.stale + 1
            if record.is_best:
                self.best = record.dev["score"]
                self.save_best(record.dev)

    def save_best(self, scores: Scores) -> None:
        """Write best.pt, and --filepath as well."""
        weights = self.world.weights(self.model)
        if not self.world.leads:
            return
        content = model_checkpoint(self.model, self.tokenizer, self.config, scores, weights)
        refuse_ruined(content["weights"].items())
        save(self.run.best, {**content, "epoch": self.epoch, "step": self.step})
        if self.config.run.filepath:
            copy(self.run.best, Path(self.config.run.filepath))

    @cached_property
    def data_sha256(self) -> dict[str, str]:
        """Names the training examples of each task in their order."""
        return {name: data.sha256() for name, data in self.given.items()}

    def save_if_new(self) -> None:
        """Write resume.pt where steps were made since the last one, and none of a joint step waits."""
        if not self.gradient_waits and self.saves.step != self.step:
            self.save_resume()

    def save_resume(self) -> None:
        """Write resume.pt: what is needed beyond the configuration to go on as if nothing had happened."""
        refuse_ruined([*self.model.state_dict().items(), *states_of(self.optimizers)])
        generators = {name: self.world.each(own) for name, own in self.generators().items()}
        weights = self.world.weights(self.model)
        states = {name: self.world.states(optimizer) for name, optimizer in self.optimizers.items()}
        if not self.world.leads:
            self.saves.saved(self.step)
            return
        self.telemetry.flush()
        content = {
            "format": FORMAT,
            "epoch": self.epoch,
            "done": self.done,
            "evaluating": self.evaluating,
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "seconds": time.perf_counter() - self.began if self.meters else 0.0,
            "examples": self.plan.sizes,
            "data": self.data_sha256,
            "weights": {name: own for name, own in weights.items() if name not in self.left_out},
            "base_sha256": self.model.base_sha256,
            "optimizers": states,
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict(),
            "teacher": self.teacher.state_dict(),
            "surgery": self.surgery.state_dict(),
            "part_sizes": self.memory.sizes,
            "generators": generators,
            "meters": {name: meter.state_dict() for name, meter in self.meters.items() if meter.losses},
            "lengths": lengths(self.run),
        }
        save_state(self.run, content)
        self.saves.saved(self.step)

    def restore(self) -> None:
        """Go back to the newest state that `save_resume` wrote. Raises UserError where it does not fit this run."""
        with self.world.one_first():  # it may rename the files
            content = newest_state(self.run, self.say)
        try:
            self.take(content)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{self.run.resume}: is no state that this run can go on from ({first_line(error):.99}); --overwrite it"
            ) from error
        self.saves.saved(self.step)
        self.say(f"going on after step {self.step}")

    def take(self, content: Mapping[str, Any]) -> None:
        """Be what the `content` of a state says. Raises UserError where it is of other data or other base weights."""
        if content["examples"] != self.plan.sizes:
            raise UserError(
                f"--resume {self.run.path}: the run began with {content['examples']} training examples, and there are "
                f"{self.plan.sizes}; put its data back, or --overwrite it"
            )
        check_base_weights(self.model, content["base_sha256"], self.config.model.pretrained, self.run.resume)
        self.world.load(self.model, content["weights"], self.run.resume, self.left_out)
        if other := [name for name, own in self.data_sha256.items() if content.get("data", {}).get(name, own) != own]:
            raise UserError(
                f"--resume {self.run.path}: the training examples of {self.tasks[other[0]].title} are not those, in "
                "that order, that the run began with, or the tokenizer is another one; put them back, or --overwrite it"
            )
        for name, optimizer in self.optimizers.items():
            self.world.load_states(optimizer, content["optimizers"][name])
        self.scaler.load_state_dict(content["scaler"])
        self.average.load_state_dict(content["average"])
        self.teacher.load_state_dict(content["teacher"])
        self.surgery.load_state_dict(content["surgery"])
        self.memory.sizes = dict(content["part_sizes"])
        self.epoch, self.done, self.evaluating = content["epoch"], content["done"], content["evaluating"]
        self.step, self.best, self.stale = content["step"], content["best"], content["stale"]
        self.restore_generators(content["generators"])
        self.seconds = content["seconds"]
        meters = content["meters"].items()
        self.meters = {name: self.meter.from_state(own, self.device.device) for name, own in meters}
        if self.world.leads:
            cut_back(self.run, content["lengths"])
            if self.config.run.filepath and self.run.best.exists():  # the run may have begun without that flag
                copy(self.run.best, Path(self.config.run.filepath))

    def generators(self) -> dict[str, Tensor]:
        """The states of the generators that training draws from."""
        if self.device.device.type == "cuda":
            return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(self.device.device)}
        return {"cpu": torch.get_rng_state()}

    def restore_generators(self, states: Mapping[str, Tensor]) -> None:
        """Go back to this rank's of the saved states [ranks, bytes]; other ranks than those seed new ones."""
        saved = len(states["cpu"])
        if saved != self.world.size:
            self.say(
                f"--resume: {saved} processes began this run and {self.world.size} go on with it; "
                f"from step {self.step} on, dropout draws other numbers than theirs"
            )
            torch.manual_seed(self.world.seed(hash((self.config.train.seed, self.step)) % 2**63))
            return
        # clones, because torch reads beyond a state that is a row of another tensor
        torch.set_rng_state(states["cpu"][self.world.rank].clone())
        if "cuda" in states and self.device.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"][self.world.rank].clone(), self.device.device)
