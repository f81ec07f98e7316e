"""Turn texts and pairs of texts into WordPiece token ids, with the `tokenizers` library."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing

from text.tokenizer_files import SPECIAL_TOKENS, check_steps, read_as_stored, read_backend, rebuilt
from utils.errors import UserError, first_line
from utils.files import write_json, write_text

BLOCK = 4096  # texts encoded at a time: an Encoding takes kilobytes, so Quora's 283,000 pairs would take gigabytes
MAX_BYTES = 16 << 20  # of a vocabulary file; those of BERTs have 0.2 to 10 million bytes
MAX_GAPS = 10_000  # ids without a word


@dataclass(frozen=True)
class TokenArrays:
    """S token sequences end to end, N tokens in all."""

    input_ids: np.ndarray  # [N] int32
    offsets: np.ndarray  # [S+1] int64; sequence i is input_ids[offsets[i]:offsets[i+1]]
    second_start: np.ndarray  # [S] int32, position where token type 1 begins; the sequence's length for a single text
    truncated: int  # number of sequences that lost tokens

    def __len__(self) -> int:
        return len(self.second_start)


class Tokenizer:
    """[CLS] a [SEP] and [CLS] a [SEP] b [SEP], at most `max_length` (at least 4) tokens long."""

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int, source: str) -> None:
        """Take over `backend`. Raises UserError, naming `source`, if it is not the tokenizer of a BERT."""
        if not isinstance(backend.model, WordPiece):
            raise UserError(f"{source}: holds no WordPiece model; use the tokenizer of a BERT")
        ids = {token: id for token in SPECIAL_TOKENS.values() if (id := backend.token_to_id(token)) is not None}
        if missing := [token for token in SPECIAL_TOKENS.values() if token not in ids]:
            raise UserError(f"{source}: the vocabulary has no {', '.join(missing)}; use the vocabulary of a BERT")
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())  # ids may have gaps
        if self.vocab_size > len(vocabulary) + MAX_GAPS:  # the library takes memory for each of them
            raise UserError(f"{source}: an id is {self.vocab_size - 1}, of {len(vocabulary)} words; use that of a BERT")
        # A stored tokenizer may pad and truncate by itself (all-MiniLM-L6-v2 does both, to 128 tokens).
        backend.no_padding()
        backend.no_truncation()
        text = backend.to_str()
        check_steps(backend, json.loads(text), source)
        self.pad_id = ids["[PAD]"]
        self.cls_id = ids["[CLS]"]
        self.sep_id = ids["[SEP]"]
        self.mask_id = ids["[MASK]"]
        self.special_ids = tuple(ids.values())
        self.max_length = max_length
        self.source = source
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()  # of everything but `max_length`
        self._backend = backend

    def to_json(self) -> str:
        """Return the tokenizer as text, so that a checkpoint can hold it."""
        return self._backend.to_str()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, with which AutoTokenizer makes the same tokens.

        transformers builds a BertTokenizer anew from the words and a few settings. A tokenizer of which it would make
        another one is written as a PreTrainedTokenizerFast. Raises UserError if a file cannot be written.
        """
        text, config = self.to_json(), {"tokenizer_class": "BertTokenizer", "model_max_length": self.max_length}
        content = json.loads(text)
        normalizer = content["normalizer"] or {}
        settings = {
            "do_lower_case": normalizer.get("lowercase"),
            "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars"),
        }
        if rebuilt(content, settings) == content:
            config |= settings
        else:
            inputs = ["input_ids", "token_type_ids", "attention_mask"]
            config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, **SPECIAL_TOKENS}
            backend = tokenizers.Tokenizer.from_str(text)
            backend.post_processor = TemplateProcessing(
                single="[CLS] $A [SEP]",
                pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                special_tokens=[("[CLS]", self.cls_id), ("[SEP]", self.sep_id)],
            )
            text = backend.to_str()
        write_text(folder / "tokenizer.json", text)
        write_json(folder / "tokenizer_config.json", config)

    @classmethod
    def from_json(cls, text: Any, max_length: int, source: str) -> "Tokenizer":
        """Return the inverse of `to_json`. Raises UserError, naming `source`, if `text` is no BERT tokenizer."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{source}: its tokenizer cannot be read ({error}); save the checkpoint anew") from error
        return cls(backend, max_length, source)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> TokenArrays:
        """Return the token ids of S texts, or of S joined pairs (texts[i], pairs[i]).

        Sequences are cut to `max_length`; the longer text of a pair is cut first. Raises ValueError if `texts` and
        `pairs` differ in length.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)=} differs from {len(pairs)=}")
        special = 2 if pairs is None else 3
        blocks = [np.empty(0, np.int32)]
        offsets, second_start, truncated = [0], [], 0
        for start in range(0, len(texts), BLOCK):
            block = slice(start, start + BLOCK)
            firsts = self._word_pieces(texts[block])
            seconds = [[]] * len(firsts) if pairs is None else self._word_pieces(pairs[block])
            ids: list[int] = []
            for a, b in zip(firsts, seconds, strict=True):
                kept_a, kept_b = longest_first(len(a), len(b), self.max_length - special)
                truncated += kept_a + kept_b < len(a) + len(b)
                ids += [self.cls_id, *a[:kept_a], self.sep_id]
                second_start.append(kept_a + 2)
                if pairs is not None:
                    ids += [*b[:kept_b], self.sep_id]
                offsets.append(offsets[-1] + kept_a + kept_b + special)
            blocks.append(np.array(ids, np.int32))
        return TokenArrays(
            input_ids=np.concatenate(blocks),
            offsets=np.array(offsets, np.int64),
            second_start=np.array(second_start, np.int32),
            truncated=truncated,
        )

    def _word_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of whole texts, without special tokens."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def longest_first(a: int, b: int, budget: int) -> tuple[int, int]:
    """Return how many of `a` and `b` tokens stay if the longer text loses its last token until `budget` are left.

    If both are equally long, the text that was shorter loses the next token (the first text, if neither was). The
    library's truncation follows the same rule, but also builds what it cuts off, for a pair in every combination: two
    texts of a thousand tokens take gigabytes.
    """
    if a + b <= budget:
        return a, b
    shorter = min(a, b, budget // 2)
    return (shorter, budget - shorter) if a <= b else (budget - shorter, shorter)


def load_tokenizer(folder: Path, max_length: int, as_stored: bool = False) -> Tokenizer:
    """Return the tokenizer of a model folder, the same as transformers' AutoTokenizer makes from it.

    With `as_stored`, settings and added tokens in other files than tokenizer.json or vocab.txt do not count.

    Raises UserError if neither file is there, or if the file is damaged or of another kind of model.
    """
    path = next((folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: has no vocabulary; the folder needs tokenizer.json or vocab.txt")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, as no vocabulary of a BERT is; fetch it again")
    try:
        backend = read_as_stored(folder, path) if as_stored else read_backend(folder, path)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception for a bad file
        raise UserError(
            f"{path}: cannot be read as a tokenizer ({first_line(error)}); fetch the tokenizer's files again"
        ) from error
    return Tokenizer(backend, max_length, str(path))
