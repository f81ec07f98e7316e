"""--extra_clean: texts reduced to the lemmas of their content words (R0, appendix G), by nltk.

Lower case, contractions expanded, special characters and stopwords dropped, WordNet's lemmas. Negations stay: nltk
counts "not" among its stopwords, and without it "is n't good" is "good".
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
NEGATIONS = frozenset(("no", "nor", "not"))  # all those among nltk's stopwords
FETCH = f"python -m nltk.downloader {' '.join(DATA)}"

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"))
_AUXILIARIES = "ai are ca could did do does had has have is might must need sha should was were wo would"
_ODD_STEMS = {"ai": "is", "ca": "can", "sha": "shall", "wo": "will"}
# The corpora write "don't" and "do n't", people also "dont" and "don t"; of other words only "n't" itself is certain.
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
_SPECIAL = re.compile(r"[\W_]+")  # all but letters and digits, of any script


def expand_contractions(text: str) -> str:
    """A text in lower case with its contractions as whole words: "ca n't" is "can not"."""
    text = _NEGATED.sub(lambda match: f"{_ODD_STEMS.get(match[1], match[1])} not", text.translate(_APOSTROPHES))
    for pattern, words in _CONTRACTIONS:
        text = pattern.sub(words, text)
    return text


class Cleaner:
    """The rule of --extra_clean with nltk's stopwords and WordNet, which are found, or fetched, when one is made."""

    def __init__(self) -> None:
        """Raises UserError where nltk is not installed, or its data are missing and cannot be fetched, or damaged."""
        try:
            import nltk  # takes a second
        except ModuleNotFoundError as error:
            raise UserError(f"--extra_clean: no package {error.name}; pip install -r requirements.txt") from error
        if missing := [name for name in DATA if not _is_there(nltk, name)]:
            _fetch(nltk, missing)
        self._nltk = nltk
        try:
            self._stopwords = frozenset(nltk.corpus.stopwords.words("english")) - NEGATIONS
        except Exception as error:  # of a damaged file nltk raises a dozen kinds
            raise _damaged("stopwords", error) from error

    @property
    def fingerprint(self) -> str:
        """What of nltk a cleaned text depends on; its package wordnet is WordNet 3.0 for good."""
        stopwords = hashlib.sha256(" ".join(sorted(self._stopwords)).encode()).hexdigest()
        return f"{self._nltk.__version__} {stopwords}"

    @functools.cached_property
    def _lemma(self) -> Callable[[str], str]:
        """From a word to its lemma, WordNet's first one; a word that WordNet does not know is its own."""
        try:
            self._nltk.corpus.wordnet.ensure_loaded()
        except Exception as error:
            raise _damaged("wordnet", error) from error
        morphy = self._nltk.stem.WordNetLemmatizer().morphy
        return functools.cache(lambda word: morphy(word) or word)

    def clean(self, text: str) -> str:
        """The cleaned text; the text as it was where nothing would be left of it."""
        words = _SPECIAL.sub(" ", expand_contractions(text.lower())).split()
        return " ".join([self._lemma(word) for word in words if word not in self._stopwords]) or text


def _is_there(nltk: ModuleType, name: str) -> bool:
    """Whether a folder of nltk's search path has these data, unpacked or as a zip file."""
    for place in (f"corpora/{name}", f"corpora/{name}.zip/{name}/"):
        try:
            nltk.data.find(place)
            return True
        except LookupError:
            continue
    return False


def _fetch(nltk: ModuleType, names: Sequence[str]) -> None:
    """Download data into nltk's usual folder. Raises UserError where that cannot be done."""
    logger.info("fetching nltk's %s", " and ".join(names))
    try:
        for name in names:
            nltk.download(name, quiet=True, raise_on_error=True, print_error_to=io.StringIO())
    except Exception as error:  # network, proxy, certificate, disk, checksum: again a dozen kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--extra_clean: nltk's {' and '.join(names)} are in none of {', '.join(nltk.data.path)} and cannot be "
            f"fetched ({reason:.160}); run `{FETCH}` where there is a network, or name the folder with NLTK_DATA"
        ) from error


def _damaged(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"--extra_clean: nltk's {name} cannot be read ({reason:.160}); delete it and run `{FETCH}`")
