"""Auxiliary losses: what a task's loss can have beside the loss of its outputs, as functions of a forward pass."""

from torch import Tensor

from config import Config
from text.packing import PackedBatch
from training.losses import contrastive, cosine_embedding, multiple_negatives_ranking, simcse
from training.objective import AuxiliaryLoss, ForwardResult
from training.smart import bregman_loss, divergence, divergence_of, smart_loss


def contrastive_loss(result: ForwardResult) -> Tensor:
    """Return `contrastive` of a siamese pair batch; a similarity counts as its share of the highest label."""
    first, second = result.gather_texts(result.embedding).chunk(2)  # [B, H] each
    return contrastive(first, second, label_shares(result), result.objective.config.train.contrastive_margin)


def simcse_loss(result: ForwardResult) -> Tensor:
    """Return `simcse` of the batch's embeddings and of those of a second pass with other dropout masks."""
    again = result.objective.embed(result.batch, result.batch.inputs, view=1)
    temperature = result.objective.config.train.simcse_temperature
    return simcse(result.gather_texts(result.embedding), result.gather_texts(again), temperature)


# As shares of the highest similarity: 4, 3.5 and 1 of 5 (R4, section 4.3).
EQUIVALENT, SIMILAR, DIFFERENT = 0.8, 0.7, 0.2


def label_shares(result: ForwardResult) -> Tensor:
    """Return the labels [B] as shares of the task's highest label."""
    return result.batch.labels / result.objective.model.tasks[result.batch.task].label_range[1]


def text_hashes(batch: PackedBatch) -> Tensor:
    """Return a number [S] for each sequence, in the caller's order: equal for equal sequences, and hardly ever else."""
    mixed = (batch.input_ids + 1) * (batch.position_ids * 0x9E3779B97F4A7C1 + 0x2545F4914F6CDD1D)  # wraps around
    mixed = (mixed ^ (mixed >> 29)) * 0x3C79AC492BA7B653  # or a text's mirror image would have the same sum
    sums = mixed.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, mixed)
    return sums[batch.restore]


def ranking_loss(result: ForwardResult) -> Tensor:
    """Return `multiple_negatives_ranking` of the equivalent pairs of a siamese batch."""
    assert isinstance(result.batch.inputs, PackedBatch)
    first, second = result.gather_texts(result.embedding).chunk(2)  # [B, H] each
    a, b = result.gather_texts(text_hashes(result.batch.inputs)).chunk(2)
    same = (a[:, None] == a) | (b[:, None] == b) | (a[:, None] == b) | (b[:, None] == a)
    scale = result.objective.config.train.ranking_scale
    return multiple_negatives_ranking(first, second, label_shares(result) >= EQUIVALENT, same, scale)


def cosine_loss(result: ForwardResult) -> Tensor:
    """Return `cosine_embedding` of the clearly similar and the clearly different pairs of a siamese batch."""
    first, second = result.gather_texts(result.embedding).chunk(2)  # [B, H] each
    shares = label_shares(result)
    return cosine_embedding(first, second, shares >= SIMILAR, shares < DIFFERENT)


EMBEDDING_LOSSES: dict[str, AuxiliaryLoss] = {
    "contrastive": contrastive_loss,
    "simcse": simcse_loss,
    "ranking": ranking_loss,
    "cosine": cosine_loss,
}


def rdrop_loss(weight: float) -> AuxiliaryLoss:
    """Return the loss of a second pass with other dropout masks, plus `weight` times its distance from the first.

    The distance is half the symmetric KL divergence (Wu et al. 2021, "R-Drop", equations 2 to 4), or half the squared
    error of similarities.
    """

    def loss(result: ForwardResult) -> Tensor:
        objective, batch = result.objective, result.batch
        embedding = objective.embed(batch, batch.inputs, view=1)
        again = result.gather(objective.model.outputs(batch.task, embedding))
        distance = divergence(divergence_of(result), result.outputs, again) / 2
        return objective.loss_of(batch, again) + weight * distance

    return loss


def weighted(loss: AuxiliaryLoss, weight: float) -> AuxiliaryLoss:
    """Return `loss` times `weight`."""
    return lambda result: weight * loss(result)


def build_auxiliary_losses(config: Config) -> dict[str, list[AuxiliaryLoss]]:
    """Return the auxiliary losses of each task that the options ask for."""
    losses: dict[str, list[AuxiliaryLoss]] = {name: [] for name in config.tasks}
    for name, options in config.tasks.items():
        if options.embedding_loss != "none":
            losses[name].append(weighted(EMBEDDING_LOSSES[options.embedding_loss], options.embedding_weight))
        if options.rdrop > 0.0:
            losses[name].append(rdrop_loss(options.rdrop))
        if options.smart > 0.0:
            losses[name].append(weighted(smart_loss(config.train), options.smart))
        if options.bregman > 0.0:
            losses[name].append(weighted(bregman_loss, options.bregman))
    return losses
