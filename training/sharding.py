"""--fsdp: backbones that are sharded over ranks (torch's FSDP2; Zhao et al. 2023, "PyTorch FSDP").

Of every tensor of a backbone's layers, and of its word embedding, each rank keeps its share of the rows, with their
gradient and optimizer states. A layer is whole only while it computes: its weights are gathered before the pass forward
and again before the pass back, after which the ranks' gradients are summed and each keeps its rows of the sum. What is
small (heads, pair layer, PALs, poolers, the other embeddings) is whole on every rank, as in `Ranks`.

So the weights, gradients and optimizer states of n ranks take about one nth each in training. Two moments take more.
At the start and in every evaluation each rank has all weights, since evaluation has other numbers of batches on each
and could not gather layer by layer; gradients and states are never whole. To save, tensors are gathered one by one
into the main memory of rank 0; to go on, each process reads the whole file into its own. The files are those of one
process, so that any number of ranks goes on from them, with or without --fsdp.

With --amp the half-precision copies of a batch's layers are whole from the pass forward to the pass back. On a CPU the
word embedding keeps memory for the gradient of all its rows (bert.WordEmbedding).
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bert import BertModel, Linear
from datasets import Batches
from models.checkpoint import check_state_dict
from models.multitask_bert import MultitaskBERT
from optimizer import local
from training.distributed import Ranks, Reducer
from utils.device import Device


class Shards(Ranks):
    """The processes that torchrun started, each with a share of the backbones."""

    def attach(self, model: MultitaskBERT) -> None:
        super().attach(model)
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
        for backbone in model.backbones.values():
            assert isinstance(backbone, BertModel)
            shard(backbone, mesh)
        self.reducer = Reducer([own for own in model.parameters() if not isinstance(own, DTensor)])

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        mine, common = (
            [local(own) for own in gradients if isinstance(own, DTensor) == sharded] for sharded in (True, False)
        )
        square = torch.nn.utils.get_total_norm(mine).square()
        dist.all_reduce(square)
        return (square + torch.nn.utils.get_total_norm(common).square()).sqrt()

    def predict(self, model: nn.Module, data: Batches, device: Device, batch_size: int) -> np.ndarray:
        with gathered(model):
            return super().predict(model, data, device, batch_size)

    # What files hold

    def weights(self, model: MultitaskBERT) -> dict[str, Tensor]:
        return self.kept(model.state_dict())

    def states(self, optimizer: Optimizer) -> dict[str, Any]:
        content, parameters = optimizer.state_dict(), parameters_of(optimizer)
        state = {
            number: self.kept({name: as_shard(value, parameters[number]) for name, value in own.items()})
            for number, own in content["state"].items()
        }
        return {**content, "state": state}

    @torch.no_grad()
    def kept(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """What rank 0 keeps of a mapping in its main memory, shards put together; nothing on the others."""
        out = {}
        for name, own in tensors.items():
            whole = own.full_tensor() if isinstance(own, DTensor) else own
            if self.leads:
                out[name] = whole.cpu() if isinstance(whole, Tensor) else whole
        return out

    @torch.no_grad()
    def load(self, model: MultitaskBERT, weights: Mapping[str, Tensor], source: Path, left_out: Set[str]) -> None:
        own = model.state_dict()
        if self.leads:
            check_state_dict(own, weights, source, left_out)
        for name, tensor in own.items():
            if name in left_out:
                continue
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            if self.leads:
                whole.copy_(weights[name])
            dist.broadcast(whole, 0)
            local(tensor).copy_(self.rows(whole) if isinstance(tensor, DTensor) else whole)

    def load_states(self, optimizer: Optimizer, content: Mapping[str, Any]) -> None:
        parameters = parameters_of(optimizer)

        def cut(value: Any, parameter: Tensor) -> Any:
            sharded = isinstance(value, Tensor) and isinstance(parameter, DTensor)
            return self.rows(value).clone() if sharded else value  # a view would keep all of the file in memory

        state = {
            number: {name: cut(value, parameters[number]) for name, value in own.items()}
            for number, own in content["state"].items()
        }
        optimizer.load_state_dict({**content, "state": state})

    def rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor, of which the last ranks may have fewer or none."""
        chunks = whole.chunk(self.size)
        return chunks[self.rank] if self.rank < len(chunks) else whole[:0]


def shard(backbone: BertModel, mesh: DeviceMesh) -> None:
    """Shard a backbone's layers and word embedding over the ranks of `mesh`."""
    modules = (backbone.word_embedding, *backbone.bert_layers)
    parts = [fully_shard(module, mesh=mesh, reshard_after_forward=True) for module in modules]
    for part in parts:
        part.set_gradient_divide_factor(1.0)  # each rank's loss is that of the global batch: sums, not means
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    parts[0].set_unshard_in_backward(False)  # its gradient needs the tokens only
    # The backbone itself shards nothing more, but makes one sequence of them: layers are gathered ahead of their turn.
    common = {own for own in backbone.parameters() if not isinstance(own, DTensor)}
    fully_shard(backbone, mesh=mesh, ignored_params=common)
    register_fsdp_forward_method(backbone, "sentence_embedding")
    for module in backbone.modules():
        if isinstance(module, Linear):
            module.keeps_copies = False


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every rank has all weights, and passes forward need no other rank."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """An optimizer's parameters by their numbers in its `state_dict`."""
    return [own for group in optimizer.param_groups for own in group["params"]]


def as_shard(state: Any, parameter: Tensor) -> Any:
    """A state of a parameter as a part of what all ranks have of it; what is no tensor, or whole, as it is."""
    if not isinstance(state, Tensor) or not isinstance(parameter, DTensor):
        return state
    return DTensor.from_local(
        state, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
