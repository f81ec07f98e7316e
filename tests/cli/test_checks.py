"""Combinations of options that make no sense are refused, and the message names both flags."""

import pytest
from helpers import ROOT, configure, refusal


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--pair_encoding cross --pair_features u,v", ("--pair_features", "--pair_encoding")),
        ("--pair_encoding cross --sts_head cosine", ("--sts_head", "--pair_encoding")),
        ("--arch v2 --pair_encoding siamese", ("--pair_encoding", "--pair_features")),
        ("--sts_projection", ("--sts_projection", "--sts_head")),
        ("--arch cosine --pair_encoding cross --sts_projection", ("--sts_projection", "--pair_encoding")),
        ("--clf linear --head_layers 2", ("--head_layers", "--clf")),
        ("--clf linear --head_width 5", ("--head_width", "--clf")),
        ("--clf conv --output_dropout_prob .1", ("--output_dropout_prob", "--clf mlp")),
        ("--clf mlp --head_layers 0 --output_dropout_prob .1", ("--output_dropout_prob", "--head_layers")),
        ("--clf mlp --head_batchnorm", ("--head_batchnorm", "--clf")),
        ("--pair_features cos --pair_layer none", ("--pair_features cos", "--clf conv")),
        ("--pair_layer none --shared_batchnorm_stats", ("--shared_batchnorm_stats", "--pair_layer")),
        ("--sst_clf linear --sst_head_layers 2", ("--sst_head_layers", "--sst_clf")),
        ("--sst_head_layers 0 --sst_head_width 9", ("--sst_head_width", "--sst_head_layers")),
        ("--quora_clf mlp --para_head_batchnorm", ("--para_head_batchnorm", "--para_clf")),
        ("--arch v2 --sts_clf linear --sts_output_dropout_prob .1", ("--sts_output_dropout_prob", "--sts_clf mlp")),
        ("--arch r4 --sts_clf conv", ("--sts_clf", "--sts_head regression")),
        ("--arch v1 --pair_features cos --para_clf conv", ("--para_clf conv", "--pair_features cos")),
        ("--predict x.txt --task sst", ("--predict", "--evaluate")),
        ("--predict x.txt --evaluate a.pt", ("--predict", "--task")),
        ("--predict x.txt --evaluate a.pt --task mnli", ("--task mnli", "sst")),
        ("--overwrite --resume --run_dir x", ("--overwrite", "--resume")),
        ("--resume", ("--resume", "--run_dir")),
        ("--decoupled --optim AdamW", ("--decoupled", "--optim")),
        ("--cache_frozen --fine_tune_mode full-model", ("--cache_frozen", "--fine_tune_mode full-model")),
        ("--cache_frozen --fine_tune_mode last-layer --lora_mode attn", ("--cache_frozen", "--lora_mode")),
        ("--cache_frozen --sst_embedding_loss simcse", ("--cache_frozen", "--sst_embedding_loss simcse")),
        ("--lr_cycle cumulative --lr_schedule cosine", ("--lr_cycle", "--lr_schedule")),
        ("--warmup .3", ("--warmup", "--lr_schedule linear")),
        ("--use_gpu --amp --cuda_graphs --benchmark a.csv", ("--cuda_graphs", "--benchmark")),
        ("--run_dir a --name b", ("--name", "--run_dir")),
        ("--sst_weight 0 --quora_weight 0 --sts_weight 0", ("--NAME_weight", "0")),
        ("--train_sst --sst_weight 0", ("--NAME_weight", "0")),
        ("--routine random --num_sts_trains 2", ("--num_sts_trains", "--routine")),
        ("--unfreeze_every 2 --fine_tune_mode full-model", ("--unfreeze_every", "--fine_tune_mode")),
        ("--smart_steps 2", ("--smart_steps", "--NAME_smart")),
        ("--sst_smart 1 --smart_steps 0 --smart_eta 1", ("--smart_eta", "--smart_steps 0")),
        ("--sst_smart 1 --smart_steps 0 --smart_sigma 0", ("--smart_steps 0", "--smart_sigma 0")),
        ("--sst_smart 1 --sts_smart_divergence kl", ("--sts_smart_divergence", "--sts_bregman")),
        ("--sst_smart 1 --cache_frozen", ("--sst_smart", "--cache_frozen")),
        ("--pcgrad --routine interleave", ("--pcgrad", "--routine")),
        ("--routine joint --steps_per_epoch 3 --num_sst_trains 3", ("--steps_per_epoch", "--num_sst_trains 3")),
        ("--routine joint --optimizers per-task", ("--optimizers per-task", "--routine joint")),
        ("--optimizers one", ("--optimizers one", "--sst_lr_multiplier 4 --para_lr_multiplier 5")),
        (
            "--optimizers one --train_sst --train_cfimdb --sst_weight_decay 0",
            ("--optimizers one", "--sst_weight_decay 0"),
        ),
        ("--steps_per_epoch 10", ("--steps_per_epoch", "--routine")),
        ("--anneal_factor 0.5 --routine random", ("--anneal_factor", "--routine annealed")),
        ("--sts_embedding_weight 2", ("--sts_embedding_weight", "--sts_embedding_loss")),
        ("--sts_loss mse --sts_mixed_weight 1", ("--sts_mixed_weight", "--sts_loss mixed")),
        ("--sts_embedding_loss ranking --contrastive_margin 2", ("--contrastive_margin", "--NAME_embedding_loss")),
        ("--ranking_scale 1", ("--ranking_scale", "--NAME_embedding_loss ranking")),
        ("--sst_embedding_loss contrastive", ("--sst_embedding_loss contrastive", "pair task")),
        ("--arch v2 --para_embedding_loss contrastive", ("--para_embedding_loss contrastive", "--pair_encoding")),
        ("--sst_embedding_loss simcse --backbone_dropout_prob 0", ("--sst_embedding_loss", "--backbone_dropout_prob")),
        ("--cuda_graphs --amp", ("--cuda_graphs", "--use_gpu")),
        ("--cuda_graphs --use_gpu", ("--cuda_graphs", "--amp")),
        ("--cuda_graphs --use_gpu --amp --cache_frozen", ("--cuda_graphs", "--cache_frozen")),
        ("--cuda_graphs --use_gpu --amp --mlm", ("--cuda_graphs", "--mlm")),
        ("--ema_decay .9", ("--ema_decay", "--average ema")),
        ("--swa_from_epoch 2 --average ema", ("--swa_from_epoch", "--average swa")),
        ("--swa_from_epoch 8 --average swa", ("--swa_from_epoch", "--epochs")),
        ("--quora_from_epoch 8", ("--para_from_epoch 8", "--epochs 7")),
        ("--evaluate a.pt --train_para", ("--evaluate", "--train_para")),
        ("--evaluate a.pt --lr 1e-4 --quora_weight 2", ("--evaluate", "--lr, --para_weight")),
        ("--evaluate a.pt --predict x.txt --task sst --data_dir d", ("--predict", "--data_dir")),
        ("--evaluate a.pt --export d --sst_dev x.csv", ("--export", "--sst_dev")),
        ("--evaluate a.pt --export_peft d --run_dir r", ("--export_peft", "--run_dir")),
        ("--task sst", ("--task", "--predict or --export_onnx")),
        ("--export_onnx d --task sst", ("--export_onnx", "--evaluate")),
        ("--evaluate a.pt --export d --task sst", ("--task", "--export_onnx")),
        ("--evaluate a.pt --export_task mnli d", ("--export_task mnli", "quora")),
        ("--evaluate a.pt --export_onnx d --lr 1e-4", ("--export_onnx", "--lr")),
        ('--lora_rank 2 --lora_dict {"r":1}', ("--lora_dict", "--lora_rank")),
        ("--lora_rank 2", ("--lora_rank", "--lora_mode")),
        ("--init_peft a --init_from a.pt", ("--init_from", "--init_peft")),
        ("--lora_mode attn --dora_norm column", ("--dora_norm", "--dora")),
        ("--benchmark a.csv --profile", ("--profile", "--benchmark")),
        ("--save_every often", ("--save_every often", "30m")),
        ("--use_gpu --amp --cuda_graphs --micro_batch_size 4", ("--cuda_graphs", "--micro_batch_size")),
        ("--cache_frozen --pal pal", ("--cache_frozen", "--pal pal")),
        ("--mlm --patience 2", ("--mlm", "--patience")),
        ("--mlm --cache_frozen", ("--mlm", "--cache_frozen")),
        ("--mlm --sst_smart 1", ("--mlm", "--sst_smart")),
        ("--mlm --sts_bregman 1", ("--mlm", "--sts_bregman")),
        ("--pal_size 24", ("--pal_size", "--pal")),
        ("--pal low-rank --pal_heads 6", ("--pal low-rank", "--pal_heads")),
        ("--pal pal --pal_size 205", ("--pal_size 205", "--pal_size 216")),
        ("--pal pal --pal_tasks mnli", ("--pal_tasks mnli", "quora")),
        ("--train_sst --pal pal --pal_tasks quora", ("--pal_tasks quora", "--train_quora")),
        ("--sst_from_epoch 2 --quora_from_epoch 2 --sts_from_epoch 2", ("epoch 1", "--NAME_from_epoch")),
        ("--train_sst --num_sst_trains 0", ("--num_NAME_trains", "0")),
        ("--no_train_sst --no_train_para --no_train_sts", ("--train_NAME", "task")),
    ],
)
def test_contradictions_name_both_flags(words: str, named: tuple[str, str]) -> None:
    message = refusal(configure, *words.split())
    assert named[0] in message and named[1] in message


def test_a_task_that_does_not_train_needs_no_agreement() -> None:
    configure("--optimizers", "one", "--num_para_trains", 0, "--num_sts_trains", 0)


@pytest.mark.parametrize("task", ["sst", "quora", "sts"])
@pytest.mark.parametrize("recipe", ["minilm-cpu", "minilm-counterpart", "minilm-lora"])
def test_a_recipe_trains_any_one_of_its_tasks(recipe: str, task: str) -> None:
    """Its choices for the other tasks are not in the way."""
    configure(f"@{ROOT}/recipes/small/{recipe}.args", f"--train_{task}")


def test_flags_that_evaluation_reads() -> None:
    """All others are refused, even with their default, since they would change nothing."""
    run = "--data_dir d --max_bad_rows 1 --run_dir r --no_test_predictions --quora_dev x --sst_test y"
    machine = "--use_gpu --amp --threads 1 --eval_batch_size 8"
    configure("--evaluate", "a.pt", *run.split(), *machine.split())
    configure("--evaluate", "a.pt", "--predict", "x", "--task", "sst", "--pretrained", "b", *machine.split())
    exports = "--export x --export_peft y --export_task quora z --export_onnx z --task sst"
    configure("--evaluate", "a.pt", *exports.split(), "--pretrained", "b", *machine.split())
    assert "--epochs would" in refusal(configure, "--evaluate", "a.pt", "--epochs", 7)


def test_every_problem_is_reported_at_once() -> None:
    words = "--overwrite --resume --pcgrad --predict x.txt --pair_encoding cross --sts_head cosine --sts_projection"
    message = refusal(configure, *words.split())
    for flag in ("--overwrite", "--run_dir", "--pcgrad", "--evaluate", "--task", "--sts_head", "--sts_projection"):
        assert flag in message


def test_a_learning_rate_beyond_any_float_is_refused() -> None:
    line = refusal(configure, "--lr", 1e20, "--sts_lr_multiplier", 1e20)
    assert "--lr 1e+20 times --sts_lr_multiplier 1e+20" in line and "--sst_lr_multiplier" not in line


def test_what_needs_one_process_is_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    configure()
    predict = ["--evaluate", "a.pt", "--predict", "x.txt", "--task", "sst"]
    assert "--mlm works in one process" in refusal(configure, "--mlm")
    assert "--predict works in one process" in refusal(configure, *predict)
    assert "--cuda_graphs" in refusal(configure, "--use_gpu", "--amp", "--cuda_graphs")
    assert "--cache_frozen keeps" in refusal(configure, "--cache_frozen")
