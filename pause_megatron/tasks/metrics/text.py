"""Metrics of short answers in words: SQuAD's exact match and F1, CoQA's F1, LAMBADA's last word.

Sources: the evaluation scripts of SQuAD v1.1 (Rajpurkar et al. 2016) and CoQA (Reddy et al. 2019).
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
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single blanks; in this order."""
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the prediction has the normal form of some reference, else 0.0."""
    answer = normalised(prediction)
    return float(any(answer == normalised(reference) for reference in references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, as bags; the best over references. SQuAD v1.1: nothing in
    common is 0.0, also where both are empty."""
    return max(_bag_f1(normalised(prediction).split(), normalised(reference).split()) for reference in references)


def coqa_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 where people were asked too: each reference is left out once, the best F1 over the others is taken, and these
    are averaged; so a person, who is compared with the others, is measured alike. One reference: plain F1.

    Other than in `f1`, an empty normal form equals an empty one.
    """
    answer = normalised(prediction).split()
    scores = []
    for reference in references:
        words = normalised(reference).split()
        scores.append(_bag_f1(answer, words) if answer and words else float(answer == words))
    if len(scores) == 1:
        return scores[0]
    return sum(max(scores[:out] + scores[out + 1 :]) for out in range(len(scores))) / len(scores)


def last_word(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the prediction's first word is a reference, else 0.0. Case counts; punctuation around it does not."""
    words = prediction.split(maxsplit=1)
    word = _bare(words[0]) if words else ""
    return float(bool(word) and any(word == _bare(reference) for reference in references))


def _bag_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(answer) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _bare(word: str) -> str:
    """The word without the punctuation and symbols (of any script) at its ends."""
    kept = [place for place, character in enumerate(word) if unicodedata.category(character)[0] not in "PS"]
    return word[kept[0] : kept[-1] + 1] if kept else ""
