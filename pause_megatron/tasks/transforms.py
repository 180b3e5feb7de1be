"""Named functions that turn one record of a dataset into the records that examples are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pause_megatron.tasks.records import Record


def coqa(record: Record) -> list[Record]:
    """Return one record per turn of a conversation about a story: story, conversation, question, answers.

    `conversation` holds the earlier turns, a line "Q: ..." and a line "A: ..." each; it is empty at the first turn.
    `answers` are those of every human: the first one's, then `additional_answers`. Two layouts of the dataset are
    read. Questions are a list or {input_text: [...]}; further answers are a list per turn, {human: {input_text:
    [...]}}, or absent.
    """
    story = record.text("story")
    questions = record.texts("questions.input_text" if isinstance(record.get("questions"), Mapping) else "questions")
    given = record.texts("answers.input_text")
    if len(given) != len(questions):
        record.refuse("answers.input_text", f"{len(questions)} answers, one per question", f"{len(given)} answers")
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
    """Return an answer per turn for each further human."""
    value = record.values.get("additional_answers")
    if value is None:
        return []
    if isinstance(value, Mapping):
        humans = [record.texts(f"additional_answers.{human}.input_text") for human in value]
    elif isinstance(value, list) and len(value) == turns:
        per_turn = [Record({"answers": item}, f"{record.where} turn {i + 1}") for i, item in enumerate(value)]
        lists = [turn.texts("answers") if turn.values["answers"] else () for turn in per_turn]
        if len({len(answers) for answers in lists}) > 1:
            record.refuse("additional_answers", "as many answers at every turn", value)
        humans = [tuple(human) for human in zip(*lists, strict=True)]
    else:
        record.refuse("additional_answers", f"answers for {turns} turns", value)
    for human in humans:
        if len(human) != turns:
            record.refuse("additional_answers", f"{turns} answers of each human", f"{len(human)} answers")
    return humans


def lambada(record: Record) -> list[Record]:
    """Split a passage into its text up to the last word, and that word: context, word."""
    context, *word = record.text("text").rsplit(maxsplit=1)
    if not word:
        record.refuse("text", "at least two words", context)
    return [Record({"context": context, "word": word[0]}, record.where)]


def commonsense_qa(record: Record) -> list[Record]:
    """Return a record with question, choices, options (the choices in one line) and gold (index from 0)."""
    labels, choices = record.texts("choices.label"), record.texts("choices.text")
    if len(labels) != len(choices):
        record.refuse("choices.label", f"{len(choices)} labels, one per text", list(labels))
    key = record.any_text("answerKey")
    if key not in labels:
        record.refuse("answerKey", f"one of the labels {', '.join(labels)}", key)
    values = {
        "question": record.text("question"),
        "choices": list(choices),
        "options": "; ".join(choices),
        "gold": labels.index(key),
    }
    return [Record(values, record.where)]


def hellaswag(record: Record) -> list[Record]:
    """Return a record with query (activity and context), endings and label, without WikiHow's markers."""
    activity, start = record.text("activity_label"), record.any_text("ctx_b").capitalize()
    values = {
        "query": without_markers(f"{activity}: {record.any_text('ctx_a')} {start}"),
        "endings": [without_markers(ending) for ending in record.texts("endings")],
        "label": record.get("label"),
    }
    return [Record(values, record.where)]


def without_markers(text: str) -> str:
    """Remove WikiHow's markers as lm-eval does.

    " [title]" becomes a full stop, every other "[...]" is removed, and double blanks become one (once).
    """
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


TRANSFORMS: Mapping[str, Callable[[Record], list[Record]]] = MappingProxyType(
    {"coqa": coqa, "commonsense_qa": commonsense_qa, "hellaswag": hellaswag, "lambada": lambada}
)
