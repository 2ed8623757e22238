"""Things to remember in ordinary prose: facts, pairs, labelled examples, hidden in real text.

These tasks are not in the paper. A statement stands at a random place of a text, and its end asks
for what the statement says. Answers are drawn at random, so nothing but the statement tells them;
answers of one kind have equally many tokens, so rows can be compared token by token.
`examples/train_memory.py` trains a model on them; large models know them anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random

import torch

from simba.checks import one_of, whole
from simba.errors import InputError
from simba.evaluate.checks import ANYWHERE, places_in, room_for
from simba.evaluate.synthetic import Rows
from simba.evaluate.texts import Document, Tokenizer, ends

KINDS = ("fact", "pairs", "fewshot")
"""The tasks, see :func:`draw`."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Anna Brandt Clara Dora Edwin Flora Gerald Helen Irene James Karl Laura Martin Nora Oscar "
    "Peter Quentin Rosa Samuel Thomas Ursula Victor Walter Yvonne"
)
THINGS = _words(
    "book key letter ring map coin sword picture watch hat basket box lamp mirror purse rope bell "
    "knife cup chain flag drum"
)
PLACES = _words(
    "garden kitchen church tower forest cellar river house boat field market castle school village "
    "chamber palace hall court temple desert island valley mountain bridge station hotel town city "
    "library room"
)
WORDS = _words(
    "water fire stone bread horse silver paper music winter summer iron gold salt wood glass wind "
    "snow earth blood light night morning evening spring battle law king queen soldier doctor "
    "captain servant master money war food power death life heart"
)
KINDS_OF_THINGS = {
    "animals": _words("horse dog cat cow sheep lion wolf bird fish bear goat snake"),
    "body": _words("hand foot eye ear nose mouth arm knee head heart neck finger"),
    "food": _words("bread meat milk cheese wine fruit corn rice butter sugar honey egg"),
    "family": _words(
        "father mother son daughter brother sister uncle wife husband cousin child aunt"
    ),
}
LABELS = _words("red blue green white black yellow brown grey")
ENOUGH = 5
"""Answers of one kind that are enough to draw from."""
PAIRS, EXAMPLES, OTHERS = 6, 3, 2
"""Pairs in a list, labelled examples of each kind of things, other facts beside one."""


@dataclass(frozen=True)
class Item:
    """One thing to remember, as pieces of text that are tokenized one by one."""

    statement: tuple[str, ...]
    place: int
    """The piece of ``statement`` that the answer stands in."""
    question: str
    answer: str
    beside: tuple[str, ...] = ()
    """Further statements, at places of their own."""


@dataclass(frozen=True)
class Pools:
    """The answers to draw from: those to which a tokenizer gives equally many tokens.

    As few as possible, since the later tokens of an answer follow from its first.
    """

    places: tuple[str, ...]
    words: tuple[str, ...]
    labels: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Pools:
        """The pools for a tokenizer.

        Raises:
            InputError: the tokenizer gives nearly every word another number of tokens.
        """
        return cls(*(_equally_long(pool, tokenizer) for pool in (PLACES, WORDS, LABELS)))


def _equally_long(words: Sequence[str], tokenizer: Tokenizer) -> tuple[str, ...]:
    by_size: dict[int, list[str]] = {}
    for word in words:
        by_size.setdefault(len(tokens_of(f" {word}", tokenizer)), []).append(word)
    enough = [by_size[size] for size in sorted(by_size) if len(by_size[size]) >= ENOUGH]
    if not enough:
        raise InputError(
            f"this tokenizer makes different numbers of tokens from the answers {', '.join(words)},"
            " so answers can't be compared"
        )
    return tuple(enough[0])


def tokens_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a piece of text, without special ones."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def draw(kind: str, pools: Pools, random: Random, *, present: bool = True) -> Item:
    """One thing to remember.

    - ``fact``: where somebody keeps something; other people keep other things elsewhere.
    - ``pairs``: a list of pairs of words. Asked for is the second word of one of them.
    - ``fewshot``: words with a label for each kind of thing. Asked for is the label of a new word.

    Args:
        kind: one of :data:`KINDS`.
        pools: the answers to draw from.
        random: the same state gives the same item.
        present: False puts another answer into the statement; all else stays the same.

    Raises:
        InputError: there is no such kind.
    """
    one_of(kind, KINDS, "kind", InputError)
    if kind == "fact":
        names, things = random.sample(NAMES, 1 + OTHERS), random.sample(THINGS, 1 + OTHERS)
        answer, other, *elsewhere = random.sample(pools.places, 2 + OTHERS)
        shown = answer if present else other
        return Item(
            (f"\n{names[0]} keeps the {things[0]} in the", f" {shown}", ".\n"),
            1,
            f"\nWhere does {names[0]} keep the {things[0]}? In the",
            f" {answer}",
            tuple(
                f"\n{name} keeps the {thing} in the {place}.\n"
                for name, thing, place in zip(names[1:], things[1:], elsewhere, strict=True)
            ),
        )
    if kind == "pairs":
        seconds = random.sample(pools.words, min(PAIRS, len(pools.words) - 1))
        left = [word for word in pools.words if word not in seconds]
        firsts = random.sample([word for word in THINGS if word not in seconds], len(seconds))
        asked, other = random.randrange(len(seconds)), random.choice(left)
        told = list(seconds)
        told[asked] = seconds[asked] if present else other
        pieces = ["\nThe pairs are:"]
        for first, second in zip(firsts, told, strict=True):
            pieces += [f" {first} and", f" {second}", ","]
        return Item(
            (*pieces[:-1], ".\n"), 2 + 3 * asked,
            f"\nIn the pairs, {firsts[asked]} and", f" {seconds[asked]}",
        )  # fmt: skip
    kinds = list(KINDS_OF_THINGS)
    labels = random.sample(pools.labels, len(kinds))
    members = {name: random.sample(KINDS_OF_THINGS[name], EXAMPLES + 1) for name in kinds}
    asked, step = random.randrange(len(kinds)), random.randrange(1, len(kinds))
    lines = [(name, word) for name in kinds for word in members[name][:EXAMPLES]]
    random.shuffle(lines)
    # the control's kinds of things have each other's labels
    shift = 0 if present else step
    told = [labels[(i + shift) % len(kinds)] for i in range(len(kinds))]
    pieces, place = ["\nExamples:"], 0
    for name, word in lines:
        pieces += [f" {word} is", f" {told[kinds.index(name)]}", ","]
        place = len(pieces) - 2 if name == kinds[asked] else place
    new = members[kinds[asked]][-1]
    return Item((*pieces[:-1], ".\n"), place, f"\nLike the examples, {new} is", f" {labels[asked]}")


def prose_in_text(
    kind: str,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    length: int,
    room: int,
    prompts: int,
    seed: int,
    places: Sequence[float] = ANYWHERE,
    present: bool = True,
) -> Rows:
    """Hide something to remember at a random place of real text, and ask for it at the end.

    Args:
        kind: one of :data:`KINDS`; see :func:`draw`.
        documents: the texts. The text of a prompt depends on ``room``, not on ``length``, which
            only decides how much is cut off at its beginning.
        tokenizer: the model's.
        length: tokens of each prompt.
        room: tokens kept free before a question, at least ``length``.
        prompts: prompts per document.
        seed: of what is hidden, and where.
        places: between which shares of the text it is said, counted from the beginning.
        present: False puts another answer into the statement.

    Raises:
        InputError: there is no such kind; a document or the length is too short; a number is not an
            integer or is too small; ``room`` is below ``length``; or the tokenizer does not give
            enough answers equally many tokens.
    """
    if not documents:
        raise InputError("no documents to measure on")
    one_of(kind, KINDS, "kind", InputError)
    room = room_for([whole(length, "length")], room, "lengths")
    prompts, random = whole(prompts, "prompts"), Random(whole(seed, "seed", 0))
    low, high = places_in(places)
    pools = Pools.of(tokenizer)
    rows, needles = [], []
    for document in documents:
        for end in ends(document, room, 0, prompts):
            depths, state = [random.random() for _ in range(1 + OTHERS)], random.randrange(2**32)
            depths[0] = low + (high - low) * depths[0]
            item = draw(kind, pools, Random(state), present=present)
            pieces = [tokens_of(piece, tokenizer) for piece in item.statement]
            beside = [tokens_of(text, tokenizer) for text in item.beside]
            statements = [list(chain.from_iterable(pieces)), *beside]
            question = tokens_of(item.question, tokenizer)
            around = length - len(question) - sum(map(len, statements))
            if around < 1:
                raise InputError(
                    f"a prompt of {length} tokens has no room for text, a question and its {kind}"
                )
            starts = [int(depth * (around + 1)) for depth in depths[: len(statements)]]
            text = document.ids[end - around : end].tolist()
            order = sorted(range(len(statements)), key=lambda each: (starts[each], each))
            row: list[int] = []
            done = needle = 0
            for each in order:
                row += text[done : starts[each]]
                done = starts[each]
                if each == 0:
                    needle = len(row) + sum(map(len, pieces[: item.place]))
                row += statements[each]
            answer = tokens_of(item.answer, tokenizer)
            rows.append(row + text[done:] + question + answer)
            needles.append([needle + offset for offset in range(len(answer))])
    ids = torch.tensor(rows)
    return Rows(ids, length, torch.arange(length, ids.shape[1]), torch.tensor(needles))
