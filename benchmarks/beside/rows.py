"""Alpaca-style rows of made-up words: deterministic, no download, with the long-tailed lengths of instruction data.

What a row says does not matter to its speed; how long it is does. Lengths follow Alpaca's: a short instruction, an
input in four rows of ten, an answer whose length is log-normal, so that most rows are short and a few are very long.
"""

import math
import random
from dataclasses import dataclass

ONSETS = ("b", "br", "c", "d", "f", "fl", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "tr", "v")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
CODAS = ("", "", "", "l", "n", "nd", "r", "s", "st", "t")
LEXICON_WORDS = 12_000
INPUT_SHARE = 0.4


@dataclass(frozen=True)
class AlpacaRow:
    """One instruction, its optional input ("" = none) and the answer that is trained on."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class WordCounts:
    """A log-normal number of words: `median` words, spread `sigma` (of the logarithm), never outside the bounds."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, source: random.Random) -> int:
        """Return a number of words between `least` and `most`."""
        return min(self.most, max(self.least, round(math.exp(source.gauss(math.log(self.median), self.sigma)))))


INSTRUCTION = WordCounts(median=9.0, sigma=0.4, least=3, most=40)
INPUT = WordCounts(median=7.0, sigma=0.8, least=1, most=80)
ANSWER = WordCounts(median=19.0, sigma=1.1, least=1, most=300)


def lexicon(words: int, source: random.Random) -> tuple[str, ...]:
    """Return `words` different made-up words, the frequent ones (first) shorter than the rare."""
    found: dict[str, None] = {}
    while len(found) < words:
        syllables = 1 + (len(found) > 60) + (source.random() < 0.3) + (source.random() < 0.1)
        word = "".join(source.choice(ONSETS) + source.choice(VOWELS) + source.choice(CODAS) for _ in range(syllables))
        found[word] = None
    return tuple(found)


class Writer:
    """Draws words by Zipf's law (the n-th word 1/n as often as the first) and sets them as sentences."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.words = lexicon(LEXICON_WORDS, source)
        total = 0.0
        self.cumulative: list[float] = []
        for rank in range(1, len(self.words) + 1):
            total += 1.0 / rank
            self.cumulative.append(total)

    def text(self, count: int) -> str:
        """Return `count` words: sentences of 6 to 16 words, capital first, full stop last."""
        drawn = self.source.choices(self.words, cum_weights=self.cumulative, k=count)
        sentences: list[str] = []
        while drawn:
            length = self.source.randint(6, 16)
            sentences.append(" ".join(drawn[:length]).capitalize() + ".")
            drawn = drawn[length:]
        return " ".join(sentences)


def make_rows(count: int, seed: int) -> list[AlpacaRow]:
    """Return `count` rows; the same for the same `count` and `seed`, on every machine."""
    source = random.Random(seed)
    writer = Writer(source)
    rows: list[AlpacaRow] = []
    for _ in range(count):
        instruction = writer.text(INSTRUCTION.draw(source))
        given = writer.text(INPUT.draw(source)) if source.random() < INPUT_SHARE else ""
        rows.append(AlpacaRow(instruction, given, writer.text(ANSWER.draw(source))))
    return rows
