"""The tokenizer against transformers' BertTokenizerFast, token by token."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from text import tokenizer
from text.tokenizer import TokenArrays, Tokenizer, load_tokenizer, longest_first
from utils.errors import UserError

WORDS = "the film was not good bad cafe café Film The un ##aff ##able ##s , . ! ' - 电 影 n ##t été 1 ##2 🙂"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *"abcdefgilmopqrst", "##a", "##b", "##o"]
DTYPES = ["int32", "int64", "int32"]
TEXTS = [
    "The film was not good.",
    "",
    "   \t\n ",
    "CAFÉ été cafe\u0301s, unaffables!",
    "电影 film\u200b\u0000 12 🙂🙂 Ω",
    "a [SEP] b [MASK] [PAD]",
    "isn't un-good",
    "the film " * 30,
    "a" * 150,
]


def write_vocabulary(folder: Path, **settings: bool | None) -> Path:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "BertTokenizer"}))
    return folder


def write_full(folder: Path, **settings: bool | None) -> Path:
    """The same as a tokenizer.json that pads and truncates on its own."""
    full = oracle(write_vocabulary(folder, **settings)).backend_tokenizer
    full.enable_padding(length=16)
    full.enable_truncation(16)
    full.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").unlink()
    return folder


def oracle(folder: Path) -> Any:
    fast: Any = transformers.BertTokenizerFast  # type: ignore[attr-defined, unused-ignore]
    return fast.from_pretrained(folder)


def assert_same(
    found: TokenArrays, reference: Any, texts: Sequence[str], pairs: Sequence[str] | None, top: int
) -> None:
    """Compare every id, token type and length, and the count of truncated sequences."""
    arguments = (list(texts),) if pairs is None else (list(texts), list(pairs))
    wanted = reference(*arguments, truncation="longest_first", max_length=top)
    full = reference(*arguments, truncation=False)
    assert len(found) == len(texts) == len(found.offsets) - 1
    assert [str(array.dtype) for array in (found.input_ids, found.offsets, found.second_start)] == DTYPES
    assert found.offsets[0] == 0 and found.offsets[-1] == len(found.input_ids)
    for i in range(len(texts)):
        ids = found.input_ids[found.offsets[i] : found.offsets[i + 1]]
        types = (np.arange(len(ids)) >= found.second_start[i]).astype(int)
        assert ids.tolist() == wanted["input_ids"][i]
        assert types.tolist() == wanted["token_type_ids"][i]
        assert len(ids) <= top
    assert found.truncated == sum(len(ids) > top for ids in full["input_ids"])


@pytest.mark.parametrize("top", [4, 5, 8, 512])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("write", [write_vocabulary, write_full])
def test_equals_transformers(tmp_path: Path, write: Any, settings: dict[str, bool], top: int) -> None:
    folder = write(tmp_path, **settings)
    reference, ours = oracle(folder), load_tokenizer(folder, top)
    assert_same(ours.encode(TEXTS), reference, TEXTS, None, top)
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    firsts, seconds = [a for a, _ in pairs], [b for _, b in pairs]
    assert_same(ours.encode(firsts, seconds), reference, firsts, seconds, top)


def test_longest_first_takes_tokens_one_by_one() -> None:
    for budget in range(1, 9):
        for a in range(11):
            for b in range(11):
                kept = [a, b]
                while sum(kept) > budget:
                    gives_way = int(a > b) if kept[0] == kept[1] else int(kept[1] > kept[0])
                    kept[gives_way] -= 1
                assert longest_first(a, b, budget) == tuple(kept), (a, b, budget)


def test_very_long_texts(tmp_path: Path) -> None:
    """Two texts of 100,000 tokens: what is cut off must cost nothing."""
    ours = load_tokenizer(write_vocabulary(tmp_path), 8)
    found = ours.encode(["film " * 100_000], ["good " * 100_000])
    film, good = VOCABULARY.index("film"), VOCABULARY.index("good")
    assert found.input_ids.tolist() == [2, film, film, 3, good, good, good, 3]
    assert (found.second_start.tolist(), found.truncated) == ([4], 1)


def test_ids_by_hand(tmp_path: Path) -> None:
    ours = load_tokenizer(write_vocabulary(tmp_path), 9)
    found = ours.encode(["The FILM was unaffable", "", "café zzz"], ["good", "bad film", "the film was not good"])
    words = [
        "[CLS] the film was un ##aff [SEP] good [SEP]",  # ##able was cut from the longer text
        "[CLS] [SEP] bad film [SEP]",
        "[CLS] cafe [UNK] [SEP] the film was not [SEP]",
    ]
    wanted = [[VOCABULARY.index(word) for word in line.split()] for line in words]
    assert found.input_ids.tolist() == [id for line in wanted for id in line]
    assert found.offsets.tolist() == [0, 9, 14, 23]
    assert found.second_start.tolist() == [7, 2, 4]
    assert found.truncated == 2
    assert ours.encode(["good"]).second_start.tolist() == [3]
    assert (ours.pad_id, ours.mask_id, ours.vocab_size, ours.max_length) == (0, 4, len(VOCABULARY), 9)
    assert ours.special_ids == (0, 1, 2, 3, 4)
    nothing = ours.encode([], [])
    assert (len(nothing), nothing.input_ids.size, nothing.offsets.tolist(), nothing.truncated) == (0, 0, [0], 0)
    with pytest.raises(ValueError, match="differs"):
        ours.encode(["a", "b"], ["a"])


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_vocabulary(tmp_path)
    ours, reference = load_tokenizer(folder, 6), oracle(folder)
    texts = [" ".join(["good"] * (i % 9)) for i in range(tokenizer.BLOCK + 3)]
    assert_same(ours.encode(texts), reference, texts, None, 6)
    for block in (1, 4, 10):
        monkeypatch.setattr(tokenizer, "BLOCK", block)
        assert_same(ours.encode(texts[:10], texts[5:15]), reference, texts[:10], texts[5:15], 6)


def test_sha256_follows_vocabulary_and_settings(tmp_path: Path) -> None:
    folder = write_vocabulary(tmp_path)
    first = load_tokenizer(folder, 8).sha256
    assert len(first) == 64 and first == load_tokenizer(folder, 8).sha256
    assert first == load_tokenizer(folder, 64).sha256
    cased = load_tokenizer(write_vocabulary(folder, do_lower_case=False), 8).sha256
    write_vocabulary(folder)
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]))
    assert len({first, cased, load_tokenizer(folder, 8).sha256}) == 3


def test_json_round_trip(tmp_path: Path) -> None:
    first = load_tokenizer(write_full(tmp_path), 8)
    (tmp_path / "vocab.txt").write_text("another vocabulary")  # of two files, tokenizer.json holds
    assert load_tokenizer(tmp_path, 8).sha256 == first.sha256
    second = Tokenizer.from_json(first.to_json(), 8, "best.pt")
    assert second.sha256 == first.sha256
    assert_same(second.encode(TEXTS, TEXTS[::-1]), oracle(tmp_path), TEXTS, TEXTS[::-1], 8)
    for text in ("", "{}", tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()):
        with pytest.raises(UserError, match=r"^best\.pt: "):
            Tokenizer.from_json(text, 8, "best.pt")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ": has no vocabulary; .*tokenizer.json or vocab.txt"),
        ({"tokenizer.json": ""}, r"tokenizer\.json: cannot be read as a tokenizer"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json: cannot be read as a tokenizer"),
        ({"tokenizer.json": '{"version": "1.0"}'}, r"tokenizer\.json: cannot be read as a tokenizer"),
        ({"tokenizer.json": tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()}, "holds no WordPiece model"),
        ({"vocab.txt": "[PAD]\n", "tokenizer_config.json": "{"}, "cannot be read as a tokenizer"),
        ({"vocab.txt": "[PAD]\n[UNK]\n[CLS]\nfilm\n"}, r"vocab\.txt: the vocabulary has no \[SEP\], \[MASK\]"),
    ],
)
def test_a_folder_without_the_tokenizer_of_a_bert_is_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}.*{words}"):
        load_tokenizer(tmp_path, 8)


def with_steps(folder: Path, **steps: Any) -> tuple[Path, str]:
    """A folder whose tokenizer.json has other steps before its words are cut, and that file's text."""
    content = json.loads((write_full(folder) / "tokenizer.json").read_text()) | steps
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder, json.dumps(content)


GROWING = {"type": "Replace", "pattern": {"String": "p"}, "content": "p" * 1000}
ENDLESS = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
LOWER, WORDS_ALONE = {"type": "Lowercase"}, {"type": "Whitespace"}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"normalizer": GROWING}, "its normalizer has Replace"),
        ({"normalizer": {"type": "Sequence", "normalizers": [LOWER, GROWING, GROWING]}}, "its normalizer has Replace"),
        ({"normalizer": {"type": "Prepend", "prepend": "a"}}, "its normalizer has Prepend"),
        ({"pre_tokenizer": ENDLESS}, "its pre_tokenizer has Split"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [WORDS_ALONE, ENDLESS]}}, "pre_tokenizer has Split"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
         "its pre_tokenizer has ByteLevel"),
    ],
)  # fmt: skip
def test_steps_that_no_bert_has_are_refused_before_any_text(tmp_path: Path, steps: dict[str, Any], words: str) -> None:
    """They could make a text a billion times as long, or search it for ever."""
    folder, text = with_steps(tmp_path, **steps)
    for source, read in (
        (str(folder / "tokenizer.json"), lambda: load_tokenizer(folder, 8)),
        ("best.pt", lambda: Tokenizer.from_json(text, 8, "best.pt")),
    ):
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(f"{source}: ") and words in str(error.value)
        assert str(error.value).endswith("use the tokenizer of a BERT")


def test_harmless_steps_are_kept(tmp_path: Path) -> None:
    plain = [{"type": name} for name in ("Lowercase", "NFD", "NFC", "NFKC", "NFKD", "StripAccents")]
    plain += [{"type": "Strip", "strip_left": True, "strip_right": True}]
    cuts = [{"type": name} for name in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")]
    cuts += [{"type": "Punctuation", "behavior": "Isolated"}]
    nested = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": cuts}]}
    folder, _ = with_steps(tmp_path, normalizer={"type": "Sequence", "normalizers": plain}, pre_tokenizer=nested)
    film, cafe = VOCABULARY.index("film"), VOCABULARY.index("cafe")
    assert load_tokenizer(folder, 8).encode([" FILM café"]).input_ids.tolist() == [2, film, cafe, 3]
    folder, _ = with_steps(tmp_path, normalizer=None, pre_tokenizer=None)
    assert load_tokenizer(folder, 8).encode(["film"]).input_ids.tolist() == [2, film, 3]


def test_minilm_equals_transformers(minilm: Path) -> None:
    """The stored padding and truncation to 128 must be gone, and any text must agree."""
    reference, ours = oracle(minilm), load_tokenizer(minilm, 200)
    assert_same(ours.encode(TEXTS, TEXTS[::-1]), reference, TEXTS, TEXTS[::-1], 200)
    assert (ours.vocab_size, ours.pad_id, ours.mask_id) == (30522, 0, 103)
    text = st.text(st.characters(codec="utf-8"), max_size=60)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(text, text), min_size=1, max_size=4))
    def any_texts(pairs: list[tuple[str, str]]) -> None:
        short = load_short.encode([a for a, _ in pairs], [b for _, b in pairs])
        assert_same(short, reference, [a for a, _ in pairs], [b for _, b in pairs], 12)

    load_short = load_tokenizer(minilm, 12)
    any_texts()
