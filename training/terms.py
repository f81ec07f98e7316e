"""Terms: what a task's loss can have beside the loss itself, as functions of all that one training pass has seen."""

from torch import Tensor

from config import Config
from training.losses import contrastive, simcse
from training.seen import Seen, Term
from training.smart import bregman_term, smart_term


def contrastive_term(seen: Seen) -> Tensor:
    """`contrastive` of a siamese pair batch; a similarity counts as the share of its highest label."""
    first, second = seen.embedding.chunk(2)  # [B, H] each
    return contrastive(first, second, seen.labels / seen.model.tasks[seen.task].label_range[1])


def simcse_term(seen: Seen) -> Tensor:
    """`simcse` of the batch's embeddings and of those that a second pass gives under other dropout masks."""
    return simcse(seen.embedding, seen.model.embed(seen.task, seen.batch))


EMBEDDING_TERMS: dict[str, Term] = {"contrastive": contrastive_term, "simcse": simcse_term}


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
