"""The tokenizers of model folders and of exports against transformers' AutoTokenizer, token by token."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from text.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SPECIAL_TOKENS = {f"{word[1:-1].lower()}_token": word for word in SPECIAL}
WORDS = "the film Film cafe café un ##aff ##able , . ! ' - 电 影 ##影 newword New [ ] word x ##x e"
VOCABULARY = [*SPECIAL, *WORDS.split(), *"abcdlmnorw", *(f"##{letter}" for letter in "abcdelmnorw")]
END = len(VOCABULARY)
ATOMS = [
    *("film", "The", "CAFÉ", "cafe\u0301", "unaffables", "电影x", "NewWord", "newword", "[X]", "[x]", "<e>"),
    *("a<e>b", "[SEP]", "[sep]", "a[MASK]b", "the,film.", "\u0000", "\u200b", "\u3000", " ", "🙂", "İ", "a" * 101, ""),
]
TEXTS = ["", " ", *(f"{a}{gap}{b}" for a in ATOMS[:16] for b in ATOMS[2:12] for gap in ("", " "))]
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
CASED = {**BERT, "strip_accents": None, "lowercase": False}
SEQUENCE = {"type": "Sequence", "normalizers": [{"type": kind} for kind in ("NFD", "Lowercase", "StripAccents")]}
CUT = {"type": "BertPreTokenizer"}
FLAGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")


def added(content: str, id: int, **flags: bool) -> dict[str, Any]:
    """An added token as tokenizer.json and added_tokens_decoder spell it out."""
    defaults = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": id, "content": content, **defaults, **flags}


STORED: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [added(word, id, special=True) for id, word in enumerate(SPECIAL)],
    "normalizer": CASED,
    "pre_tokenizer": CUT,
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {word: id for id, word in enumerate(VOCABULARY)},
    },
}


def write(folder: Path, stored: dict[str, Any] | None, **files: Any) -> Path:
    """Write a folder with a tokenizer.json of changed parts, or with vocab.txt for None, and json files by their stems.

    The files are for transformers' BERT.
    """
    folder.mkdir(exist_ok=True)
    if stored is None:
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    else:
        files["tokenizer"] = {**STORED, **stored}
    for name, content in {"config": {"model_type": "bert"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def assert_same(ours: Tokenizer, folder: Path, texts: list[str], frame: bool = True, **options: bool) -> None:
    """Check that AutoTokenizer with `options` gives our ids and, with `frame`, our special tokens, types and pairs."""
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call, unused-ignore]
    for columns in ([texts], [texts, texts[::-1]])[: 1 + frame]:
        found, wanted = ours.encode(*columns), theirs(*columns, add_special_tokens=frame, **options)
        for i, ids in enumerate(wanted["input_ids"]):
            tokens = found.input_ids[found.offsets[i] : found.offsets[i + 1]].tolist()
            assert (tokens if frame else tokens[1:-1]) == ids, [column[i] for column in columns]
            if frame:
                types = [int(place >= found.second_start[i]) for place in range(len(ids))]
                assert wanted["token_type_ids"][i] == types
    assert options or theirs.pad({"input_ids": [[1], [1, 2]]})["input_ids"] == [[1, 0], [1, 2]]


def assert_followed(folder: Path, frame: bool = True) -> str:
    """Check a folder and its export with and without config.json; return the class that the export names."""
    ours, out = load_tokenizer(folder, 512), folder / "out"
    assert_same(ours, folder, TEXTS, frame, return_token_type_ids=frame)
    out.mkdir()
    ours.save(out)
    assert_same(ours, out, TEXTS)
    (out / "config.json").write_text('{"model_type": "bert"}')
    assert_same(ours, out, TEXTS)
    assert load_tokenizer(out, 512).encode(TEXTS).input_ids.tolist() == ours.encode(TEXTS).input_ids.tolist()
    return str(json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"])


@pytest.mark.parametrize("kind", [None, "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer"])
@pytest.mark.parametrize("flags", [None, {}, {FLAGS[0]: False}, dict(zip(FLAGS, (True, False, False), strict=True))])
def test_the_settings_decide_about_lower_case(tmp_path: Path, kind: str | None, flags: dict[str, bool] | None) -> None:
    """As in transformers, whatever normalizer tokenizer.json has; without settings, text becomes lower case."""
    chosen = {} if flags is None and kind is None else {"tokenizer_config": {"tokenizer_class": kind, **(flags or {})}}
    for n, normalizer in enumerate((CASED, {**CASED, "lowercase": True, "clean_text": False}, SEQUENCE, None)):
        folder = write(tmp_path / str(n), {"normalizer": normalizer}, **chosen)
        assert assert_followed(folder) == "BertTokenizer"


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": None},
        {"normalizer": SEQUENCE},
        {"normalizer": {**CASED, "clean_text": False}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": None},
        {"model": {**STORED["model"], "max_input_chars_per_word": 3}},
        {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_what_no_bert_tokenizer_can_hold_is_exported_as_it_is(tmp_path: Path, kind: str, steps: dict[str, Any]) -> None:
    config = {"tokenizer_class": kind, FLAGS[0]: True, **SPECIAL_TOKENS}
    frame = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    folder = write(tmp_path / "a", {"post_processor": frame, **steps}, tokenizer_config=config)
    assert assert_followed(folder, frame="post_processor" not in steps) == "PreTrainedTokenizerFast"
    plain = write(tmp_path / "b", {"post_processor": frame}, tokenizer_config=config)
    assert assert_followed(plain) == "BertTokenizer"


DECODER = {str(id): token for id, token in enumerate(STORED["added_tokens"])}
LATER = [added("<e>", END, lstrip=True), added("[X]", END + 1, normalized=True, single_word=True)]


@pytest.mark.parametrize(
    ("stored", "files", "ids"),
    [
        (None, {"added_tokens": {"[X]": END + 1, "<e>": END}}, {"<e>": END, "[X]": END + 1}),
        (None, {"added_tokens": {"New": VOCABULARY.index("New")}}, {"New": VOCABULARY.index("New")}),
        (None, {"added_tokens": {"<e>": END}, "special_tokens_map": {"additional_special_tokens": ["<e>"]}},
         {"<e>": END}),
        (None, {"special_tokens_map": {"mask_token": {"content": "[MASK]", "lstrip": True}, "bos_token": "<e>"}},
         {"<e>": END}),
        (None, {"tokenizer_config": {"added_tokens_decoder": {**DECODER, str(END): {"content": "<e>"}}}},
         {"<e>": END}),
        (None, {"tokenizer_config": {"extra_special_tokens": ["<e>", "[X]"]}}, {"<e>": END, "[X]": END + 1}),
        (None, {"tokenizer_config": {"extra_special_tokens": {"e_token": "<e>"}}}, {"<e>": END}),
        (None, {"tokenizer_config": {"x_token": {"__type": "AddedToken", "content": "[X]", "rstrip": True}}},
         {"[X]": END}),
        ({"added_tokens": [*STORED["added_tokens"], *LATER]}, {}, {"<e>": END, "[X]": END + 1}),
        ({"added_tokens": []}, {"added_tokens": {"<e>": END}}, {"<e>": END}),
    ],
)  # fmt: skip
def test_added_tokens_get_their_ids(
    tmp_path: Path, stored: dict[str, Any] | None, files: dict[str, Any], ids: dict[str, int]
) -> None:
    """Inside words, at their edges and when normalized, as flags have it."""
    for kind in ("BertTokenizer", "PreTrainedTokenizerFast")[: 1 if stored is None else 2]:
        config = {**files.get("tokenizer_config", {}), **SPECIAL_TOKENS, "tokenizer_class": kind}
        folder = write(tmp_path / kind, stored, **{**files, "tokenizer_config": config})
        assert assert_followed(folder, frame=kind == "BertTokenizer") == "BertTokenizer" or stored is not None
        ours = load_tokenizer(folder, 512)
        for token, id in ids.items():
            assert ours.encode([f"film {token} film"]).input_ids[2] == id
        assert ours.vocab_size == 1 + max(END - 1, *ids.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(st.lists(st.sampled_from(ATOMS) | st.text(max_size=3), max_size=6).map("".join), min_size=1))
def test_any_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-text"
    if not folder.exists():
        steps = {"normalizer": SEQUENCE, "pre_tokenizer": {"type": "WhitespaceSplit"}}
        write(folder, {**steps, "added_tokens": [*STORED["added_tokens"], *LATER]},
              tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})  # fmt: skip
        load_tokenizer(folder, 512).save(folder)
    assert_same(load_tokenizer(folder, 512), folder, texts)


@pytest.mark.parametrize(
    ("stored", "files", "words"),
    [
        (None, {"added_tokens": {"<e>": END + 2}}, f"give <e> the id {END + 2}, but transformers gives it {END};"),
        (None, {"added_tokens": {"film": END}}, f"give film the id {END}, but transformers gives it 6;"),
        ({"added_tokens": [added("<e>", END + 9)]}, {}, "give <e> the id"),
        ({"added_tokens": LATER}, {"tokenizer_config": {"added_tokens_decoder": DECODER}}, "gives it None"),
        (None, {"added_tokens": {"<E>": END, "<e>": END + 1}}, "<E> and <e> are the same text when normalized; remove"),
        (None, {"tokenizer_config": {"tokenizer_class": "BertJapaneseTokenizer"}},
         "tokenizer_class is BertJapaneseTokenizer; use a model with a BertTokenizer"),
        (None, {"config": {"tokenizer_class": "Odd\x1b[1mTokenizer"}}, "tokenizer_class is Odd\\x1b[1mTokenizer;"),
        (None, {"special_tokens_map": {"cls_token": "<s>"}}, "its cls_token is <s>; use a BERT"),
        (None, {"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens; set it to false"),
        (None, {"added_tokens": ["<e>"]}, "added_tokens.json: cannot be read as a tokenizer's settings"),
        (None, {"added_tokens": {"<e>": "9"}}, "fetch the tokenizer's files again"),
        (None, {"tokenizer_config": {"added_tokens_decoder": {"a": 1}}}, "cannot be read as a tokenizer"),
        ({}, {"tokenizer_config": {"do_lower_case": "no"}}, "cannot be read as a tokenizer"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(
    tmp_path: Path, stored: dict[str, Any] | None, files: dict[str, Any], words: str
) -> None:
    message = refusal(load_tokenizer, write(tmp_path / "a", stored, **files), 512)
    assert message.startswith(str(tmp_path)) and words in message, message
