"""Models and examples that the tests of a session share."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from support.prose import documents
from support.tiny_llama import byte_level_tokenizer, llama, sentencepiece_tokenizer

from pause_megatron.inference import PauseGenerator
from pause_megatron.tasks import Decoding, Example, FinetuneDefaults


@dataclass(frozen=True)
class Reading:
    """A task of a user's own: the words that follow in a speech, decoded or chosen."""

    name: str = "reading"
    kind: str = "generate"
    folder: str = "reading"
    metrics: tuple[str, ...] = ("exact_match", "choice_accuracy")
    primary: str = "exact_match"
    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=6, stop=("\n",)))
    finetune: FinetuneDefaults = field(default_factory=FinetuneDefaults)

    def examples(self, split: str, path: str | None, limit: int | None) -> list[Example]:
        found = []
        for number, text in enumerate(documents(12)[:limit]):
            words = text.split()
            size = 3 + 5 * number
            choices = tuple(" " + " ".join(words[at : at + 1 + at % 4]) for at in range(number % 3 + 2))
            answer = " ".join(words[size : size + 3])
            found.append(
                Example(
                    id=str(number),
                    prompt=" ".join(words[:size]),
                    target=f" {answer}",
                    references=(answer,),
                    choices=choices,
                    gold=number % 2,
                )
            )
        return found


@pytest.fixture(scope="session")
def task():
    return Reading()


@pytest.fixture(scope="session")
def examples(task):
    return task.examples("eval", None, None)


@pytest.fixture(scope="session", params=["sentencepiece", "sentencepiece with BOS", "byte level"])
def generator(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        tokenizer = byte_level_tokenizer(folder)
    else:
        tokenizer = sentencepiece_tokenizer(folder, bos="BOS" in request.param)
    return PauseGenerator(llama(len(tokenizer)), tokenizer)


@pytest.fixture(scope="session")
def without_pause(tmp_path_factory):
    tokenizer = sentencepiece_tokenizer(tmp_path_factory.mktemp("tokenizer"), pause=False)
    return PauseGenerator(llama(len(tokenizer), pauses=0), tokenizer)
