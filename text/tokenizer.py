"""Turn texts and pairs of texts into WordPiece token ids, with the `tokenizers` library."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from utils.errors import UserError
from utils.files import write_json, write_text
from utils.untrusted import read_json

BLOCK = 4096  # texts encoded at a time: an Encoding takes kilobytes, so Quora's 283,000 pairs would take gigabytes
MAX_BYTES = 32 << 20  # of a vocabulary file; those of BERTs have 0.2 to 10 million bytes
MAX_GAPS = 10_000  # ids without a word
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Allowed steps before the lookup of words: none of them can take forever or make a text endless.
STEPS = {
    "normalizer": ("BertNormalizer", "Lowercase", "NFD", "NFC", "NFKC", "NFKD", "StripAccents", "Strip"),
    "pre_tokenizer": ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation"),
}


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
        ids = {token: id for token in SPECIAL_TOKENS if (id := backend.token_to_id(token)) is not None}
        if missing := [token for token in SPECIAL_TOKENS if token not in ids]:
            raise UserError(f"{source}: the vocabulary has no {', '.join(missing)}; use the vocabulary of a BERT")
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())  # ids may have gaps
        if self.vocab_size > len(vocabulary) + MAX_GAPS:  # the library takes memory for each of them
            raise UserError(f"{source}: an id is {self.vocab_size - 1}, of {len(vocabulary)} words; use that of a BERT")
        # A stored tokenizer may pad and truncate by itself (all-MiniLM-L6-v2 does both, to 128 tokens).
        backend.no_padding()
        backend.no_truncation()
        text = backend.to_str()
        refuse_steps(json.loads(text), source)
        try:
            backend.encode_batch_fast(["A probe: \u8bd5"], add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception, for a wrong normaliser or unknown token
            raise UserError(f"{source}: cannot encode a text ({error}); use the tokenizer of a BERT") from error
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

    def to_config(self) -> dict[str, Any]:
        """Return the tokenizer_config.json with which transformers makes the same tokens.

        transformers builds the normaliser from these settings and ignores the one in tokenizer.json.
        """
        config = {"tokenizer_class": "BertTokenizer", "model_max_length": self.max_length}
        normalizer = json.loads(self.to_json())["normalizer"] or {}
        if normalizer.get("type") != "BertNormalizer":  # others have no such settings
            return config
        return {
            **config,
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json. Raises UserError if that fails."""
        write_text(folder / "tokenizer.json", self.to_json())
        write_json(folder / "tokenizer_config.json", self.to_config())

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


def refuse_steps(settings: Mapping[str, Any], source: str) -> None:
    """Raise UserError, naming `source`, if the `settings` of a tokenizer have other steps than `STEPS`.

    A replacement could make a text a billion times as long, and a regular expression could search it forever.
    """
    for part, known in STEPS.items():
        for kind in step_kinds(settings[part]):
            if kind not in known:
                raise UserError(
                    f"{source}: its {part} has {kind}, none of {', '.join(known)}; use the tokenizer of a BERT"
                )


def step_kinds(step: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the type of a normalizer or pre-tokenizer, or the types of the members of a sequence."""
    if step is not None and step["type"] == "Sequence":
        for inner in step.get("normalizers", step.get("pretokenizers")):
            yield from step_kinds(inner)
    elif step is not None:
        yield step["type"]


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


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """Return BERT's tokenizer from vocab.txt and from tokenizer_config.json, if that is there."""
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    vocabulary = WordPiece.read_file(str(folder / "vocab.txt"))
    backend = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),  # None strips accents if `lowercase` is set
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = BertPreTokenizer()
    # Only those in the vocabulary, since the library would append a missing one.
    backend.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    return backend


def load_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """Return the tokenizer of a model folder, from tokenizer.json or else from vocab.txt.

    Raises UserError if neither file is there, or if the file is damaged or of another kind of model.
    """
    path = next((folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: has no vocabulary; the folder needs tokenizer.json or vocab.txt")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, as no vocabulary of a BERT is; fetch it again")
    try:
        full = path.name == "tokenizer.json"
        backend = tokenizers.Tokenizer.from_file(str(path)) if full else _from_vocabulary(folder)
    except Exception as error:  # the library raises bare Exception for a bad file
        raise UserError(f"{path}: cannot be read as a tokenizer ({error}); fetch the file again") from error
    return Tokenizer(backend, max_length, str(path))
