"""WordPiece: texts and pairs of texts to token ids, by the `tokenizers` library."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from config import UserError

BLOCK = 4096  # texts encoded at a time: an Encoding is some kilobytes, so Quora's 283,000 pairs would take gigabytes
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class TokenArrays:
    """S token sequences laid end to end, N tokens in all."""

    input_ids: np.ndarray  # [N] int32
    offsets: np.ndarray  # [S+1] int64; sequence i is input_ids[offsets[i]:offsets[i+1]]
    second_start: np.ndarray  # [S] int32, where in the sequence token type 1 begins; its length for a single text
    truncated: int  # how many sequences lost tokens

    def __len__(self) -> int:
        return len(self.second_start)


class Tokenizer:
    """[CLS] a [SEP] and [CLS] a [SEP] b [SEP], at most `max_length` (at least 4) tokens long."""

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int, source: str) -> None:
        """Take over `backend`. Raises UserError, naming `source`, where it lacks one of BERT's special tokens."""
        ids = {token: id for token in SPECIAL_TOKENS if (id := backend.token_to_id(token)) is not None}
        if lacking := [token for token in SPECIAL_TOKENS if token not in ids]:
            raise UserError(f"{source}: the vocabulary has no {', '.join(lacking)}; use the vocabulary of a BERT")
        # A stored tokenizer may pad and truncate to a length of its own (all-MiniLM-L6-v2: both, to 128).
        backend.no_padding()
        backend.no_truncation()
        backend.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
        self.pad_id = ids["[PAD]"]
        self.mask_id = ids["[MASK]"]
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.max_length = max_length
        self._sha256 = hashlib.sha256(backend.to_str().encode()).hexdigest()
        backend.enable_truncation(max_length, strategy="longest_first")
        self._backend = backend

    @property
    def sha256(self) -> str:
        """SHA-256 of vocabulary and settings, in hexadecimal; `max_length` is none of them."""
        return self._sha256

    def to_json(self) -> str:
        """The tokenizer as text, so that a checkpoint can carry it."""
        return self._backend.to_str()

    @classmethod
    def from_json(cls, text: str, max_length: int, source: str) -> "Tokenizer":
        """The inverse of `to_json`. Raises UserError, naming `source`, where `text` is no BERT tokenizer."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{source}: its tokenizer cannot be read ({error}); save the checkpoint anew") from error
        return cls(backend, max_length, source)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> TokenArrays:
        """Token ids of S texts, or of S pairs (texts[i], pairs[i]) joined; the longer text of a pair is cut first.

        Raises ValueError where `texts` and `pairs` differ in length.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)=} differs from {len(pairs)=}")
        ids = [np.empty(0, np.int32)]
        lengths, second_start, truncated = [0], [], 0
        for start in range(0, len(texts), BLOCK):
            block = slice(start, start + BLOCK)
            batch = list(texts[block] if pairs is None else zip(texts[block], pairs[block], strict=True))
            encodings = self._backend.encode_batch_fast(batch)
            ids.append(np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32))
            for encoding in encodings:
                length = len(encoding)
                lengths.append(length)
                # Counted from the end, since the second text's [SEP] is there even where the text is empty.
                second_start.append(length if pairs is None else length - sum(encoding.type_ids))
                truncated += length == self.max_length and bool(encoding.overflowing)
        return TokenArrays(
            input_ids=np.concatenate(ids),
            offsets=np.cumsum(lengths, dtype=np.int64),
            second_start=np.array(second_start, np.int32),
            truncated=truncated,
        )


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """BERT's tokenizer from vocab.txt and the settings that tokenizer_config.json may hold."""
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    vocabulary = WordPiece.read_file(str(folder / "vocab.txt"))
    backend = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),  # None: accents go where case goes
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = BertPreTokenizer()
    # Only those in the vocabulary: a missing one must be seen as missing, not be appended to it.
    backend.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    return backend


def load_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """The tokenizer of a model folder, from tokenizer.json, else from vocab.txt.

    Raises UserError where neither file is there, or the file is damaged or of another kind of model.
    """
    path = next((folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: has no vocabulary; the folder needs tokenizer.json or vocab.txt")
    try:
        full = path.name == "tokenizer.json"
        backend = tokenizers.Tokenizer.from_file(str(path)) if full else _from_vocabulary(folder)
    except Exception as error:  # the library raises bare Exception for a bad file
        raise UserError(f"{path}: cannot be read as a tokenizer ({error}); fetch the file again") from error
    if not isinstance(backend.model, WordPiece):
        raise UserError(f"{path}: holds no WordPiece model; use the tokenizer of a BERT")
    return Tokenizer(backend, max_length, str(path))
