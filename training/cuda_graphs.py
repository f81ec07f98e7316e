"""One pass of a training step, forward and backward: run as it is written, or replayed from CUDA graphs.

A small BERT keeps a GPU busy for less time than Python needs to start its some two thousand kernels. A CUDA graph is a
recording of them that starts at once. It has fixed shapes and fixed memory, so that batches get a tail up to one of a
few token counts (packing.bucket) and are copied to where the recording reads them.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bert import BertSelfAttention
from config import Config
from kernels.flash_attention import works
from text.packing import Batch, PackedBatch
from training.seen import Term
from training.task_sampling import Step
from utils.device import Device
from utils.errors import UserError, first_line

# Loss and outputs [B] or [B, C], without their history, of a step's batch and labels [B]; gradients are added to those
# that the parameters have.
Compute = Callable[[Step, Batch, Tensor], tuple[Tensor, Tensor]]

USES = 3  # of a shape until it is recorded: rare ones, as an epoch's last batch, are not worth the second it takes
GRAPHS = 32  # at most; each keeps gradients of its own, the rest of their memory is shared


class Passes:
    """What the loop talks to, and the choice without --cuda_graphs."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute

    def __call__(self, step: Step, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and outputs of a batch; gradients are added to those that the parameters have."""
        return self.compute(step, batch, labels)

    def report(self) -> str | None:
        """What there is to tell of the passes since the last report."""
        return None

    def release(self) -> bool:
        """Free the memory that is held for speed alone; whether there was any."""
        return False

    def refuse(self, task: str, reason: str) -> None:
        """From now on the passes of a task run as written, for this reason."""


@dataclass
class Recording:
    """A pass with fixed memory: `replay` reads `inputs` and writes the rest."""

    inputs: list[Tensor]
    loss: Tensor
    outputs: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]
    replay: Callable[[], None]


Recorded = tuple[Tensor, Tensor, list[tuple[nn.Parameter, Tensor]]]  # loss, outputs, gradients


class Recorder:
    """Records by CUDA's stream capture.

    All recordings share one pool of memory, since one runs at a time: a replay writes to all that others have there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.renew()

    def renew(self) -> None:
        """Begin another pool, as torch demands once the recordings of one are gone."""
        torch.cuda.synchronize(self.device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Recorded]) -> tuple[Recorded, Callable[[], None]]:
        """What `function` returns, once the function behind it has run, which does its work again."""
        graph, computing = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # "thread_local", since other threads may pin memory meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                recorded = function()
        except BaseException:
            torch.cuda.set_stream(computing)  # which a capture that fails at its very begin or end does not do
            raise
        return recorded, graph.replay


class GraphedPasses(Passes):
    """Records the pass of each task and shape at its third use and replays it from then on; the others run as written.

    A recording holds for what it was made under: task, share of the loss, shapes, which parameters train and where
    they are, and whether the model is in training mode. Autocast and the terms of the loss are the same in a whole run.
    """

    def __init__(
        self,
        compute: Compute,
        model: nn.Module,
        recorder: Recorder,
        refusals: dict[str, str],
        say: Callable[[str], None],
    ) -> None:
        """`refusals` has, for the tasks that cannot be recorded, the reason."""
        super().__init__(compute)
        self.model, self.recorder, self.refusals, self.say = model, recorder, refusals, say
        self.parameters = list(model.parameters())
        self.recordings: dict[Hashable, Recording] = {}
        self.uses: Counter[Hashable] = Counter()
        self.state: Hashable = None
        self.counts: Counter[str] = Counter()
        self.most = GRAPHS

    def __call__(self, step: Step, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and outputs of a batch; gradients are added to those that the parameters have."""
        assert isinstance(batch, PackedBatch)
        key, reason = self.key(step, batch, labels), self.refusals.get(step.task)
        recording = self.recordings.get(key) if reason is None else None
        if reason is None and recording is None:
            self.uses[key] += 1
            if self.uses[key] < USES:
                reason = "of a rare shape"
            elif len(self.recordings) >= self.most:
                reason = f"beyond the {self.most} graphs that are kept"
            else:
                recording = self.record(key, step, batch, labels)
                reason = self.refusals.get(step.task)
        if recording is None:
            self.counts[str(reason)] += 1
            return self.compute(step, batch, labels)
        self.counts["replayed"] += 1
        return self.replay(recording, step, batch, labels)

    def key(self, step: Step, batch: PackedBatch, labels: Tensor) -> Hashable:
        """All that a recording of this pass would hold for; forgets the recordings that hold no longer."""
        state = tuple((own.requires_grad, own.data_ptr()) for own in self.parameters), self.model.training
        if state != self.state:
            self.state = state
            self.forget()
        return step.task, step.share, batch.num_tokens, batch.num_sequences, batch.max_seqlen, len(labels)

    def record(self, key: Hashable, step: Step, batch: PackedBatch, labels: Tensor) -> Recording | None:
        """Record the pass of a batch; None where that fails, and then its task is not tried again."""
        inputs = {name: own.clone() for name, own in batch.tensors().items()}
        own_labels = labels.clone()
        kept = [parameter.grad for parameter in self.parameters]

        def run() -> Recorded:
            loss, outputs = self.compute(step, batch.with_tensors(inputs), own_labels)
            return loss, outputs, [(own, own.grad) for own in self.parameters if own.grad is not None]

        try:
            for parameter in self.parameters:
                parameter.grad = None  # so that the recording writes gradients and adds to none
            (loss, outputs, gradients), replay = self.recorder(run)
        except RuntimeError as error:
            self.refuse(step.task, "that could not be recorded")
            self.forget()  # a failed capture may have taken memory that other recordings count on
            self.say(f"--cuda_graphs: {step.task} cannot be recorded and runs without ({first_line(error)})")
            return None
        finally:
            for parameter, gradient in zip(self.parameters, kept, strict=True):
                parameter.grad = gradient
        self.recordings[key] = Recording([*inputs.values(), own_labels], loss, outputs, gradients, replay)
        return self.recordings[key]

    def replay(self, recording: Recording, step: Step, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and outputs by a recording; gradients stay in its memory, unless they wait for another pass."""
        torch._foreach_copy_(recording.inputs, [*batch.tensors().values(), labels])
        recording.replay()
        for parameter, gradient in recording.gradients:
            own = gradient if step.moves else gradient.clone()
            parameter.grad = own if parameter.grad is None else parameter.grad + own
        return recording.loss.clone(), recording.outputs.clone()

    def forget(self) -> None:
        """Drop all recordings, and the memory that they share."""
        self.recordings.clear()
        self.uses.clear()
        self.recorder.renew()

    def release(self) -> bool:
        """Drop all recordings; half as many are made from then on."""
        self.most = len(self.recordings) // 2
        there = bool(self.recordings)
        self.forget()
        return there

    def refuse(self, task: str, reason: str) -> None:
        """From now on the passes of a task run as written, for this reason."""
        self.refusals[task] = reason

    def report(self) -> str | None:
        """How many passes were replayed since the last report, and why the others were not."""
        counts, self.counts = self.counts, Counter()
        replayed = counts.pop("replayed", 0)
        others = "".join(f", {count:,} {reason}" for reason, count in counts.items())
        return f"--cuda_graphs: {replayed:,} passes replayed from {len(self.recordings)} graphs{others}"


def check_device(config: Config, device: Device) -> None:
    """Raise UserError where an option asks for what the device lacks."""
    if config.train.cuda_graphs and device.device.type != "cuda":
        raise UserError(f"--cuda_graphs: the device is {device.device.type}, which has none; drop it")
    if config.run.fsdp and device.scaled:
        raise UserError(
            "--fsdp: this GPU has no bf16, and an overflow of the fp16 gradients of --amp would be seen by the process "
            "alone in whose shard it is; drop --amp"
        )


def passes_of(
    config: Config,
    model: nn.Module,
    device: Device,
    terms: Mapping[str, Sequence[Term]],
    compute: Compute,
    say: Callable[[str], None],
) -> Passes:
    """What --cuda_graphs asks for. Raises UserError as `check_device` does."""
    check_device(config, device)
    if not config.train.cuda_graphs:
        return Passes(compute)
    refusals = {task: "with further losses" for task, own in terms.items() if own}
    layers = [module for module in model.modules() if isinstance(module, BertSelfAttention)]
    widths = {len(layer.query.weight) // layer.heads for layer in layers}
    if device.amp is None or not all(works(device.device, device.amp, width) for width in widths):
        refusals = dict.fromkeys(terms, "whose attention is padded")  # to shapes of each batch's own
    return GraphedPasses(compute, model, Recorder(device.device), refusals, say)
