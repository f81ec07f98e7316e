"""Masked language modelling: which words are masked, and the head against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import changed, copied, make_trainer
from test_base_bert import CONFIG, hf_model, hf_state, reference_state, write_weights
from test_multitask_bert import make_model, options
from torch import Tensor

from base_bert import load_mlm_head, load_weights
from models.mlm import MaskedWordHead, Masking
from models.multitask_bert import MultitaskBERT
from tasks import SST
from text.packing import PackedBatch, pack, pack_padded
from text.tokenizer import Tokenizer, load_tokenizer
from utils.errors import UserError

HEAD = ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "bias")


# ------------------------------------------------------------------------------------------------------ what is masked


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    return load_tokenizer(tiny_bert, 64)


def many_words(tokenizer: Tokenizer, sequences: int = 2000, length: int = 25) -> PackedBatch:
    """[CLS] words [SEP], among the words each special token now and then."""
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


def test_only_ids_change_and_the_batch_itself_stays(tokenizer: Tokenizer) -> None:
    batch = many_words(tokenizer, 50)
    before = batch.input_ids.clone()
    masked, _, _ = Masking(tokenizer)(batch, np.random.default_rng(0))
    assert torch.equal(batch.input_ids, before) and not torch.equal(masked.input_ids, before)
    for name in ("token_type_ids", "position_ids", "cu_seqlens", "order", "restore"):
        assert getattr(masked, name) is getattr(batch, name)


def test_masks_are_dynamic_and_addressed(tokenizer: Tokenizer) -> None:
    batch, masking = many_words(tokenizer, 50), Masking(tokenizer)
    first, again, other = (masking(batch, np.random.default_rng([1, seed])) for seed in (0, 0, 1))
    assert torch.equal(first[0].input_ids, again[0].input_ids) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1]) if len(first[1]) == len(other[1]) else True


# -------------------------------------------------------------------------------------------- against transformers


def random_ids(size: int = 6, longest: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and token types [size, longest]; the second half of each text has type 1."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, longest + 1, (size,), generator=generator)
    position = torch.arange(longest)
    mask = (position < lengths[:, None]).long()
    ids = torch.randint(5, CONFIG.vocab_size, mask.shape, generator=generator) * mask
    return ids, mask, ((position >= lengths[:, None] // 2) & mask.bool()).long()


def test_loss_and_all_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    """From a checkpoint with a head of its own, all biases random: the tied embeddings have both their gradients."""
    source = hf_model("BertForPreTraining")  # with a pooler, as bert-base-uncased has one
    source.tie_weights()
    peer: Any = transformers.BertForMaskedLM(source.config).eval()
    peer.load_state_dict({name: own for name, own in source.state_dict().items() if name in peer.state_dict()})
    peer.double().tie_weights()
    folder = write_weights(tmp_path / "bert", {k: v for k, v in hf_state(source).items() if ".decoder." not in k})

    model = MultitaskBERT(options(arch="v2"), CONFIG, {"sst": SST}).eval()
    model.add_mlm_heads()
    model.load_backbones(load_weights(folder, CONFIG))
    assert model.load_mlm_heads(folder)
    model.double()
    ids, mask, types = random_ids()
    labels = torch.full_like(ids, -100)
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4) & mask.bool()
    labels[chosen] = torch.randint(5, CONFIG.vocab_size, (int(chosen.sum()),))

    wanted = peer(input_ids=ids, attention_mask=mask, token_type_ids=types, labels=labels)
    wanted.loss.backward()
    batch = pack_padded(ids, mask, types)
    at = labels[batch.order[batch.sequence_ids], batch.position_ids]  # [T], as the packed batch has its rows
    rows = (at != -100).nonzero().squeeze(1)
    logits = model.masked_words("sst", model.hidden_rows("sst", batch, rows))
    loss = torch.nn.functional.cross_entropy(logits, at[rows])
    loss.backward()

    found = wanted.logits[batch.order[batch.sequence_ids], batch.position_ids][rows]
    torch.testing.assert_close(logits, found, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, wanted.loss, rtol=1e-12, atol=1e-12)
    transform = peer.cls.predictions.transform
    parameters = [*transform.dense.parameters(), *transform.LayerNorm.parameters(), peer.cls.predictions.bias]
    theirs = dict(zip(HEAD, parameters, strict=True))
    ours = dict(model.mlm["shared"].named_parameters())
    assert set(ours) == set(HEAD) and all(own.abs().min() > 0 for own in theirs.values())
    pairs = [(ours[name].grad, theirs[name].grad) for name in HEAD]
    names = {own.data_ptr(): name for name, own in reference_state(peer.bert).items()}
    backbone = dict(model.backbone("sst").named_parameters())
    for parameter in peer.bert.parameters():
        pairs.append((backbone.pop(names[parameter.data_ptr()]).grad, parameter.grad))
    assert set(backbone) == {"pooler_dense.weight", "pooler_dense.bias"}
    for own, other in pairs:
        assert own is not None and other is not None and other.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-9 * float(other.abs().max()) + 1e-12)


def test_the_head_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    state = hf_state(hf_model("BertForPreTraining"))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): own.half()
        for name, own in state.items()
        if ".decoder." not in name
    }
    found = load_mlm_head(write_weights(tmp_path / "old", old, "bin"), CONFIG)
    assert found is not None and tuple(found) == HEAD
    prefix = "cls.predictions."
    wanted = [f"{prefix}transform.dense.weight", f"{prefix}transform.dense.bias", f"{prefix}transform.LayerNorm.weight"]
    wanted += [f"{prefix}transform.LayerNorm.bias", f"{prefix}bias"]
    for name, key in zip(HEAD, wanted, strict=True):
        assert found[name].dtype == torch.float32 and torch.equal(found[name], state[key].half().float())
    MaskedWordHead(CONFIG).load_state_dict(found)
    assert load_weights(tmp_path / "old", CONFIG).keys() == reference_state(hf_model()).keys()


def test_half_a_head_is_refused(tmp_path: Path) -> None:
    state = {k: v for k, v in hf_state(hf_model("BertForPreTraining")).items() if ".decoder." not in k}
    del state["cls.predictions.bias"]
    state["cls.predictions.transform.dense.bias"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"missing: cls.predictions.bias.*dense.bias is \[3\], not \[32\]"):
        load_mlm_head(write_weights(tmp_path / "bert", state), CONFIG)


def test_without_a_head_the_transform_is_initialised(tiny_flags: list[str], tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--mlm")
    assert "has no head of masked words; a new one is trained" in capsys.readouterr().out
    own = trainer.model.mlm["sentiment"].state_dict()
    assert (
        not own["bias"].any() and not own["dense.bias"].any() and torch.equal(own["layer_norm.weight"], torch.ones(32))
    )
    assert own["dense.weight"].std().item() == pytest.approx(trainer.model.bert_config.initializer_range, rel=0.1)
    plain = make_trainer(tiny_flags, tmp_path / "plain").model
    weights = copied(trainer.model)
    assert changed(copied(plain), {name: weights[name] for name in plain.state_dict()}) == set()  # heads too


def test_heads_and_pair_layer_do_not_train_under_mlm() -> None:
    model = make_model(arch="yin-yang")
    model.add_mlm_heads()
    assert model.pair_layer is not None
    assert not any(own.requires_grad for part in (model.heads, model.pair_layer) for own in part.parameters())
