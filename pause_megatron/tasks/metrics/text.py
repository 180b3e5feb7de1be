"""Metrics of short text answers: SQuAD's, CoQA's and Natural Questions' exact match and F1, LAMBADA's last word.

Sources: the evaluation scripts of SQuAD v1.1 (Rajpurkar et al. 2016), CoQA (Reddy et al. 2019) and the open Natural
Questions (Lee et al. 2019, language/orqa/utils/eval_utils.py).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Return SQuAD's normal form: lower case, no ASCII punctuation, no articles, single blanks, in this order."""
    words = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", words).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the prediction has the normal form of some reference, else 0.0.

    Args:
        prediction: The answer, `answer_in` of the generated text.
        references: Accepted answers.
    """
    answer = normalised(prediction)
    return float(any(answer == normalised(reference) for reference in references))


def nq_exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return `exact_match` after Unicode's canonical decomposition (NFD), as the open Natural Questions score it.

    "é" written as one character then equals "e" with a combining accent.

    Args:
        prediction: The answer, `answer_in` of the generated text.
        references: Accepted answers.
    """
    decomposed = [unicodedata.normalize("NFD", reference) for reference in references]
    return exact_match(unicodedata.normalize("NFD", prediction), decomposed)


def f1(prediction: str, references: Sequence[str]) -> float:
    """Return the best F1 of the bags of words over the references (SQuAD v1.1).

    Without a common word F1 is 0.0, also if both are empty.

    Args:
        prediction: The answer, `answer_in` of the generated text.
        references: Accepted answers.
    """
    return max(_bag_f1(normalised(prediction).split(), normalised(reference).split()) for reference in references)


def coqa_f1(prediction: str, references: Sequence[str]) -> float:
    """Return CoQA's F1: the mean over references left out once of the best F1 over the others.

    A human is compared with the other humans in the same way. With one reference it is the plain F1.
    Unlike in `f1`, an empty normal form equals an empty one.

    Args:
        prediction: The answer, `answer_in` of the generated text.
        references: Accepted answers.
    """
    answer = normalised(prediction).split()
    scores = []
    for reference in references:
        words = normalised(reference).split()
        scores.append(_bag_f1(answer, words) if answer and words else float(answer == words))
    return _each_left_out(scores)


def coqa_exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return CoQA's exact match: references are left out in turn as in `coqa_f1`.

    Args:
        prediction: The answer, `answer_in` of the generated text.
        references: Accepted answers.
    """
    answer = normalised(prediction)
    return _each_left_out([float(answer == normalised(reference)) for reference in references])


def last_word(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the prediction's first word is a reference, else 0.0; case counts, outer punctuation does not.

    Args:
        prediction: The answer, `answer_in` of the generated text.
        references: Accepted answers.
    """
    words = prediction.split(maxsplit=1)
    word = _strip_punctuation(words[0]) if words else ""
    return float(bool(word) and any(word == _strip_punctuation(reference) for reference in references))


def _each_left_out(scores: Sequence[float]) -> float:
    """Return the best score without each reference in turn, averaged; one score stays as it is."""
    if len(scores) == 1:
        return scores[0]
    return sum(max((*scores[:out], *scores[out + 1 :])) for out in range(len(scores))) / len(scores)


def _bag_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(answer) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _strip_punctuation(word: str) -> str:
    """Return the word without punctuation and symbols (of any script) at its ends."""
    kept = [index for index, character in enumerate(word) if unicodedata.category(character)[0] not in "PS"]
    return word[kept[0] : kept[-1] + 1] if kept else ""
