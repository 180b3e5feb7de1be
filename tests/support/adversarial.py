"""Text in which tokenizers have been seen to differ, made up at random from a seed."""

from __future__ import annotations

import random

from support.prose import documents

ATOMS = (
    # special tokens and byte pieces, spelled out
    *("<pause>", "</s>", "<s>", "<unk>", "<|endoftext|>", "<0x0A>", "<0xE2>", "[PAD]", "<sep>"),
    # white space of every kind, and what SentencePiece writes for it
    *("▁", "▁▁", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x0c", "\x85", "\u00a0", "\u1680", "\u180e"),
    *("\u2009", "\u2028", "\u3000", "\u200b", "\ufeff", "\u00ad"),
    # control characters, noncharacters, private use
    *("\0", "\x01", "\x7f", "\ufffd", "\ufffe", "\ue000", "\U000e0001", "\U0010ffff"),
    # letters that normalization changes, marks without a base, other scripts, emoji made of several
    *("é", "e\u0301", "\u0300\u0301\u0302", "ﬁ", "Å", "ａｂｃ", "①", "½", "ß", "İ", "ı", "ſ", "\u05d0", "\u0600"),
    *("한국어", "日本語", "ไทย", "😀", "👩‍👩‍👧", "🇩🇪"),
    # words, numbers, punctuation, code
    *("a", "the", " the", "The", "123", "1234567", "3.14", "a" * 50, "ab" * 40, "!!!!!!", "....", "-" * 30, "_" * 9),
    *("don't", "I'M", "we'VE", "http://x.y/z?a=b&c=d", "def f(x):\n    return x", "x = {\n\t'a': [1]}"),
)


def adversarial(seed: int, count: int) -> list[str]:
    """Texts of 1 to 30 parts: the atoms above, real words, random code points, runs of one character."""
    rng = random.Random(seed)
    words = [word for text in documents(100) for word in text.split(" ")]
    return ["".join(_part(rng, words) for _ in range(rng.choice((1, 2, 3, 5, 10, 30)))) for _ in range(count)]


def _part(rng: random.Random, words: list[str]) -> str:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(ATOMS)
    if kind < 0.8:
        return rng.choice(words) + rng.choice(("", " ", " ", "  "))
    if kind < 0.9:
        ranges = ((0, 0x80), (0, 0x300), (0, 0xD800), (0xE000, 0x110000))
        return chr(rng.randrange(*rng.choice(ranges)))
    return rng.choice((" ", "▁", "a", "\n", "e", "<")) * rng.randrange(1, 40)
