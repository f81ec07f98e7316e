"""Frozen layers: how many there are, that they keep nothing for a gradient, and passes that begin above them."""

import pytest
import torch
from torch import Tensor

from bert import BertModel
from config import BertConfig
from lora import LoRAConfig, inject
from models.freezing import scheduled_layers, set_trainable
from text.packing import EncodedBatch, PackedBatch, pack_padded

SMALL = BertConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=48,
)  # fmt: skip


def small_batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (5,), generator=generator)
    mask = (torch.arange(12) < lengths[:, None]).long()
    return pack_padded(torch.randint(3, SMALL.vocab_size, mask.shape, generator=generator), mask)


def saved_shapes(backbone: BertModel, batch: PackedBatch | EncodedBatch, pooling: str) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors that a pass saves for backward."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone.sentence_embedding(batch, pooling)
    return shapes


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("adapters", [None, LoRAConfig("attn-only"), LoRAConfig("all-lin", rank=2, dora=True)])
def test_frozen_layers_save_nothing_for_a_gradient(pooling: str, adapters: LoRAConfig | None) -> None:
    """Dropout is on. With the top layers unfrozen, the pass saves what one saves that begins at these layers."""
    backbone, batch = BertModel(SMALL).train(), small_batch()
    if adapters is not None:
        inject(backbone, adapters)
    set_trainable(backbone, 0)
    assert saved_shapes(backbone, batch, pooling) == []
    for trained in (1, 2, 4):
        set_trainable(backbone, trained)
        hidden = torch.randn(batch.num_tokens, SMALL.hidden_size)
        wanted = saved_shapes(backbone, EncodedBatch(hidden, 4 - trained, batch), pooling)
        assert saved_shapes(backbone, batch, pooling) == wanted and len(wanted) > 10 * trained


@pytest.mark.parametrize("depth", [1, 2, 6, 12])
@pytest.mark.parametrize("mode", ["last-layer", "iterative", "full-model"])
def test_the_number_of_frozen_layers(depth: int, mode: str) -> None:
    """What the schedule says is what the parameters say; all layers count as frozen only together with the pooler."""
    backbone = BertModel(BertConfig(9, 2, depth, 1, 4))
    for epoch in range(6):
        layers = scheduled_layers(mode, epoch, depth)
        set_trainable(backbone, layers)
        trains = [any(p.requires_grad for p in layer.parameters()) for layer in backbone.bert_layers]
        assert backbone.frozen_layers() == max(0, depth - layers) == trains.count(False)
        assert trains == sorted(trains)
    set_trainable(backbone, 0)
    backbone.pooler_dense.bias.requires_grad_(True)
    assert backbone.frozen_layers() == depth - 1
    backbone.pos_embedding.weight.requires_grad_(True)
    assert backbone.frozen_layers() == 0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_pass_may_begin_at_any_layer(pooling: str) -> None:
    backbone, batch = BertModel(SMALL).eval(), small_batch()
    wanted = backbone.sentence_embedding(batch, pooling)
    hidden = backbone.embed(batch)
    for layers in range(4):
        assert torch.equal(backbone.sentence_embedding(EncodedBatch(hidden, layers, batch), pooling), wanted)
        hidden = backbone.bert_layers[layers](hidden, batch)
    assert backbone.sentence_embedding(EncodedBatch(wanted, 4, None), pooling) is wanted
