"""Records of a data set, with typed access to their fields; and the few named functions that prepare them.

A transform turns one record into the records that examples are made of. Each is named in a task's YAML file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from pause_megatron.config.spelling import nearest
from pause_megatron.errors import DataError


@dataclass(frozen=True)
class Record:
    """One record. `where` says where it stands ("FILE:LINE"); `part` numbers what one record was split into."""

    values: Mapping[str, Any]
    where: str
    part: int | None = None

    def get(self, path: str) -> Any:
        """The value at a dotted path (`answers.text`). Raises DataError where there is none."""
        value: Any = self.values
        for depth, name in enumerate(names := path.split(".")):
            if not isinstance(value, Mapping):
                self.wrong(".".join(names[:depth]), f"an object with the field {name!r}", value)
            if name not in value:
                inside = f" in {'.'.join(names[:depth])!r}" if depth else ""
                raise DataError(
                    f"{self.where}: expected the field {path!r}; the fields{inside} are "
                    f"{', '.join(map(str, value)) or 'none'}{nearest(name, map(str, value))}"
                )
            value = value[name]
        return value

    def text(self, path: str) -> str:
        """A text that is not blank, without white space around it."""
        return self._stripped(path, self.get(path), "a text")

    def texts(self, path: str) -> tuple[str, ...]:
        """A list of such texts (at least one), or one text."""
        value = self.get(path)
        if isinstance(value, str):
            return (self.text(path),)
        if not isinstance(value, list) or not value:
            self.wrong(path, "a text or a list of texts", value)
        return tuple(self._stripped(f"{path}[{index}]", item, "a text") for index, item in enumerate(value))

    def any_text(self, path: str) -> str:
        """A text that may be empty, as it is written."""
        value = self.get(path)
        if not isinstance(value, str):
            self.wrong(path, "a text", value)
        return value

    def index(self, path: str, size: int) -> int:
        """An integer (or its digits) in [0, size)."""
        value = self.get(path)
        number = int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value) else value
        if type(number) is not int or not 0 <= number < size:
            self.wrong(path, f"an index from 0 to {size - 1}", value)
        return number

    def wrong(self, path: str, expected: str, value: Any) -> NoReturn:
        """Raise the DataError of a field that is not what was expected."""
        raise DataError(f"{self.where}: field {path!r}: expected {expected}; came {_shown(value)}")

    def _stripped(self, path: str, value: Any, expected: str) -> str:
        if not isinstance(value, str):
            self.wrong(path, expected, value)
        if not value.strip():
            self.wrong(path, f"{expected} that is not empty", value)
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                self.wrong(path, expected, f"half of a UTF-16 pair, U+{ord(value[error.start]):04X}")
        return value.strip()


def coqa(record: Record) -> list[Record]:
    """A story with its conversation -> one record per turn: story, conversation, question, answers.

    `conversation` is the turns before, "Q: ...\\nA: ...\\n" each; it is empty at the first turn. `answers` are those of
    every human who was asked: the first one's, then `additional_answers`. Reads the layouts that are about: questions
    as a list or as {input_text: [...]}; further answers as a list per turn, as {human: {input_text: [...]}}, or none.
    """
    story = record.text("story")
    questions = record.texts("questions.input_text" if isinstance(record.get("questions"), Mapping) else "questions")
    given = record.texts("answers.input_text")
    if len(given) != len(questions):
        record.wrong("answers.input_text", f"{len(questions)} answers, one per question", f"{len(given)} answers")
    others = _coqa_others(record, len(questions))
    turns, conversation = [], ""
    for turn, (question, answer) in enumerate(zip(questions, given, strict=True)):
        values = {
            "story": story,
            "conversation": conversation,
            "question": question,
            "answers": [answer, *(human[turn] for human in others)],
        }
        turns.append(Record(values, f"{record.where} turn {turn + 1}", turn + 1))
        conversation += f"Q: {question}\nA: {answer}\n"
    return turns


def _coqa_others(record: Record, turns: int) -> list[tuple[str, ...]]:
    """Returns: for each further human, an answer per turn."""
    value = record.values.get("additional_answers")
    if value is None:
        return []
    if isinstance(value, Mapping):
        humans = [record.texts(f"additional_answers.{human}.input_text") for human in value]
    elif isinstance(value, list) and len(value) == turns:
        per_turn = [Record({"answers": item}, f"{record.where} turn {i + 1}") for i, item in enumerate(value)]
        lists = [turn.texts("answers") if turn.values["answers"] else () for turn in per_turn]
        if len({len(answers) for answers in lists}) > 1:
            record.wrong("additional_answers", "as many answers at every turn", value)
        humans = [tuple(human) for human in zip(*lists, strict=True)]
    else:
        record.wrong("additional_answers", f"answers for {turns} turns", value)
    for human in humans:
        if len(human) != turns:
            record.wrong("additional_answers", f"{turns} answers of each human", f"{len(human)} answers")
    return humans


def lambada(record: Record) -> list[Record]:
    """A passage -> its text up to the last word, and the word: context, word."""
    context, *word = record.text("text").rsplit(maxsplit=1)
    if not word:
        record.wrong("text", "at least two words", context)
    return [Record({"context": context, "word": word[0]}, record.where)]


def commonsense_qa(record: Record) -> list[Record]:
    """Labelled choices -> question, choices, options (the choices in one line), gold (index from 0)."""
    labels, choices = record.texts("choices.label"), record.texts("choices.text")
    if len(labels) != len(choices):
        record.wrong("choices.label", f"{len(choices)} labels, one per text", list(labels))
    key = record.any_text("answerKey")
    if key not in labels:
        record.wrong("answerKey", f"one of the labels {', '.join(labels)}", key)
    values = {
        "question": record.text("question"),
        "choices": list(choices),
        "options": "; ".join(choices),
        "gold": labels.index(key),
    }
    return [Record(values, record.where)]


def hellaswag(record: Record) -> list[Record]:
    """A scene -> query (activity and context), endings, label; WikiHow's markers taken out as the field does."""
    activity, begun = record.text("activity_label"), record.any_text("ctx_b").capitalize()
    values = {
        "query": without_markers(f"{activity}: {record.any_text('ctx_a')} {begun}"),
        "endings": [without_markers(ending) for ending in record.texts("endings")],
        "label": record.get("label"),
    }
    return [Record(values, record.where)]


def without_markers(text: str) -> str:
    """ " [title]" ends a sentence; every other "[...]" goes; double blanks become one (once). As lm-eval does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


TRANSFORMS: Mapping[str, Callable[[Record], list[Record]]] = MappingProxyType(
    {"coqa": coqa, "commonsense_qa": commonsense_qa, "hellaswag": hellaswag, "lambada": lambada}
)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    shortened = text if len(text) <= 60 else text[:60] + "..."
    kind = "" if isinstance(value, (str, int, float)) else f"{type(value).__name__} "
    return f"{kind}{shortened}"
