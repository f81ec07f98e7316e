"""CUDA graphs (--cuda_graphs): replay the forward and backward pass of a batch.

Python needs more time to start the two thousand kernels of a step than a GPU needs to run them for a small BERT. A CUDA
graph starts all of them at once. It has fixed shapes and fixed memory: batches are padded to one of a few token counts
(`text.packing.bucket`) and copied to where the graph reads them.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bert import BertSelfAttention
from config import Config
from kernels.varlen_attention import first_working
from text.packing import PackedBatch
from training.auxiliary_losses import build_auxiliary_losses
from training.loader import LoadedBatch
from utils.device import Device
from utils.errors import UserError, first_line, is_out_of_memory

USES = 3  # of a shape until it is captured: rare ones, such as an epoch's last batch, are not worth the second it takes
GRAPHS = 32  # at most

# Computes the loss and outputs of a batch, without their history, and adds its gradients, scaled, to the parameters'.
Compute = Callable[[LoadedBatch, float], tuple[Tensor, Tensor]]


@dataclass
class CapturedGraph:
    """A pass with fixed memory: `replay` reads `inputs` and writes the rest."""

    inputs: list[Tensor]
    loss: Tensor
    outputs: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]
    replay: Callable[[], None]


Captured = tuple[Tensor, Tensor, list[tuple[nn.Parameter, Tensor]]]  # loss, outputs, gradients


class Capturer:
    """Captures work of a CUDA stream.

    All graphs share one pool of memory, since one runs at a time: a replay writes to the memory of all others.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.renew()

    def renew(self) -> None:
        """Begin a new pool; torch demands it once the graphs of the old pool are gone."""
        torch.cuda.synchronize(self.device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Captured]) -> tuple[Captured, Callable[[], None]]:
        """Return what `function` returns and a function that does its work again, which must run first."""
        graph, computing = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # "thread_local", since other threads may pin memory meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                captured = function()
        except BaseException:
            torch.cuda.set_stream(computing)  # a capture that fails at its beginning or end does not do this
            self.leave_pool()
            raise
        return captured, graph.replay

    def leave_pool(self) -> None:
        """Let torch's allocator leave the pool after a failed capture.

        Where CUDA has made the capture invalid, torch does not do this. Every later `record_stream` would then keep its
        tensor for ever.
        """
        pool = torch.cuda.current_device(), self.pool
        with suppress(RuntimeError):  # it has left
            torch._C._cuda_endAllocateToPool(*pool)
            torch._C._cuda_releasePool(*pool)


class CudaGraphRunner:
    """Captures the pass of each task and shape at its third use, replays it from then on, and runs the others eagerly.

    A graph holds for what it was captured under: the task, the scale of the loss, the shapes, which parameters train,
    where they are, and whether the model is in training mode. Autocast and auxiliary losses stay the same in a run.
    """

    def __init__(
        self,
        compute: Compute,
        model: nn.Module,
        capturer: Capturer,
        refusals: dict[str, str],
        say: Callable[[str], None],
    ) -> None:
        """`refusals` maps each task that cannot be captured to the reason."""
        self.compute, self.model, self.capturer, self.refusals, self.say = compute, model, capturer, refusals, say
        self.parameters = list(model.parameters())
        self.graphs: dict[Hashable, CapturedGraph] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}  # which all graphs write
        self.uses: Counter[Hashable] = Counter()
        self.state: Hashable = None
        self.counts: Counter[str] = Counter()
        self.most = GRAPHS

    def __call__(self, batch: LoadedBatch, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
        """Return the loss and outputs of a batch and add its gradients to those of the parameters.

        With `keep`, the gradients must survive passes of other batches.
        """
        key, reason = self.key(batch, scale), self.refusals.get(batch.task)
        graph = self.graphs.get(key)
        if reason is None and graph is None:
            self.uses[key] += 1
            if self.uses[key] < USES:
                reason = "of a rare shape"
            elif len(self.graphs) >= self.most:
                reason = f"beyond the {self.most} graphs that are kept"
            else:
                graph = self.capture(key, batch, scale)
                reason = self.refusals.get(batch.task)
        if graph is None:
            self.counts[str(reason)] += 1
            return self.compute(batch, scale)
        self.counts["replayed"] += 1
        return self.replay(graph, batch, keep)

    def key(self, batch: LoadedBatch, scale: float) -> Hashable:
        """Return all that a graph of this pass would hold for; drop the graphs that hold no longer."""
        state = tuple((parameter.requires_grad, parameter.data_ptr()) for parameter in self.parameters)
        if (state, self.model.training) != self.state:
            self.state = state, self.model.training
            self.drop_graphs()
        packed = batch.inputs
        assert isinstance(packed, PackedBatch)
        return batch.task, scale, packed.num_tokens, packed.num_sequences, packed.max_seqlen, len(batch.labels)

    def capture(self, key: Hashable, batch: LoadedBatch, scale: float) -> CapturedGraph | None:
        """Capture the pass of a batch; return None where that fails, and try the task no more.

        After a lack of memory, half as many graphs are kept and the capture is tried again.
        """
        while True:
            try:
                self.graphs[key] = self.captured(batch, scale)
                return self.graphs[key]
            except RuntimeError as error:
                cause = first_cause(error)
            lacks_memory = is_out_of_memory(cause)
            if lacks_memory and self.graphs:
                self.most = max(1, len(self.graphs) // 2)
                self.drop_graphs(keep=self.most - 1)
                continue
            self.refusals[batch.task] = "for lack of memory" if lacks_memory else "that could not be captured"
            self.drop_graphs(keep=len(self.graphs))
            self.say(f"--cuda_graphs: a pass of {batch.task} could not be captured ({first_line(cause)})")
            return None

    def captured(self, batch: LoadedBatch, scale: float) -> CapturedGraph:
        """Return the graph of the pass of a batch. Raises RuntimeError where that fails."""
        assert isinstance(batch.inputs, PackedBatch)
        inputs = {name: tensor.clone() for name, tensor in batch.inputs.tensors().items()}
        copied = replace(batch, inputs=batch.inputs.with_tensors(inputs), labels=batch.labels.clone())
        waiting = [parameter.grad for parameter in self.parameters]
        if not self.gradients:  # not in the memory of any graph
            self.gradients = {p: torch.empty_like(p) for p in self.parameters if p.requires_grad}

        def run() -> Captured:
            loss, outputs = self.compute(copied, scale)
            computed = [(parameter, parameter.grad) for parameter in self.parameters if parameter.grad is not None]
            gradients = [(parameter, self.gradients[parameter]) for parameter, _ in computed]
            if computed:
                torch._foreach_copy_([into for _, into in gradients], [gradient for _, gradient in computed])
            return loss, outputs, gradients

        try:
            for parameter in self.parameters:
                parameter.grad = None  # so that the graph writes gradients and adds to none
            (loss, outputs, gradients), replay = self.capturer(run)
        finally:
            for parameter, gradient in zip(self.parameters, waiting, strict=True):
                parameter.grad = gradient
        return CapturedGraph(copied.tensors(), loss, outputs, gradients, replay)

    def replay(self, graph: CapturedGraph, batch: LoadedBatch, keep: bool) -> tuple[Tensor, Tensor]:
        """Return the loss and outputs of a batch by a graph. Gradients stay in its memory unless they must `keep`."""
        torch._foreach_copy_(graph.inputs, batch.tensors())
        graph.replay()
        add_gradients(graph.gradients, keep)
        return graph.loss.clone(), graph.outputs.clone()

    def drop_graphs(self, keep: int = 0) -> None:
        """Drop all graphs but the first `keep`; without any, drop the memory that they share."""
        for key in list(self.graphs)[keep:]:
            del self.graphs[key]
        if not self.graphs:
            self.uses.clear()
            self.gradients.clear()
            self.capturer.renew()

    def report(self) -> str:
        """Return how many passes were replayed since the last report, and why the others were not."""
        counts, self.counts = self.counts, Counter()
        replayed = counts.pop("replayed", 0)
        others = "".join(f", {count:,} {reason}" for reason, count in counts.items())
        return f"--cuda_graphs: {replayed:,} passes replayed from {len(self.graphs)} graphs{others}"


def first_cause(error: Exception) -> Exception:
    """Return the error that came first: torch fails once more as it ends a capture that has failed."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def add_gradients(computed: Sequence[tuple[nn.Parameter, Tensor]], keep: bool) -> None:
    """Add gradients in a graph's memory to those of their parameters, by one launch for all.

    With `keep`, the sums survive the next replay, since they lie in other memory.
    """
    waiting = [(parameter.grad, gradient) for parameter, gradient in computed if parameter.grad is not None]
    first = [(parameter, gradient) for parameter, gradient in computed if parameter.grad is None]
    if waiting:
        torch._foreach_add_([total for total, _ in waiting], [gradient for _, gradient in waiting])
    gradients = [gradient for _, gradient in first]
    if keep and first:
        gradients = [torch.empty_like(gradient) for gradient in gradients]
        torch._foreach_copy_(gradients, [gradient for _, gradient in first])
    for (parameter, _), gradient in zip(first, gradients, strict=True):
        parameter.grad = gradient


def check_device(config: Config, device: Device) -> None:
    """Raise UserError where an option asks for what the device lacks."""
    if config.train.cuda_graphs and device.device.type != "cuda":
        raise UserError(f"--cuda_graphs: the device is {device.device.type}, which has none; drop it")


def make_cuda_graph_runner(
    config: Config, model: nn.Module, device: Device, compute: Compute, say: Callable[[str], None]
) -> CudaGraphRunner | None:
    """Return what --cuda_graphs asks for; None without it. Raises UserError as `check_device` does."""
    check_device(config, device)
    if not config.train.cuda_graphs:
        return None
    auxiliary = build_auxiliary_losses(config)
    refusals = {task: "with auxiliary losses" for task, losses in auxiliary.items() if losses}
    layers = [module for module in model.modules() if isinstance(module, BertSelfAttention)]
    widths = {len(layer.query.weight) // layer.heads for layer in layers}
    dtype = device.amp or torch.float32
    if not all(first_working(device.device, dtype, width) for width in widths):
        refusals = dict.fromkeys(config.tasks, "whose attention is padded")  # to shapes of each batch's own
    return CudaGraphRunner(compute, model, Capturer(device.device), refusals, say)
