"""The training loop. All tasks, routines and methods meet in `Trainer.train_step`."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import Config
from datasets import TaskData
from evaluation.metrics import Scores, overall, probabilities, score_task, similarity_lines
from models.mlm import Masking
from models.multitask_bert import MultitaskBERT
from text.tokenizer import Tokenizer
from training import signals
from training.auxiliary_losses import build_auxiliary_losses
from training.averaging import REFRESH_BATCHES, MomentumModel, RunningAverage, make_average, refreshed_batchnorm
from training.cuda_graphs import CudaGraphRunner, make_cuda_graph_runner
from training.distributed import SINGLE_PROCESS, DataParallelLoss, DistributedContext
from training.feature_cache import FeatureCache
from training.grad_cache import GradCache
from training.loader import LoadedBatch, Loader
from training.logger import Logger, describe_freezing, epoch_table, parameter_table
from training.meters import BatchResult, EpochRecord, StepResult
from training.objective import MaskedWordObjective, Objective
from training.optimizers import Optimizers
from training.pcgrad import TaskGradients, pcgrad
from training.resume import Checkpointer, check_finite, generator_states, restore_generators
from training.run_directory import RunDirectory
from training.task_sampling import ROUTINES, Plan, Step, task_batches
from utils.console import progress, say
from utils.device import Device, without_tf32
from utils.errors import UserError, first_line, is_out_of_memory


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # epochs whose steps are done
    step: int = 0  # steps that are done of the epoch after those
    steps: int = 0  # steps of the whole run that are done
    batches: int = 0  # batches of the whole run that are done: they address noise, masks, --save_every and the curves
    evaluating: bool = False  # whether only the evaluation of the epoch is left
    best_score: float = -math.inf
    evaluations_without_improvement: int = 0
    conflicts: float | Tensor = 0.0  # pairs of tasks of the epoch whose gradients work against each other
    pairs: int = 0  # of tasks in the steps of the epoch

    def conflict_share(self) -> float | None:
        """Return the share of pairs of tasks in conflict; None where no step had a pair."""
        return float(self.conflicts) / self.pairs if self.pairs else None


@dataclass
class Trainer:
    """Trains a model as a configuration says and keeps its run directory up to date."""

    config: Config
    model: MultitaskBERT
    device: Device
    context: DistributedContext
    plan: Plan
    loader: Loader
    objective: Objective | MaskedWordObjective
    optimizers: Optimizers
    checkpointer: Checkpointer
    logger: Logger
    average: RunningAverage | None = None
    data_parallel: DataParallelLoss | None = None
    cuda_graphs: CudaGraphRunner | None = None
    progress: Progress = field(default_factory=Progress)
    trainable_layers: int | None = None  # as the last epoch has frozen the model (see models/freezing.py)
    started: float = 0.0  # when the epoch began, by time.perf_counter, less what former processes spent on it
    say: Callable[[str], None] = say

    @classmethod
    def from_config(
        cls,
        config: Config,
        model: MultitaskBERT,
        tokenizer: Tokenizer,
        train: Mapping[str, TaskData],
        dev: Mapping[str, TaskData],
        device: Device,
        run: RunDirectory,
        context: DistributedContext = SINGLE_PROCESS,
        say: Callable[[str], None] = say,
    ) -> "Trainer":
        """Return the trainer that a configuration asks for."""
        options = config.train
        context.prepare(model.to(device.device))
        cache = FeatureCache(config, model, train, dev, device, say) if options.cache_frozen else None
        masking = Masking(tokenizer) if options.mlm else None
        plan = Plan.of(options, config.tasks, {name: len(data) for name, data in train.items()})
        objective = make_objective(config, model, device, context, plan)
        one_wrapper = options.routine == "joint" and not options.pcgrad
        trainer = cls(
            config,
            model,
            device,
            context,
            plan,
            Loader(train, dev, device.device, options.seed, context, options.cuda_graphs, masking, cache),
            objective,
            Optimizers(config, model, device),
            Checkpointer(config, model, tokenizer, run, context, say),
            Logger(config, model.tasks, run, device, say, context.is_main_process),
            make_average(model, options),
            DataParallelLoss(objective, model, one_wrapper) if context.size > 1 else None,
            say=say,
        )
        trainer.cuda_graphs = make_cuda_graph_runner(config, model, device, trainer.forward_backward, say)
        return trainer

    def train_step(self, step: Step, measure_norm: bool = False) -> StepResult:
        """Make one optimizer step. All methods of training meet here.

        Each batch adds its gradient (the objective has SMART and the other losses), --pcgrad projects the gradients,
        --clip shortens their sum, the optimizer moves the weights, and the averages of the weights follow.
        """
        optimizer = self.optimizers.for_step(step)
        results: list[BatchResult] = []
        gradients = TaskGradients(self.task_parameters(), len(step.batches)) if self.config.train.pcgrad else None
        last = step.batches[-1] if self.data_parallel is None else self.data_parallel.last_trained(step)
        for batch in step.batches:
            loaded = self.loader.next(batch, self.progress.batches + len(results))
            loss, outputs = self.run_batch(loaded, len(step.batches), last=batch is last)
            self.loader.prefetch()
            results.append(BatchResult(loss, outputs, loaded.labels))
            if gradients is not None:
                gradients.take()
        if gradients is not None:
            self.project(gradients)
        if not self.optimizers.has_gradients(optimizer):  # nothing trains that these batches reach
            return StepResult(results, None)
        norm = self.optimizers.clip_gradients(optimizer, measure_norm)
        if self.optimizers.scaler.step_optimizer(optimizer):
            self.update_averages()
        optimizer.zero_grad()
        return StepResult(results, norm)

    def run_batch(self, batch: LoadedBatch, batch_count: int, last: bool) -> tuple[Tensor, Tensor]:
        """Return the loss and the outputs of a batch, and add its share of the step's gradient to the parameters'.

        The step has `batch_count` batches and minimises their mean loss.
        """
        scale = self.context.size / batch_count  # times the ranks: DistributedDataParallel averages over them
        if self.cuda_graphs is not None:
            return self.cuda_graphs(batch, scale, keep=not last and not self.config.train.pcgrad)
        return self.forward_backward(batch, scale, reduce=last or self.config.train.pcgrad)

    def forward_backward(self, batch: LoadedBatch, scale: float, reduce: bool = True) -> tuple[Tensor, Tensor]:
        """Return the loss and the outputs of a batch, detached, and add `scale` times its gradient to the parameters'.

        With several processes, the gradient is averaged over ranks. Without `reduce` it stays on its rank, and a later
        batch of the step averages the sum. SMART's small differences would drown in the rounding of TF32.
        """
        with without_tf32(self.config.tasks[batch.task].smart > 0):
            if self.data_parallel is None:
                loss, outputs = self.objective(batch)
            else:
                loss, outputs = self.data_parallel(batch.task, batch, reduce)
            if loss.requires_grad:  # False if all that the task uses is frozen: a bare cosine on a frozen backbone
                self.optimizers.scaler.scale(loss * scale).backward()
        return loss.detach(), outputs

    def task_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that train and that any of the tasks reaches, each once."""
        reached = dict.fromkeys(chain.from_iterable(map(self.model.task_parameters, self.model.tasks)))
        return [parameter for parameter in reached if parameter.requires_grad]

    def project(self, gradients: TaskGradients) -> None:
        """Give the parameters the sum of the tasks' gradients after gradient surgery, and count the conflicts."""
        generator = np.random.default_rng([self.config.train.seed, self.progress.steps])
        conflicts = pcgrad(gradients.rows, generator)
        gradients.give_first()
        self.progress.conflicts = self.progress.conflicts + conflicts
        self.progress.pairs += gradients.pairs()

    def update_averages(self) -> None:
        """Let the running averages of the weights follow an optimizer step."""
        for average in (self.average, self.objective.momentum_model):
            if average is not None:
                average.after_step()

    def fit(self) -> Scores:
        """Train to the end, or until --patience runs out; return the best dev scores.

        If a signal ends the run, the state is saved; raises SystemExit.
        """
        if not self.model.trained_parameters(self.config.train):
            raise UserError(
                f"--fine_tune_mode {self.config.train.fine_tune_mode} freezes the backbones in all --epochs "
                f"{self.config.train.epochs}, and a bare cosine has no weights, so nothing would be learned; choose "
                "another mode, more epochs, or --sts_projection"
            )
        torch.manual_seed(self.context.rank_seed(self.config.train.seed))
        if self.config.run.resume:
            self.restore()
        self.logger.open()
        with signals.noted():
            try:
                best = self.train_epochs()
            except signals.Stopped as stopped:
                self.save_if_new()
                self.checkpointer.say_end(f"stopped by {stopped.name}")
                raise SystemExit(stopped.code) from None
            except KeyboardInterrupt:
                self.checkpointer.say_end("stopped at once")
                raise
            except OSError:  # of our output: its disk is full, its reader or the terminal has gone
                if self.context.size == 1:  # other processes would not know of it
                    self.save_if_new()
                if signum := signals.received():
                    raise SystemExit(128 + signum) from None
                raise
        return best

    def train_epochs(self) -> Scores:
        """Train the epochs that are left; return the best dev scores."""
        best: Scores = {}
        while self.progress.evaluating or (self.progress.epoch < self.config.train.epochs and not self.is_stale()):
            record = self.train_epoch()
            if record.dev and record.is_best:
                best = record.dev
            self.say(epoch_table(self.model.tasks, record, self.config.train.epochs))
            self.save_state()
            self.pause()
        if self.progress.best_score == -math.inf and not self.config.train.mlm:  # best.pt was lost after the last epoch
            record = self.begin_record()
            with self.evaluation_weights():
                self.update_best(record, self.evaluate(self.tasks_to_evaluate()))
        best = best or self.checkpointer.load_best_scores()
        self.logger.close()
        return best

    def is_stale(self) -> bool:
        """Whether --patience evaluations have passed without a better score."""
        patience = self.config.train.patience
        return patience is not None and self.progress.evaluations_without_improvement >= patience

    def train_epoch(self) -> EpochRecord:
        """Do the steps of one epoch, its evaluation if due, and its records; skip what an earlier process has done."""
        self.started += time.perf_counter()
        epoch = self.progress.epoch - self.progress.evaluating
        self.freeze(epoch)
        steps = ROUTINES[self.config.train.routine](self.plan, epoch)
        self.loader.begin_epoch(steps, self.progress.step, self.progress.batches)
        if not self.progress.evaluating:
            self.run_steps(steps)
            self.progress.epoch, self.progress.step, self.progress.evaluating = epoch + 1, 0, True
            check_finite(self.model.state_dict().items())
            if self.average is not None:
                self.average.after_epoch(epoch + 1)
        record = self.begin_record()
        with self.stoppable(), self.evaluation_weights():
            dev = self.evaluate(self.tasks_to_evaluate())
            self.update_best(record, dev)
        self.end_record(record, dev)
        self.progress.evaluating, self.started = False, 0.0
        return record

    def freeze(self, epoch: int) -> None:
        """Freeze what does not train in `epoch`, counted from 0. If that has changed, print what trains."""
        trainable_layers = self.model.freeze_for_epoch(self.config.train, epoch)
        if trainable_layers != self.trainable_layers:
            self.trainable_layers = trainable_layers
            self.say(f"\nFrom epoch {epoch + 1}:\n{parameter_table(self.model)}")
            if self.data_parallel is not None:
                self.data_parallel.rebuild()

    def run_steps(self, steps: Sequence[Step]) -> None:
        """Make the optimizer steps of the current epoch that are not done yet."""
        self.model.train()
        done = self.progress.step
        number = sum(len(step.batches) for step in steps[:done])  # batches of the epoch that are done
        bar = self.logger.begin_steps(steps, done, self.progress.epoch, self.loader.train)
        for step in bar if self.logger.profiler is None else self.logger.profiler(bar):
            self.pause()
            self.logger.timer.start()
            made = self.progress.step - self.optimizers.scaler.skipped
            position = self.progress.epoch + made / len(steps)
            rates = self.optimizers.set_rates(self.optimizers.for_step(step), position)
            with self.named_out_of_memory(step):
                result = self.train_step(step, self.logger.wants_norm(step))
            self.logger.add_step(step, number, self.progress.batches, result, rates)
            number += len(step.batches)
            self.progress.step += 1
            self.progress.steps += 1
            self.progress.batches += len(step.batches)
        self.logger.end_steps()
        if self.cuda_graphs is not None:
            self.say(self.cuda_graphs.report())

    @contextmanager
    def named_out_of_memory(self, step: Step) -> Iterator[None]:
        """Turn an error for lack of memory inside into a UserError that says which --micro_batch_size to try."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            sequences = max(len(b.indices) * (1 + self.model.is_siamese(b.task)) for b in step.batches)
            most = min(self.config.train.micro_batch_size or sequences, -(-sequences // self.context.size))
            remedy = f"--micro_batch_size {most // 2} needs less memory for the same gradient"
            if most == 1:
                remedy = "lower --max_length, or let less train (--fine_tune_mode last-layer, --lora_mode)"
            raise UserError(
                f"out of memory in a step of {sequences} sequences, at most {most} at a time "
                f"({first_line(error):.120}); {remedy}"
            ) from error

    def pause(self) -> None:
        """Between two steps: end if a signal asked for it, and save if it is time. All processes do the same."""
        if self.progress.step % self.context.steps_between_syncs == 0:
            due = self.checkpointer.interval.is_due(self.progress.batches)
            signal, save = self.context.all_reduce_max(signals.received(), int(due))
            signals.stop(signal)
            if save:
                self.save_state()

    def tasks_to_evaluate(self) -> list[str]:
        """Return the tasks whose dev set is evaluated after this epoch: all after the last one, none with --mlm."""
        number, options = self.progress.epoch, self.config.train
        last = number == options.epochs
        if options.mlm or (number % options.eval_every and not last):
            return []
        return [name for name in self.model.tasks if last or number % self.config.tasks[name].epoch_eval == 0]

    def stoppable(self) -> AbstractContextManager[None]:
        """Let a signal end an evaluation between two batches; several processes end it in `context.predict`."""
        return signals.checked_before_batches(self.model) if self.context.size == 1 else nullcontext()

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Inside, give the model the averaged weights, if it has any, and measure the batch norm anew if that is due.

        It is due for averaged weights and under --refresh_batchnorm.
        """
        average = self.average if self.average is not None and self.average.updates else None
        with ExitStack() as stack:
            if average is not None:
                stack.enter_context(average.averaged_weights())
            if average is not None or self.config.train.refresh_batchnorm:
                stack.enter_context(refreshed_batchnorm(self.model, self.pass_batches))
            yield

    def pass_batches(self) -> None:
        """Pass batches of the last epoch through the model: the first ones of each task, if an evaluation is due."""
        names = self.model.tasks if self.tasks_to_evaluate() else ()
        batches = [b for n in names for b in task_batches(self.plan, self.progress.epoch - 1, n)[:REFRESH_BATCHES]]
        with self.device.autocast():
            bar = progress(batches, "batch norm", "batch", leave=False)
            for task, inputs in self.loader.rank_batches(bar):
                self.model(task, inputs)

    def evaluate(self, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the values (probabilities or similarities) and labels of the dev sets of the tasks `names`."""
        dev = {}
        for name in names:
            data = self.loader.dev[name]
            outputs = self.context.predict(self.model, data, self.device, self.config.compute.eval_batch_size)
            assert data.examples.labels is not None
            dev[name] = probabilities(self.model.tasks[name], outputs), data.examples.labels
        return dev

    def update_best(self, record: EpochRecord, dev: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Score `dev`; save the model if all tasks have a score and it is the best so far. --mlm saves every epoch."""
        if self.config.train.mlm:
            self.checkpointer.save_best({}, self.progress.epoch, self.progress.batches)
            return
        record.dev = {name: score_task(self.model.tasks[name], *pair) for name, pair in dev.items()}
        if len(dev) < len(self.model.tasks):
            return
        record.dev = overall(self.model.tasks, record.dev)
        record.is_best = record.dev["score"] > self.progress.best_score
        self.progress.evaluations_without_improvement += 1
        if record.is_best:
            self.progress.best_score = record.dev["score"]
            self.progress.evaluations_without_improvement = 0
            lines = similarity_lines(self.model.tasks, dev)
            self.checkpointer.save_best(record.dev, self.progress.epoch, self.progress.batches, lines)
        record.best_score = self.progress.best_score

    def begin_record(self) -> EpochRecord:
        """Return the record of the epoch's training."""
        trains = describe_freezing(self.model, self.trainable_layers or 0, self.config.train.fine_tune_mode)
        figures = self.logger.epoch_figures()
        record = EpochRecord(self.progress.epoch, trains, self.progress.batches, figures)
        record.trainable_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        record.device = self.context.device_names(self.device.name)
        record.conflicts = self.progress.conflict_share()
        return record

    def end_record(self, record: EpochRecord, dev: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Complete and write the record of the epoch."""
        self.progress.conflicts, self.progress.pairs = 0.0, 0
        record.skipped_steps = self.optimizers.scaler.take_skipped()
        record.seconds = time.perf_counter() - self.started
        peak = max([self.device.peak_memory(), *(task.peak_memory for task in record.tasks.values())])
        samples = self.logger.utilization
        utilization = round(10 * sum(samples) / len(samples)) if samples else -1  # in tenths of a percent
        record.peak_memory, utilization = self.context.all_reduce_max(peak, utilization)  # as R2 has them, section 5.2
        record.gpu_utilization = None if utilization < 0 else utilization / 10
        self.logger.end_epoch(record, dev)

    def save_if_new(self) -> None:
        """Write a state if batches have passed since the last one."""
        if self.checkpointer.interval.saved_at != self.progress.batches:
            self.save_state()

    def save_state(self) -> None:
        """Write what a later process needs, beyond the configuration, to continue as if nothing had happened."""
        self.logger.flush()
        state = {
            "progress": {**asdict(self.progress), "conflicts": float(self.progress.conflicts)},
            "seconds": time.perf_counter() - self.started if self.logger.meters else 0.0,
            "examples": self.plan.sizes,
            "data": self.loader.sha256,
            **self.optimizers.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "momentum_model": self.objective.momentum_model and self.objective.momentum_model.state_dict(),
            "generators": generator_states(self.device.device, self.context),
            "meters": self.logger.state_dict(),
        }
        self.checkpointer.save_state(state, self.progress.batches)

    def restore(self) -> None:
        """Go back to the newest state. Raises UserError if it does not fit this run."""
        resume = self.checkpointer.run.resume
        try:
            state = self.checkpointer.load_state()
            self.load_state_dict(state)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{resume}: is no state that this run can go on from ({first_line(error):.99}); --overwrite it"
            ) from error
        self.checkpointer.interval.saved(self.progress.batches)
        self.say(f"going on after step {self.progress.batches}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state. Raises UserError if it belongs to other data."""
        path, sizes = self.checkpointer.run.path, self.plan.sizes
        if state["examples"] != sizes:
            raise UserError(
                f"--resume {path}: the run began with {state['examples']} training examples, and there are "
                f"{sizes}; put its data back, or --overwrite it"
            )
        if changed := [name for name, found in self.loader.sha256.items() if state["data"].get(name) != found]:
            raise UserError(
                f"--resume {path}: the training examples of {self.model.tasks[changed[0]].title} are not those, in "
                "that order, that the run began with, or the tokenizer is another one; put them back, or --overwrite it"
            )
        self.optimizers.load_state_dict(state)
        for average, saved in (
            (self.average, state["average"]),
            (self.objective.momentum_model, state["momentum_model"]),
        ):
            if average is not None:
                average.load_state_dict(saved)
        self.progress = Progress(**{counter.name: state["progress"][counter.name] for counter in fields(Progress)})
        if not restore_generators(state["generators"], self.device.device, self.context):
            self.reseed(len(state["generators"]["cpu"]))
        self.started = -state["seconds"]
        self.logger.load_state_dict(state["meters"])
        self.checkpointer.cut_back(state["lengths"])

    def reseed(self, saved: int) -> None:
        """Seed new generators, since another number of processes, `saved`, began this run."""
        self.say(
            f"--resume: {saved} processes began this run and {self.context.size} go on with it; "
            f"from step {self.progress.batches} on, dropout draws other numbers than theirs"
        )
        torch.manual_seed(self.context.rank_seed(hash((self.config.train.seed, self.progress.batches)) % 2**63))


def make_objective(
    config: Config, model: MultitaskBERT, device: Device, context: DistributedContext, plan: Plan
) -> Objective | MaskedWordObjective:
    """Return the objective that a configuration asks for."""
    options, size = config.train, config.train.micro_batch_size
    grad_cache = None if size is None else GradCache(model, size, context.rank_seed(options.seed), device.device)
    if options.mlm:
        return MaskedWordObjective(config, model, device, grad_cache)
    momentum_model = None
    if any(task.bregman > 0.0 for task in config.tasks.values()):
        steps = sum(len(ROUTINES[options.routine](plan, epoch)) for epoch in range(options.epochs))
        momentum_model = MomentumModel(model, options, steps)
    return Objective(config, model, device, context, build_auxiliary_losses(config), momentum_model, grad_cache)
