"""Terms: what a task's loss can have beside the loss itself, as functions of all that one training pass has seen."""

from torch import Tensor

from config import Config
from text.packing import PackedBatch
from training.losses import contrastive, cosine_embedding, multiple_negatives_ranking, simcse
from training.seen import Seen, Term
from training.smart import bregman_term, smart_term


def contrastive_term(seen: Seen) -> Tensor:
    """`contrastive` of a siamese pair batch; a similarity counts as the share of its highest label."""
    first, second = seen.gather_texts(seen.embedding).chunk(2)  # [B, H] each
    return contrastive(first, second, label_shares(seen))


def simcse_term(seen: Seen) -> Tensor:
    """`simcse` of the batch's embeddings and of those that a second pass gives under other dropout masks."""
    again = seen.model.embed(seen.task, seen.batch)
    return simcse(seen.gather_texts(seen.embedding), seen.gather_texts(again))


# As shares of the highest similarity: 4, 3.5 and 1 of 5 (R4, section 4.3).
EQUIVALENT, SIMILAR, DIFFERENT = 0.8, 0.7, 0.2


def label_shares(seen: Seen) -> Tensor:
    """The labels [B] as shares of the task's highest one."""
    return seen.labels / seen.model.tasks[seen.task].label_range[1]


def text_hashes(batch: PackedBatch) -> Tensor:
    """A number [S] for each sequence in the caller's order that equal token sequences share, and others hardly ever."""
    mixed = (batch.input_ids + 1) * (batch.position_ids * 0x9E3779B97F4A7C1 + 0x2545F4914F6CDD1D)  # wraps around
    mixed = (mixed ^ (mixed >> 29)) * 0x3C79AC492BA7B653  # or a text's mirror image would have the same sum
    sums = mixed.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, mixed)
    return sums[batch.restore]


def ranking_term(seen: Seen) -> Tensor:
    """`multiple_negatives_ranking` of the equivalent pairs of a siamese batch."""
    assert isinstance(seen.batch, PackedBatch)
    first, second = seen.gather_texts(seen.embedding).chunk(2)  # [B, H] each
    a, b = seen.gather_texts(text_hashes(seen.batch)).chunk(2)
    same = (a[:, None] == a) | (b[:, None] == b) | (a[:, None] == b) | (b[:, None] == a)
    return multiple_negatives_ranking(first, second, label_shares(seen) >= EQUIVALENT, same)


def cosine_term(seen: Seen) -> Tensor:
    """`cosine_embedding` of the clearly similar and the clearly different pairs of a siamese batch."""
    first, second = seen.gather_texts(seen.embedding).chunk(2)
    shares = label_shares(seen)
    return cosine_embedding(first, second, shares >= SIMILAR, shares < DIFFERENT)


EMBEDDING_TERMS: dict[str, Term] = {
    "contrastive": contrastive_term,
    "simcse": simcse_term,
    "ranking": ranking_term,
    "cosine": cosine_term,
}


def weighted(term: Term, weight: float) -> Term:
    """`term` times `weight`."""
    return lambda seen: weight * term(seen)


def terms_of(config: Config, task: str) -> list[Term]:
    """The terms that the options ask for in the loss of `task`."""
    own, out = config.tasks[task], []
    if own.embedding_loss != "none":
        out.append(weighted(EMBEDDING_TERMS[own.embedding_loss], own.embedding_weight))
    if own.smart > 0.0:
        out.append(weighted(smart_term(config.train), own.smart))
    if own.bregman > 0.0:
        out.append(weighted(bregman_term, own.bregman))
    return out
