"""Clean texts for --extra_clean with nltk: reduce them to the lemmas of their content words (R0, appendix G).

Texts become lower case, contractions are expanded, special characters and stopwords are dropped, and the other words
become WordNet's lemmas. Negations stay: nltk has "not" among its stopwords, and without it "is n't good" is "good".
"""

import functools
import hashlib
import io
import logging
import re
from collections.abc import Callable, Sequence
from types import ModuleType

from utils.errors import UserError

logger = logging.getLogger("minbert")

DATA = ("stopwords", "wordnet")
NEGATIONS = frozenset(("no", "nor", "not"))  # all negations among nltk's stopwords
FETCH = f"python -m nltk.downloader {' '.join(DATA)}"

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"))
_AUXILIARIES = "ai are ca could did do does had has have is might must need sha should was were wo would"
_ODD_STEMS = {"ai": "is", "ca": "can", "sha": "shall", "wo": "will"}
# The corpora write "don't" and "do n't"; people also write "dont" and "don t". After other words only "n't" is certain.
_NEGATED = re.compile(rf"\b({_AUXILIARIES.replace(' ', '|')}) ?n ?'? ?t\b")
_CONTRACTIONS = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r" ?n't\b", " not"),
        (r"\bcannot\b", "can not"),
        (r" ?'ll\b", " will"),
        (r" ?'re\b", " are"),
        (r" ?'ve\b", " have"),
        (r" ?'d\b", " would"),
        (r" ?'m\b", " am"),
        (r" ?'s\b", " "),  # is, has or a genitive
    )
)
_SPECIAL = re.compile(r"[\W_]+")  # all but the letters and digits of any script


def expand_contractions(text: str) -> str:
    """Return a lower-case text with its contractions as whole words: "ca n't" becomes "can not"."""
    text = _NEGATED.sub(lambda match: f"{_ODD_STEMS.get(match[1], match[1])} not", text.translate(_APOSTROPHES))
    for pattern, words in _CONTRACTIONS:
        text = pattern.sub(words, text)
    return text


class Cleaner:
    """The rule of --extra_clean with the stopwords and the WordNet of nltk."""

    def __init__(self) -> None:
        """Find the data of nltk, or fetch them.

        Raises UserError if nltk is not installed, or its data are damaged, or missing and cannot be fetched.
        """
        try:
            import nltk  # takes a second
        except ModuleNotFoundError as error:
            raise UserError(f"--extra_clean: no package {error.name}; pip install -r requirements.txt") from error
        if missing := [name for name in DATA if not _is_there(nltk, name)]:
            _fetch(nltk, missing)
        self._nltk = nltk
        try:
            self._stopwords = frozenset(nltk.corpus.stopwords.words("english")) - NEGATIONS
        except Exception as error:  # nltk raises a dozen kinds for a damaged file
            raise _damaged("stopwords", error) from error

    @property
    def fingerprint(self) -> str:
        """What a cleaned text depends on in nltk. WordNet is not part of it, since nltk's stays at version 3.0."""
        stopwords = hashlib.sha256(" ".join(sorted(self._stopwords)).encode()).hexdigest()
        return f"{self._nltk.__version__} {stopwords}"

    @functools.cached_property
    def _lemma(self) -> Callable[[str], str]:
        """A function from a word to its first lemma in WordNet, or to the word itself if WordNet does not have it."""
        try:
            self._nltk.corpus.wordnet.ensure_loaded()
        except Exception as error:
            raise _damaged("wordnet", error) from error
        morphy = self._nltk.stem.WordNetLemmatizer().morphy
        return functools.cache(lambda word: morphy(word) or word)

    def clean(self, text: str) -> str:
        """Return the cleaned text, or the unchanged text if nothing would be left of it."""
        words = _SPECIAL.sub(" ", expand_contractions(text.lower())).split()
        return " ".join([self._lemma(word) for word in words if word not in self._stopwords]) or text


def _is_there(nltk: ModuleType, name: str) -> bool:
    """Return whether a folder of nltk's search path has these data, unpacked or as a zip file."""
    for place in (f"corpora/{name}", f"corpora/{name}.zip/{name}/"):
        try:
            nltk.data.find(place)
            return True
        except LookupError:
            continue
    return False


def _fetch(nltk: ModuleType, names: Sequence[str]) -> None:
    """Download data into nltk's usual folder. Raises UserError if that fails."""
    logger.info("fetching nltk's %s", " and ".join(names))
    try:
        for name in names:
            nltk.download(name, quiet=True, raise_on_error=True, print_error_to=io.StringIO())
    except Exception as error:  # network, proxy, certificate, disk, checksum: a dozen kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--extra_clean: nltk's {' and '.join(names)} are in none of {', '.join(nltk.data.path)} and cannot be "
            f"fetched ({reason:.160}); run `{FETCH}` where there is a network, or name the folder with NLTK_DATA"
        ) from error


def _damaged(name: str, error: Exception) -> UserError:
    """Return the error for data that nltk cannot read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"--extra_clean: nltk's {name} cannot be read ({reason:.160}); delete it and run `{FETCH}`")
