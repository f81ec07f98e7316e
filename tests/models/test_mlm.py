"""Masked language modelling: which words are masked, and the head against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import TINY, copied, hf_model, make_model, model_options, our_names, refusal, write_weights
from torch import Tensor

from base_bert import load_mlm_head, load_weights
from models.mlm import Masking
from models.multitask_bert import MultitaskBERT
from tasks import SST
from text.packing import PackedBatch, pack, pack_padded
from text.tokenizer import Tokenizer, load_tokenizer

HEAD = {  # our names and transformers'
    "dense.weight": "cls.predictions.transform.dense.weight",
    "dense.bias": "cls.predictions.transform.dense.bias",
    "layer_norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "layer_norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "bias": "cls.predictions.bias",
}


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    return load_tokenizer(tiny_bert, 64)


def many_words(tokenizer: Tokenizer, sequences: int = 2000, length: int = 25) -> PackedBatch:
    """Return sequences of [CLS], words and [SEP], with a special token among the words of each."""
    ids = np.random.default_rng(5).integers(0, tokenizer.vocab_size, (sequences, length)).astype(np.int32)
    ids[:, 7] = np.arange(sequences) % 5  # the five special tokens
    ids[:, 0], ids[:, -1] = tokenizer.cls_id, tokenizer.sep_id
    lengths = np.full(sequences, length)
    return pack(ids.ravel(), lengths, lengths)


def test_shares_of_masked_replaced_and_kept_words(tokenizer: Tokenizer) -> None:
    batch = many_words(tokenizer)
    special = np.isin(batch.input_ids.numpy(), tokenizer.special_ids)
    masked, rows, words = Masking(tokenizer)(batch, np.random.default_rng(0))
    count, eligible = len(rows), (~special).sum()
    assert not special[rows].any() and torch.equal(words, batch.input_ids[rows])
    assert abs(count / eligible - 0.15) < 4 * np.sqrt(0.15 * 0.85 / eligible)
    new = masked.input_ids[rows]
    others = torch.ones(batch.num_tokens, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(masked.input_ids[others], batch.input_ids[others])
    became_mask = (new == tokenizer.mask_id).double().mean().item()
    stayed = (new == words).double().mean().item()
    bound = 4 * np.sqrt(0.25 / count)
    assert abs(became_mask - 0.8) < bound and abs(stayed - 0.1 - 0.1 / tokenizer.vocab_size) < bound
    replaced = new[(new != tokenizer.mask_id) & (new != words)]
    assert not np.isin(replaced.numpy(), tokenizer.special_ids).any()
    assert len(replaced.unique()) > 0.5 * min(len(replaced), tokenizer.vocab_size)  # from the whole vocabulary


def test_masks_are_addressed_and_change_only_ids_of_a_copy(tokenizer: Tokenizer) -> None:
    batch, masking = many_words(tokenizer, 50), Masking(tokenizer)
    before = batch.input_ids.clone()
    first, again, other = (masking(batch, np.random.default_rng([1, seed])) for seed in (0, 0, 1))
    assert torch.equal(first[0].input_ids, again[0].input_ids) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0].input_ids, other[0].input_ids)
    assert torch.equal(batch.input_ids, before) and not torch.equal(first[0].input_ids, before)
    for name in ("token_type_ids", "position_ids", "cu_seqlens", "order", "restore"):
        assert getattr(first[0], name) is getattr(batch, name)


def random_ids(size: int = 6, longest: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and token types [size, longest]; the second half of each text has type 1."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, longest + 1, (size,), generator=generator)
    position = torch.arange(longest)
    mask = (position < lengths[:, None]).long()
    ids = torch.randint(5, TINY.vocab_size, mask.shape, generator=generator) * mask
    return ids, mask, ((position >= lengths[:, None] // 2) & mask.bool()).long()


def test_loss_and_all_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    """From a checkpoint with a head, all biases random. The tied embeddings have both their gradients."""
    source = hf_model("BertForPreTraining")  # with a pooler, as bert-base-uncased has one
    peer: Any = transformers.BertForMaskedLM(source.config).eval()
    peer.load_state_dict({name: tensor for name, tensor in source.state_dict().items() if name in peer.state_dict()})
    peer.double().tie_weights()
    folder = write_weights(tmp_path / "bert", {k: v for k, v in copied(source).items() if ".decoder." not in k})

    model = MultitaskBERT(model_options(arch="v2"), TINY, {"sst": SST}).eval()
    model.add_mlm_heads()
    model.load_backbones(load_weights(folder, TINY))
    assert model.load_mlm_heads(folder)
    model.double()
    ids, mask, types = random_ids()
    labels = torch.full_like(ids, -100)
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4) & mask.bool()
    labels[chosen] = torch.randint(5, TINY.vocab_size, (int(chosen.sum()),))

    wanted = peer(input_ids=ids, attention_mask=mask, token_type_ids=types, labels=labels)
    wanted.loss.backward()
    batch = pack_padded(ids, mask, types)
    packed_labels = labels[batch.order[batch.sequence_ids], batch.position_ids]  # [T]
    rows = (packed_labels != -100).nonzero().squeeze(1)
    logits = model.masked_words("sst", model.hidden_rows("sst", batch, rows))
    loss = torch.nn.functional.cross_entropy(logits, packed_labels[rows])
    loss.backward()
    peer_logits = wanted.logits[batch.order[batch.sequence_ids], batch.position_ids][rows]
    torch.testing.assert_close(logits, peer_logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, wanted.loss, rtol=1e-12, atol=1e-12)

    found = {f"bert.{name}": p for name, p in model.backbone("sst").named_parameters() if "pooler" not in name}
    found |= {f"head.{name}": p for name, p in model.mlm["shared"].named_parameters()}
    theirs = {f"bert.{name}": p for name, p in our_names(peer.bert).items()}
    theirs |= {f"head.{ours}": peer.get_parameter(name) for ours, name in HEAD.items()}
    assert found.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
        bound = 1e-9 * float(parameter.grad.abs().max()) + 1e-12
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-8, atol=bound)


def test_the_head_of_a_checkpoint_is_read_or_refused(tmp_path: Path) -> None:
    """In the old spelling and in half precision; half a head is an error, none is None."""
    state = {k: v for k, v in copied(hf_model("BertForPreTraining")).items() if ".decoder." not in k}
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.half()
        for name, tensor in state.items()
    }
    found = load_mlm_head(write_weights(tmp_path / "old", old, legacy=True), TINY)
    assert found is not None and found.keys() == HEAD.keys()
    for ours, theirs in HEAD.items():
        assert found[ours].dtype == torch.float32 and torch.equal(found[ours], state[theirs].half().float())
    del state["cls.predictions.bias"]
    state["cls.predictions.transform.dense.bias"] = torch.zeros(3)
    message = refusal(load_mlm_head, write_weights(tmp_path / "half", state), TINY)
    assert "missing: cls.predictions.bias" in message and "dense.bias is [3], not [16]" in message
    none = write_weights(tmp_path / "none", copied(hf_model()))
    assert load_mlm_head(none, TINY) is None
    model = MultitaskBERT(model_options(), TINY, {"sst": SST})
    model.add_mlm_heads()
    assert not model.load_mlm_heads(none)  # and the new one is initialised as BERT is
    head = model.mlm["sentiment"].state_dict()
    assert not head["bias"].any() and not head["dense.bias"].any() and (head["layer_norm.weight"] == 1).all()
    assert head["dense.weight"].std().item() == pytest.approx(TINY.initializer_range, rel=0.2)


def test_heads_and_pair_layer_do_not_train_under_mlm() -> None:
    model = make_model(arch="yin-yang")
    model.add_mlm_heads()
    assert model.pair_layer is not None
    assert not any(p.requires_grad for part in (model.heads, model.pair_layer) for p in part.parameters())
    listed = [id(p) for part in dict(model.parts()).values() for p in part]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    reached = {names[id(p)] for p in model.task_parameters("sst")}
    assert not any(name.startswith(("heads.", "pair_layer.")) for name in reached)
    assert {name for name in names.values() if name.startswith("mlm.sentiment.")} <= reached
