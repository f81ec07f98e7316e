"""Read the tokenizer of a model folder from all of its files, as transformers' AutoTokenizer does."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.models import WordPiece

from utils.errors import UserError, first_line
from utils.untrusted import read_json, read_text, shown

logger = logging.getLogger("minbert")

SPECIAL_TOKENS = {  # by their names in tokenizer_config.json
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# transformers' order, in which those that the vocabulary lacks get their ids
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Values of tokenizer_class, each also with "Fast" at its end. transformers builds the first anew from the words and
# the added tokens, whatever else tokenizer.json says. It takes tokenizer.json as it is for the others.
REBUILT = {
    *("BertTokenizer", "ConvBertTokenizer", "DistilBertTokenizer", "DPRContextEncoderTokenizer"),
    *("DPRQuestionEncoderTokenizer", "DPRReaderTokenizer", "ElectraTokenizer", "LayoutLMTokenizer", "LxmertTokenizer"),
    *("MobileBertTokenizer", "SqueezeBertTokenizer"),
}
STORED = {"PreTrainedTokenizer", "TokenizersBackend"}
# Allowed steps before the lookup of words: none of them can take forever or make a text endless.
STEPS = {
    "normalizer": ("BertNormalizer", "Lowercase", "NFD", "NFC", "NFKC", "NFKD", "StripAccents", "Strip"),
    "pre_tokenizer": ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation"),
}

Content = dict[str, Any]  # of a json object


def read_backend(folder: Path, path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a folder, whose words are in its file `path`, tokenizer.json or vocab.txt.

    Raises UserError for what cannot be followed. A damaged file raises any error.
    """
    is_full = path.name == "tokenizer.json"
    text = read_text(path) if is_full else from_vocabulary(path)
    backend, stored = tokenizers.Tokenizer.from_str(text), json.loads(text)
    if not isinstance(backend.model, WordPiece):
        raise UserError(f"{path}: holds no WordPiece model; use the tokenizer of a BERT")
    if is_full:
        backend.no_padding()  # first, since a file may ask for any length
        check_steps(backend, stored, str(path))
    settings = read_settings(folder)
    is_stored = is_full and settings["tokenizer_class"] in STORED
    content = stored if is_stored else rebuilt(stored, settings)
    if is_full and (ignored := [part for part in STEPS if content[part] != stored.get(part)]):
        logger.info("%s: its %s is not used, as in transformers' BertTokenizer", path, " and ".join(ignored))
    tokens, ids = added_tokens(folder, settings, stored, stored.get("added_tokens", []) if is_stored else [])
    content = {**content, "added_tokens": tokens}
    if content != stored:  # so that the hash of a tokenizer whose files agree stays the same
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    for token, id in ids.items():
        if (found := backend.token_to_id(token)) != id:
            raise UserError(
                f"{folder}: its files give {shown(token[:99])} the id {id}, but transformers gives it {found}; let the "
                "ids of added tokens follow those of the vocabulary, and all files agree"
            )
    refuse_alike(folder, backend, tokens)
    return backend


def read_as_stored(folder: Path, path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer as older checkpoints with adapters took it: tokenizer.json alone, or no added tokens."""
    if path.name == "tokenizer.json":
        return tokenizers.Tokenizer.from_str(read_text(path))
    content = rebuilt(json.loads(from_vocabulary(path)), read_settings(folder))
    vocabulary = content["model"]["vocab"]
    content["added_tokens"] = [full_token(word, True) for word in SPECIAL_TOKENS.values() if word in vocabulary]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def from_vocabulary(path: Path) -> str:
    """Return vocab.txt as a tokenizer.json without any step before the lookup of words."""
    return tokenizers.Tokenizer(WordPiece(WordPiece.read_file(str(path)), unk_token="[UNK]")).to_str()


def rebuilt(content: Content, settings: Mapping[str, Any]) -> Content:
    """Return what transformers' BertTokenizer makes of a tokenizer.json, with settings of tokenizer_config.json."""
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
        "strip_accents": settings.get("strip_accents"),  # null strips accents if `lowercase` is set
        "lowercase": settings.get("do_lower_case", True),
    }
    words = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return {
        **content,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {**content["model"], **words},
    }


def read_settings(folder: Path) -> Content:
    """Return the tokenizer_config.json of a folder, with what older versions of transformers keep in other files.

    Raises UserError for settings that cannot be followed.
    """
    settings = read_object(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class") or read_object(folder / "config.json").get("tokenizer_class")
    settings["tokenizer_class"] = kind = str(kind or "BertTokenizer").removesuffix("Fast")
    if kind not in REBUILT | STORED:
        raise UserError(f"{folder}: its tokenizer_class is {shown(kind[:99])}; use a model with a BertTokenizer")
    if "added_tokens_decoder" not in settings:
        settings |= read_object(folder / "special_tokens_map.json")
    for name, token in SPECIAL_TOKENS.items():
        if (word := full_token(settings.get(name) or token, True)["content"]) != token:
            raise UserError(f"{folder}: its {name} is {shown(str(word)[:99])}; use a BERT, whose {name} is {token}")
    if settings.get("split_special_tokens"):
        raise UserError(f"{folder}: its tokenizer_config.json sets split_special_tokens; set it to false")
    return settings


def read_object(path: Path) -> Content:
    """Return the object in a json file, an empty one if there is no file. Raises UserError for anything else."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as a tokenizer's settings ({first_line(error)}); fetch the file again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read as a tokenizer's settings; fetch the file again")
    return content


def added_tokens(
    folder: Path, settings: Mapping[str, Any], stored: Content, begin: list[Content]
) -> tuple[list[Content], dict[str, int]]:
    """Return the added tokens in transformers' order, after those to `begin` with, and the ids that all must have.

    A tokenizer_config.json with added_tokens_decoder decides alone. Otherwise added_tokens.json and the added tokens of
    the `stored` tokenizer.json count. Then follow the special tokens that the settings name.
    """
    beside, in_file = read_object(folder / "added_tokens.json"), stored.get("added_tokens", [])
    by_id = {int(id): token for id, token in (settings.get("added_tokens_decoder") or {}).items()}
    ids = beside | {t["content"]: t["id"] for t in in_file} | {t["content"]: id for id, t in by_id.items()}
    special, vocabulary = special_tokens(settings), stored["model"]["vocab"]
    if "added_tokens_decoder" not in settings:
        words = {token["content"] for token in special}
        by_id = {id: full_token(word, word in words) for word, id in beside.items()}
        by_id |= {token["id"]: token for token in in_file}
    tokens = {token["content"]: token for token in begin}
    tokens |= {by_id[id]["content"]: full_token(by_id[id], False) for id in sorted(by_id)}
    for token in [*special, *(full_token(word, True) for word in SPECIAL_TOKENS.values() if word in vocabulary)]:
        tokens.setdefault(token["content"], token)
    free = 1 + max([*vocabulary.values(), *ids.values()])
    for content, token in tokens.items():
        if content not in ids:
            ids[content] = vocabulary.get(content, free)
            free += content not in vocabulary
        token["id"] = ids[content]
    return list(tokens.values()), ids


def special_tokens(settings: Mapping[str, Any]) -> list[Content]:
    """Return the special tokens in tokenizer_config.json: those with the usual names, with other names, without any."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    found = [settings[name] for name in NAMES if settings.get(name)]
    others = (value for name, value in settings.items() if name.endswith("_token") and name not in NAMES)
    found += [value for value in others if isinstance(value, str | dict)]
    return [full_token(token, True) for token in [*found, *(more.values() if isinstance(more, dict) else more)]]


def full_token(token: str | Mapping[str, Any], special: bool) -> Content:
    """Return an added token as tokenizer.json spells it out, with the library's defaults."""
    fields = {"content": token, "special": special} if isinstance(token, str) else {"special": special, **token}
    flags = {name: fields.get(name, False) for name in ("single_word", "lstrip", "rstrip", "special")}
    return {
        "id": 0,
        "content": fields["content"],
        **flags,
        "normalized": fields.get("normalized", not flags["special"]),
    }


def refuse_alike(folder: Path, backend: tokenizers.Tokenizer, tokens: list[Content]) -> None:
    """Raise UserError for added tokens that are one text when normalized: each process chooses another one of them."""
    seen: dict[str, str] = {}
    for token in tokens:
        if token["normalized"] and backend.normalizer is not None:
            text = backend.normalizer.normalize_str(token["content"])
            if (other := seen.setdefault(text, token["content"])) != token["content"]:
                raise UserError(
                    f"{folder}: its added tokens {shown(other[:99])} and {shown(token['content'][:99])} are the same "
                    'text when normalized; remove one, or set its "normalized" to false'
                )


def check_steps(backend: tokenizers.Tokenizer, content: Content, source: str) -> None:
    """Raise UserError, naming `source`, if a tokenizer has other steps than `STEPS` or cannot encode a text.

    `content` is its tokenizer.json. A replacement could make a text a billion times as long, and a regular expression
    could search it forever.
    """
    for part, known in STEPS.items():
        for kind in step_kinds(content.get(part)):
            if kind not in known:
                raise UserError(
                    f"{source}: its {part} has {kind}, none of {', '.join(known)}; use the tokenizer of a BERT"
                )
    try:
        backend.encode_batch_fast(["A probe: \u8bd5"], add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception, for a wrong normaliser or unknown token
        raise UserError(f"{source}: cannot encode a text ({error}); use the tokenizer of a BERT") from error


def step_kinds(step: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the type of a normalizer or pre-tokenizer, or the types of the members of a sequence."""
    if step is not None and step["type"] == "Sequence":
        for inner in step.get("normalizers", step.get("pretokenizers")):
            yield from step_kinds(inner)
    elif step is not None:
        yield step["type"]
