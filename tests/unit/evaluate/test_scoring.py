"""A record's outcome is its own: no batch, no neighbour and no earlier run changes it."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.evaluate import ResultsFolder, Sample, Scorer, Settings, evaluate, own_settings, read_samples
from pause_megatron.evaluate.scoring import cut_left
from pause_megatron.inference import DecodingPauses, Limits, Prompting
from pause_megatron.inference.places import Places
from pause_megatron.tasks import Decoding

SETTINGS = [
    Settings(pauses=0),
    Settings(pauses=3),
    Settings(pauses=3, location="prepend"),
    Settings(pauses=3, filler="."),
    Settings(pauses=2, prefix_attention="bidirectional"),
    Settings(pauses=2, decoding='{"count": 2, "every": 3, "in_prompt": true}'),
    Settings(pauses=1, decoding='{"entropy": 4.0, "limit": 2, "requests": true}'),
]


def outcomes(generator, task, settings, examples, batch_size=4) -> dict[str, dict]:
    """Lines of a samples file by the example's id."""
    scorer = Scorer(generator, task, settings, batch_size)
    found = {}
    for batch in scorer.batches(scorer.prepare(examples)):
        samples, _ = scorer.score(batch)
        found |= {sample.id: sample.as_json() for sample in samples}
    return found


def assert_same(one: dict[str, dict], other: dict[str, dict]) -> None:
    assert one.keys() == other.keys()
    for name, record in one.items():
        assert record.pop("log_likelihoods") == pytest.approx(other[name].pop("log_likelihoods"), abs=1e-4)
        assert record == other[name]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.name("m"))
def test_a_batched_outcome_is_the_single_one(generator, task, examples, settings):
    single = {}
    for example in examples:
        single |= outcomes(generator, task, settings, [example], batch_size=1)
    assert len({record["prediction"] for record in single.values()}) > 3
    assert_same(outcomes(generator, task, settings, examples, batch_size=5), single)


def test_pauses_within_answers_are_counted_named_and_never_mixed(generator, task, examples):
    """A prompt that they leave no room for is cut; results without them keep their identity."""
    own, other = Settings(pauses=2), Settings(pauses=2, decoding='{"every": 1, "in_prompt": true}')
    assert "decoding" not in own.document()
    assert own.name("m") != other.name("m") == replace(other).name("m")
    assert other != own
    found = outcomes(generator, task, other, examples[:2])
    for example in examples[:2]:
        record = found[example.id]
        assert record["tokens"]["inside"] > record["tokens"]["prompt"]
    assert all("inside" not in each["tokens"] for each in outcomes(generator, task, own, examples[:2]).values())
    long = replace(examples[0], prompt="word " * 400)
    [record] = outcomes(generator, task, other, [long]).values()
    assert record["cut"] > 0


def test_outcomes_are_those_of_the_generator(generator, task, examples):
    """Text prompts, one at a time, straight from `generate` and `score`."""
    found = outcomes(generator, task, Settings(pauses=4), examples)
    for example in examples[:5]:
        [completion] = generator.generate(
            [example.prompt], pauses=4, max_new_tokens=6, limits=Limits(stop=["\n"])
        ).completions
        assert found[example.id]["prediction"] == completion.text.strip()
        choices = example.choices
        scores, _ = generator.score([example.prompt] * len(choices), choices, pauses=4)
        assert found[example.id]["log_likelihoods"] == pytest.approx([s.log_likelihood for s in scores], abs=1e-4)
        new = len(completion.ids) + sum(score.tokens for score in scores)
        assert found[example.id]["tokens"] == {"prompt": completion.prompt_tokens, "pauses": 4, "new": new}
        best = max(range(len(choices)), key=lambda i: scores[i].log_likelihood)
        assert found[example.id]["scores"]["choice_accuracy"] == float(best == example.gold)


def test_a_prompt_that_is_too_long_loses_its_left_end_and_nothing_else(generator, task, examples):
    long = replace(examples[-1], id="long", prompt=" ".join([examples[-1].prompt] * 8))
    encoder, positions = generator.encoder, generator.model.config.max_position_embeddings
    whole = encoder.encode(long.prompt)
    assert len(whole) > positions
    longest = max(6, *(len(encoder.encode_continuation(text)) for text in long.choices))
    scorer = Scorer(generator, task, Settings(pauses=30), 4)
    [prepared] = scorer.prepare([long])
    assert len(prepared.prompt) + 30 + longest == positions
    text = prepared.prompt[len(encoder.leading) :]
    assert prepared.prompt[: len(encoder.leading)] == encoder.leading and whole[-len(text) :] == text
    found = outcomes(generator, task, Settings(pauses=30), [*examples, long])
    assert found["long"]["cut"] == len(whole) - len(prepared.prompt) > 0
    assert_same({"long": found["long"]}, outcomes(generator, task, Settings(pauses=30), [long]))
    assert {record["cut"] for name, record in found.items() if name != "long"} == {0}


def test_a_neighbours_long_choice_does_not_cut_a_prompt(generator, task, examples):
    """The room kept for a record's choices does not depend on the rest of the batch."""
    chosen = replace(task, kind="choice", metrics=("choice_accuracy",), primary="choice_accuracy")
    encoder, positions = generator.encoder, generator.model.config.max_position_embeddings
    long = replace(examples[0], id="long", choices=(" war" * 40, " peace"))
    full = replace(examples[1], id="full", prompt="a" + " of" * 400, choices=(" the", " a"))
    alone = outcomes(generator, chosen, Settings(pauses=5), [full])
    assert alone["full"]["tokens"]["prompt"] == positions - 5 - max(
        map(len, map(encoder.encode_continuation, full.choices))
    )
    both = outcomes(generator, chosen, Settings(pauses=5), [long, full])
    assert_same({"full": both["full"]}, alone)


@pytest.mark.parametrize(
    ("ids", "room", "expected"),
    [
        ([1, 5, 6, 7], 4, [1, 5, 6, 7]),
        ([1, 5, 6, 7], 3, [1, 6, 7]),
        ([1, 5, 6, 7], 2, [1, 7]),
        ([1, 5, 6, 7], 1, [7]),
        ([1, 5, 6, 7], 0, []),
        ([1, 5, 6, 7], -3, []),
        ([5, 6, 7], 2, [6, 7]),
    ],
)
def test_truncation_keeps_the_right_end_after_a_bos(ids, room, expected):
    assert cut_left(ids, [1], room) == expected


class Letters:
    """An encoder whose token i is a letter; 90 and 91 are pauses."""

    pause = SimpleNamespace(ids=range(90, 92))

    def decode_continuation(self, ids):
        return "" if ids[0] in (0, 90, 91) else chr(97 + ids[0])


def test_truncation_with_pauses_in_prompts_is_the_longest_that_fits():
    """Against cutting token by token; `every` counts from the cut, so more tokens may have fewer pauses."""
    rng, cuts = random.Random(0), 0
    for _ in range(4000):
        places = Places(
            Letters(),
            DecodingPauses(
                every=rng.choice([None, 1, 2, 3, 5]),
                after=rng.choice(["[a-c]", "[b-z]", "."]),
                count=rng.choice([1, 2]),
                in_prompt=True,
            ),
            (),
        )
        leading = rng.choice([[], [0], [0, 1], [2, 90]])
        ids = rng.choice([leading, []]) + rng.choices([0, 1, 2, 3, 5, 7, 15, 90, 91], k=rng.randrange(25))
        room = rng.randrange(-2, 45)
        expected = cut_left(ids, leading, room)
        while expected and len(expected) + len(places.in_prompt(expected)[0]) > room:
            expected = cut_left(ids, leading, len(expected) - 1)
        assert cut_left(ids, leading, places.longest(ids, leading, room)) == expected
        cuts += 0 < len(expected) < len(ids)
    assert cuts > 1000


def test_examples_that_cannot_be_asked_are_named(generator, task, examples):
    def prepare(*changed, pauses=3):
        return Scorer(generator, task, Settings(pauses=pauses), 4).prepare(changed)

    with pytest.raises(DataError, match="reading: id '0': expected once, got twice"):
        prepare(examples[0], examples[0])
    with pytest.raises(DataError, match="reading: record '0': choices: expected texts, none of them empty"):
        prepare(replace(examples[0], choices=(" a", "")))
    with pytest.raises(DataError, match="record '3': prompt: expected room for at least one token, but 250 pauses and"):
        prepare(examples[3], pauses=250)
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        prepare(pauses=256)


def test_what_is_not_given_is_the_models_own(generator, monkeypatch):
    assert own_settings(generator) == Settings(pauses=0)
    prompting = Prompting(location="prepend", filler=".")
    monkeypatch.setattr(generator, "pause", replace(generator.pause, m_ft=7, prompting=prompting))
    assert own_settings(generator, seed=2) == Settings(pauses=7, location="prepend", filler=".", seed=2)
    given = own_settings(generator, pauses=0, location="append", filler="", prefix_attention="bidirectional")
    assert given == Settings(pauses=0, prefix_attention="bidirectional")


def test_a_model_without_a_pause_token(without_pause, task, examples):
    with pytest.raises(ConfigError, match=r'the model has no pause token.*or a filler such as "."'):
        Scorer(without_pause, task, Settings(pauses=1), 4)
    assert len(outcomes(without_pause, task, Settings(pauses=0), examples)) == 12
    assert outcomes(without_pause, task, Settings(pauses=2, filler="."), examples)["0"]["tokens"]["pauses"] == 2


def test_an_interrupted_evaluation_resumes(without_pause, task, examples, tmp_path):
    """The number of records asked, over all runs, is the number of records; the outcomes are those of one run."""
    folder, settings, asked = ResultsFolder(tmp_path / "a", "m", "out"), Settings(pauses=0), []

    class Interrupted(Exception):
        pass

    def report(done: int, total: int, found: int) -> None:
        asked.append(done)
        if done == 8 and found == 0:
            raise Interrupted

    with pytest.raises(Interrupted):
        evaluate(without_pause, task, examples, settings, folder, batch_size=4, report=report)
    samples = tmp_path / "a" / "samples" / "reading-m0-append-seed0.jsonl"
    before = samples.read_bytes()
    entries = evaluate(without_pause, task, examples, settings, folder, batch_size=4, report=report)
    assert asked == [0, 4, 8, 8, 12] and samples.read_bytes().startswith(before)
    again = evaluate(without_pause, task, examples, settings, folder, batch_size=4, report=report)
    assert again == entries and asked[5:] == [12]
    evaluate(without_pause, task, examples, settings, ResultsFolder(tmp_path / "b", "m", "out"), batch_size=4)
    one, other = (read_samples(tmp_path / name / "samples" / samples.name) for name in "ab")
    assert timeless(one) == timeless(other)


def timeless(samples: dict[str, Sample]) -> dict[str, dict]:
    """The lines without the measured times."""
    found = {name: sample.as_json() for name, sample in samples.items()}
    for line in found.values():
        line.get("batch", {}).pop("seconds", None)
    return found


def test_other_examples_or_another_way_of_decoding_are_not_mixed(without_pause, task, examples, tmp_path):
    folder = ResultsFolder(tmp_path, "m", "out")
    evaluate(without_pause, task, examples[:3], Settings(pauses=0), folder)
    with pytest.raises(DataError, match=r"data: expected 'xxh3_128:.*' \(this run\), got 'xxh3_128:"):
        evaluate(without_pause, task, examples[:4], Settings(pauses=0), folder)
    longer = replace(task, decoding=Decoding(max_new_tokens=7))
    with pytest.raises(DataError, match=r"seed0.json: decoding.max_new_tokens: expected 7 \(this run\), got 6"):
        evaluate(without_pause, longer, examples[:3], Settings(pauses=0), folder)
    with pytest.raises(DataError, match="reading: expected at least one record"):
        evaluate(without_pause, task, [], Settings(pauses=0), folder)
