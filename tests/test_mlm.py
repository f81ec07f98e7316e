"""Masked language modelling: which words are masked, the head against transformers, and runs of --mlm."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import cut
from helpers import configure, refusal
from test_base_bert import CONFIG, hf_model, hf_state, reference_state, write_weights
from test_memory import limit
from test_multitask_bert import make_model, options
from test_training import assert_resumes, changed, copied, make_trainer, metrics
from torch import Tensor
from training.pretraining import Pretrainer

import ensemble
import multitask_classifier
from base_bert import load_mlm_head, load_weights
from cli.parser import parse
from models.checkpoint import load, load_model
from models.mlm import MaskedWordHead, Masking
from models.multitask_bert import MultitaskBERT
from studies.results import figures
from tasks import DEFAULT_TASKS, SST, TASKS
from text.packing import PackedBatch, pack, pack_padded
from text.tokenizer import Tokenizer, load_tokenizer
from training.task_sampling import Step
from utils.errors import UserError

HEAD = ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "bias")


def make_pretrainer(flags: list[str], run_dir: Path, *more: object) -> Pretrainer:
    """A Pretrainer as the script makes it; there is no dev data."""
    trainer = make_trainer(flags, run_dir, "--mlm", *more)
    parts = trainer.config, trainer.model, trainer.tokenizer, trainer.train_data, {}, trainer.device, trainer.run
    return Pretrainer(*parts, trainer.say)


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


def test_a_batch_without_words_has_none_masked(tiny_flags: list[str], tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its loss is 0, and its gradient too."""
    ids = np.array([tokenizer.cls_id, tokenizer.special_ids[1], tokenizer.sep_id])
    _, rows, words = Masking(tokenizer)(pack(ids, np.array([3]), np.array([3])), np.random.default_rng(0))
    assert len(rows) == len(words) == 0
    trainer = make_pretrainer(tiny_flags, tmp_path / "run", "--train_sst")
    trainer.masking = lambda batch, generator: (batch, rows, words)  # type: ignore[assignment]
    loss, *_, norm = trainer.train_step(Step("sst", np.arange(3)), True)
    assert loss.item() == 0 and norm.item() == 0


def test_a_lack_of_memory_is_one_line(tiny_flags: list[str], tmp_path: Path) -> None:
    """Nothing is cut, since the head works on all words of a batch."""
    trainer = make_pretrainer(tiny_flags, tmp_path / "run", "--train_sst")
    failed = limit(trainer, "sst", 0, "cuda")
    with pytest.raises(UserError, match="SST sentiment: out of memory with 8 examples of --mlm; lower --batch_size"):
        trainer.fit()
    assert failed == [8]


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
    logits = model.masked_words("sst", batch, rows)
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
    trainer = make_pretrainer(tiny_flags, tmp_path / "run")
    assert "has no head of masked words; a new one is trained" in capsys.readouterr().out
    own = trainer.model.mlm["sentiment"].state_dict()
    assert (
        not own["bias"].any() and not own["dense.bias"].any() and torch.equal(own["layer_norm.weight"], torch.ones(32))
    )
    assert own["dense.weight"].std().item() == pytest.approx(trainer.model.bert_config.initializer_range, rel=0.1)
    plain = make_trainer(tiny_flags, tmp_path / "plain").model
    weights = copied(trainer.model)
    assert changed(copied(plain), {name: weights[name] for name in plain.state_dict()}) == set()  # heads too


# ---------------------------------------------------------------------------------------------------------------- runs


def texts_alone(folder: Path) -> Path:
    """Small data without any dev or test file."""
    cut(folder, 20)
    for path in folder.glob("*.csv"):
        if "train" not in path.name:
            path.unlink()
    return folder


def run(flags: list[str], folder: Path, *more: object) -> Path:
    multitask_classifier.main([*flags, "--mlm", "--run_dir", str(folder), *map(str, more)])
    return folder


@pytest.mark.parametrize("arch", ["yin-yang", "v2"])
def test_a_run_reads_training_texts_alone_and_its_loss_falls(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    data = texts_alone(tmp_path / "data")
    flags = [*tiny_flags, "--data_dir", str(data), "--arch", arch, "--epochs", "6", "--lr_schedule", "constant"]
    folder = run(flags, tmp_path / "run")
    lines = metrics(folder)
    assert len(lines) == 6 and all(line["dev"] == {} for line in lines)
    for task in DEFAULT_TASKS:
        assert lines[-1]["train"][task]["loss"] < lines[0]["train"][task]["loss"] - 0.3
        assert set(lines[0]["train"][task]) == {"loss", "lr", "steps"}
    assert lines[0]["trains"] == "the backbones and the heads of masked words train"
    assert json.loads((folder / "scores.json").read_text()) == {"dev": {}, "epoch": 6, "checkpoint": "best.pt"}
    assert sorted(path.name for path in folder.glob("[!.]*")) == [
        "best.pt", "config.json", "metrics.jsonl", "scores.json", "tensorboard", "timing.jsonl",
    ]  # fmt: skip


def test_labels_make_no_difference(tiny_flags: list[str], tmp_path: Path) -> None:
    """To the bit: all labels of the training files are others."""
    weights = []
    for name in ("a", "b"):
        data = texts_alone(tmp_path / f"data-{name}")
        if name == "b":
            for path in data.glob("*.csv"):
                header, *rows = path.read_text().splitlines()
                path.write_text("\n".join([header, *(row.rpartition("\t")[0] + "\t1" for row in rows)]) + "\n")
        folder = run([*tiny_flags, "--data_dir", str(data), "--no_tensorboard"], tmp_path / name)
        weights.append(load(folder / "best.pt")["weights"])
    assert changed(*weights) == set()


def test_heads_and_poolers_stay_and_all_else_trains(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_pretrainer(tiny_flags, tmp_path / "run", "--epochs", 1)
    before = copied(trainer.model)
    trainer.fit()
    moved = changed(before, copied(trainer.model))
    names = {name for name, _ in trainer.model.named_parameters()}
    still = {name for name in names if name.startswith(("heads.", "pair_layer.")) or "pooler_dense" in name}
    assert moved == names - still
    rows = dict(trainer.model.parts())
    assert {"masked words sentiment", "masked words similarity"} <= set(rows)
    listed = [id(p) for own in rows.values() for p in own]
    assert sorted(listed) == sorted(id(p) for p in trainer.model.parameters())


def test_the_loss_is_that_of_the_masked_words_alone(tiny_flags: list[str], tmp_path: Path) -> None:
    """A training pass with dropout off, from the masks up, by hand; the weight of the task counts."""
    off = ["--backbone_dropout_prob", 0, "--sst_weight", 0.5]
    trainer = make_pretrainer(tiny_flags, tmp_path / "run", "--arch", "v2", *off)
    step = Step("para", np.arange(7))
    trainer.step = 4
    loss, losses, words = trainer.forward(step)
    generator = np.random.default_rng([trainer.config.train.seed, *b"mlm", 4])
    masked, rows, wanted = trainer.masking(trainer.train_data["para"].batch(step.indices), generator)
    backbone, head = trainer.model.backbone("para"), trainer.model.mlm["shared"]
    hidden = backbone.encode(backbone.embed(masked), masked)
    logits = head(hidden, backbone.word_embedding.weight)[rows]
    expected = torch.logsumexp(logits, dim=1) - logits[torch.arange(len(rows)), wanted]
    assert torch.equal(words, wanted) and len(rows) > 5
    torch.testing.assert_close(losses, expected) and torch.testing.assert_close(loss, expected.mean())
    sst, losses, _ = trainer.forward(Step("sst", np.arange(7)))
    torch.testing.assert_close(sst, losses.mean() / 2)


def test_each_epoch_masks_anew(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_pretrainer(tiny_flags, tmp_path / "run", "--train_sst", "--epochs", 2)
    seen: list[Tensor] = []
    original = trainer.masking

    def watched(batch: PackedBatch, generator: np.random.Generator) -> Any:
        out = original(batch, generator)
        seen.append(out[0].input_ids)
        return out

    monkeypatch.setattr(trainer, "masking", watched)
    trainer.fit()
    assert len(seen) == 6 and len({tuple(own.tolist()) for own in seen}) == 6


@pytest.mark.parametrize("more", [[], ["--routine", "joint", "--pcgrad", "--average", "ema"]])
def test_resuming_goes_on_bit_for_bit(tiny_flags: list[str], tmp_path: Path, more: list[str]) -> None:
    assert_resumes(tiny_flags, tmp_path, "--epochs", 3, *more, after=1, make=make_pretrainer)


def test_fine_tuning_starts_from_it(tiny_flags: list[str], tmp_path: Path) -> None:
    """Bitwise, with heads that are those of a run without; the new run has no head of masked words."""
    folder = run([*tiny_flags, "--no_tensorboard"], tmp_path / "mlm")
    plain = make_trainer(tiny_flags, tmp_path / "plain").model
    trainer = make_trainer(tiny_flags, tmp_path / "fine", "--init_from", folder / "best.pt")
    source = load(folder / "best.pt")["weights"]
    own = copied(trainer.model)
    assert not trainer.model.mlm and {name for name in source if name not in own} == {
        f"mlm.{backbone}.{name}" for backbone in ("sentiment", "similarity") for name in HEAD
    }
    assert changed(own, {name: source[name] for name in own}) == set()
    heads = [name for name in own if name.startswith(("heads.", "pair_layer."))]
    assert all(torch.equal(own[name], plain.state_dict()[name]) for name in heads)
    assert trainer.fit()["score"] > 0


@pytest.mark.parametrize("more", [["--arch", "duality"], ["--clf", "mlp", "--pair_layer", "none"], ["--pal", "pal"]])
def test_fine_tuning_may_have_other_heads(tiny_flags: list[str], tmp_path: Path, more: list[str]) -> None:
    """Those of --mlm were never trained: only the backbones are handed over."""
    folder = run([*tiny_flags, "--no_tensorboard", "--epochs", "1"], tmp_path / "mlm")
    plain = copied(make_trainer(tiny_flags, tmp_path / "plain", *more).model)
    own = copied(make_trainer(tiny_flags, tmp_path / "fine", *more, "--init_from", folder / "best.pt").model)
    source = load(folder / "best.pt")["weights"]
    for name, tensor in own.items():
        assert torch.equal(tensor, source[name] if name.startswith("backbones.") else plain[name]), name


def test_a_backbone_that_no_word_was_masked_for_is_the_pretrained_one(tiny_flags: list[str], tmp_path: Path) -> None:
    first = run([*tiny_flags, "--no_tensorboard", "--train_sst"], tmp_path / "first") / "best.pt"
    plain = copied(make_trainer(tiny_flags, tmp_path / "plain").model)
    own = copied(make_trainer(tiny_flags, tmp_path / "fine", "--init_from", first).model)
    source = load(first)["weights"]
    for name, tensor in own.items():
        assert torch.equal(tensor, source[name] if name.startswith("backbones.sentiment.") else plain[name]), name


def test_it_goes_on_from_itself_and_from_a_fine_tuned_model(tiny_flags: list[str], tmp_path: Path) -> None:
    first = run([*tiny_flags, "--no_tensorboard", "--train_sst"], tmp_path / "first") / "best.pt"
    again = make_pretrainer(tiny_flags, tmp_path / "again", "--train_sst", "--init_from", first).model
    assert changed(load(first)["weights"], copied(again)) == set()
    make_trainer(tiny_flags, tmp_path / "tuned", "--train_sst").fit()
    tuned = tmp_path / "tuned" / "best.pt"
    other = copied(make_pretrainer(tiny_flags, tmp_path / "other", "--train_sst", "--init_from", tuned).model)
    weights = load(tuned)["weights"]
    assert changed(weights, {name: other[name] for name in weights}) == set()


@pytest.mark.parametrize(
    "more",
    [
        ["--lora_mode", "all-lin-only", "--lora_rank", "2"],
        ["--pal", "low-rank", "--pal_low_rank_size", "4"],
        ["--arch", "r4", "--routine", "annealed"],
        ["--fine_tune_mode", "iterative", "--extra_clean", "--no_extra_clean"],
    ],
)
def test_it_goes_with_other_methods(tiny_flags: list[str], tmp_path: Path, more: list[str]) -> None:
    """The checkpoint reads back as the model that trained."""
    trainer = make_pretrainer(tiny_flags, tmp_path / "run", *more)
    before = copied(trainer.model)
    trainer.fit()
    moved = changed(before, copied(trainer.model))
    assert any(name.startswith("mlm.") for name in moved) and any(name.startswith("backbones.") for name in moved)
    again, _, _ = load_model(tmp_path / "run" / "best.pt")
    assert changed(copied(trainer.model), copied(again)) == set()


def test_a_checkpoint_without_trained_heads_is_not_evaluated(
    tiny_flags: list[str], small_data: Path, tmp_path: Path
) -> None:
    best = run([*tiny_flags, "--no_tensorboard", "--train_sst"], tmp_path / "run") / "best.pt"
    for more in ([], ["--predict", "-", "--task", "sst"]):
        message = refusal(lambda *words: multitask_classifier.main(list(words)), "--evaluate", str(best), *more)
        assert "--mlm" in message and "--init_from" in message
    words = [str(best), "--data_dir", str(small_data), "--run_dir", str(tmp_path / "e")]
    message = refusal(lambda *words: ensemble.main(list(words)), *words)
    assert "--mlm" in message and "--init_from" in message
    multitask_classifier.main(["--evaluate", str(best), "--export", str(tmp_path / "exported")])
    bert = transformers.BertModel.from_pretrained(tmp_path / "exported" / "sentiment")
    own = load(best)["weights"]["backbones.sentiment.word_embedding.weight"]
    assert torch.equal(bert.embeddings.word_embeddings.weight, own)


def test_the_plan_says_what_trains(tiny_flags: list[str], capsys: Any) -> None:
    multitask_classifier.main([*tiny_flags, "--mlm", "--train_sst", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("SST sentiment") and line.endswith("masked words") for line in lines)
    assert any(line.split()[:2] == ["head", "sst"] and line.split()[-2:] == ["0", "0.0%"] for line in lines)
    assert any(line.startswith("masked words sentiment") and line.endswith("100.0%") for line in lines)


def test_a_sweep_has_rows_of_it(tiny_flags: list[str], tmp_path: Path) -> None:
    run([*tiny_flags, "--no_tensorboard", "--train_sst"], tmp_path / "run")
    row = figures(tmp_path / "run")
    assert "score" not in row and row["checkpoint_bytes"] > 0


def test_everything_trains_unless_something_else_is_said() -> None:
    def mode(*words: str) -> str:
        return parse(list(words), TASKS, "test", "Test.").train.fine_tune_mode

    assert mode("--mlm") == "full-model" and mode() == "iterative"
    assert mode("--mlm", "--fine_tune_mode", "iterative") == "iterative"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--patience 3", "--patience"),
        ("--cache_frozen --fine_tune_mode last-layer", "--cache_frozen"),
        ("--sst_smart 1", "--sst_smart"),
        ("--quora_bregman 1", "--para_bregman"),
        ("--sts_embedding_loss ranking", "--sts_embedding_loss"),
    ],
)
def test_what_needs_labels_is_refused(words: str, named: str) -> None:
    message = refusal(configure, "--mlm", *words.split())
    assert named in message and "--mlm" in message


def test_heads_and_pair_layer_do_not_train_under_mlm() -> None:
    model = make_model(arch="yin-yang")
    model.add_mlm_heads()
    assert model.pair_layer is not None
    assert not any(own.requires_grad for part in (model.heads, model.pair_layer) for own in part.parameters())


def test_masked_words_train_the_pals_of_their_task(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--mlm", "--pal", "low-rank", "--pal_low_rank_size", 4, "--train_sst", "--epochs", 1, "--no_tensorboard"]
    words = [str(word) for word in [*tiny_flags, *flags, "--run_dir", tmp_path / "run"]]
    multitask_classifier.main(words)
    weights = load(tmp_path / "run" / "best.pt")["weights"]
    pals = [own for name, own in weights.items() if name.startswith("pals.")]
    assert pals and all(own.any() for own in pals)  # V_D starts as zeros
