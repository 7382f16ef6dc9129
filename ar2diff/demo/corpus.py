"""Generator of the demo corpus: small children's stories with a counting question.

A document is a dict with the keys ``level, story, question, answer_work, answer``:

* level 0: a plain story, no question (the three question fields are empty strings);
* level 1: one addition;
* level 2: an addition, then a subtraction;
* level 3: three or four events;
* level 4: two kinds of objects or two children, with events that may not matter; the worked answer
  names what each chain of sums counts ("Mia: 2 + 3 = 5. Ben: ...").

Every number a reader has to work with, on the way or at the end, lies in 0..20.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

PRETRAIN_LEVELS = (0, 0, 1, 2, 3, 3, 4, 4)  # a quarter plain stories, hard questions most often
MAX_NUMBER = 20
VALID_SHARE = 16  # one story in this many belongs to the valid split

GIRLS = "Mia Lily Anna Ella Rosa Nora Zoe Ivy".split()
BOYS = "Ben Tom Sam Max Leo Finn Omar Jack".split()
ADULTS = "Mum Dad Grandma Grandpa".split()
# place: (spots in it, objects found there, animals that live there)
PLACES = {
    "at the beach": ("rock boat pier", "shell stone feather stick", "gull crab"),
    "in the garden": ("tree gate wall", "flower apple pear leaf", "bird cat"),
    "in the forest": ("oak stream path", "nut cone mushroom berry", "fox bird"),
    "on the farm": ("barn fence well", "egg carrot potato pumpkin", "goat hen"),
    "in the park": ("bench pond swing", "ball leaf stick flower", "dog duck"),
    "at school": ("door desk window", "pencil book card sticker", "bird cat"),
    "at home": ("bed table sofa", "block button car ribbon", "cat dog"),
    "at the market": ("cart fountain corner", "plum cookie coin bun", "dog bird"),
}
PLURALS = {"leaf": "leaves", "berry": "berries", "potato": "potatoes"}
ADJECTIVES = "small big nice new pretty red blue".split()

# In templates: N the child, she/her/hers its pronouns, F a friend, G a grown-up, S a spot,
# P the place, A an animal, n "2 shells", m "2 more shells", things "shells".
OPENINGS = (
    "One day {N} was {P}.",
    "On a sunny day {N} played {P}.",
    "{N} was {P} with {F}.",
    "It was a cold morning, and {N} was {P}.",
    "{N} and {G} spent the day {P}.",
    "After lunch {N} played {P}.",
    "{N} liked to play {P}.",
    "Once there was a kind child called {N}. {she} was {P}.",
)
SCENES = (
    "The sun was warm.",
    "A soft wind blew.",
    "It had rained all night.",
    "The sky was blue.",
    "{she} was very happy.",
    "{she} felt a little sleepy.",
    '"What a good day!" said {N}.',
    "{N} sang a song.",
    "A {A} sat by the {S}.",
    '"Do not go too far," said {G}.',
    '"Hello!" said {F}.',
    "{she} had {hers} old bag with {her}.",
)
STARTS = (
    "{N} had {n}.",
    "{N} had {n} in {hers} bag.",
    "In {hers} bag {N} had {n}.",
    "{N} began the day with {n}.",
    '"I have {n}," said {N}.',
    "{N} had put {n} in a box.",
)
GAINS = (
    "{she} found {m} by the {S}.",
    "{F} gave {her} {m}.",
    "{G} gave {N} {m}.",
    "Then {N} got {m} from {G}.",
    "{she} picked up {m}.",
    '"Look!" said {F}, and gave {N} {m}.',
    "{G} had {m} for {N}.",
    "Near the {S} {N} found {m}.",
)
LOSSES = (
    "{she} gave {n} to {F}.",
    "{N} lost {n} by the {S}.",
    "Then {n} fell out of {hers} bag.",
    "A {A} took {n} from {N}.",
    "{F} asked for {n}, and {N} said yes.",
    "{she} gave {n} to {G}.",
    '"Here you are," said {N}, and gave {n} to {F}.',
)
GLAD = ("{she} smiled.", "What luck!", "{N} was glad.", '"How nice!" said {N}.')
THANKS = ("{she} smiled.", '"Thank you!" said {N}.', "{N} said thank you.", "{N} was glad.")
SHARED = (
    '"You are kind," said {O}.',
    "{O} was glad.",
    "It is good to share.",
    "{O} said thank you.",
)
SAD = ("{she} was a little sad.", '"Oh no!" said {N}.', "{N} sighed.", "But {she} did not cry.")
NOISE = (
    "{N} saw {k} clouds in the sky.",
    "{F} counted {k} birds by the {S}.",
    "{G} told {k} funny stories.",
    "They heard {k} bells far away.",
)
ENDINGS = (
    "Then it was time to go to bed.",
    "In the evening {N} told {G} about the day.",
    "{N} slept well that night.",
    "It was a lovely day.",
    "{N} ran back to {G} with a big smile.",
    "Soon the stars came out.",
    "{G} gave {N} a hug.",
    "Then they all had warm soup.",
)
# Plain stories: each plot is a chain of steps, each step a choice of sentences.
PLOTS = (
    (
        ("{N} could not find {hers} {A}.", "The little {A} was gone."),
        ("{she} looked by the {S}, but it was not there.", '"Where are you?" called {N}.'),
        ("{F} came to help.", '"I will help you," said {F}.'),
        ("They heard a small sound behind the {S}.", "Then {F} saw a tail by the {S}."),
        ("The {A} was safe.", '"There you are!" said {N}, and {she} was so glad.'),
    ),
    (
        ("{N} wanted to build a tower of {things}.", "{N} and {F} built a house of {things}."),
        ("It grew and grew.", "{she} worked all morning."),
        ("Then a {A} ran by, and it fell down.", "But the wind blew, and it all fell down."),
        ("{N} began to cry.", '"Oh no!" said {N}.'),
        ('"Let us try again," said {F}.', "{F} said they could try again."),
        ("The new one was even better.", "This time it did not fall."),
    ),
    (
        ("Dark clouds came, and it began to rain.", "All at once there was a loud storm."),
        ("{N} hid by the {S}.", "{N} and {F} ran to the {S}."),
        ("{she} was afraid.", '"I am afraid," said {N}.'),
        ("{F} held {hers} hand.", '"The rain will stop soon," said {F}.'),
        ("Soon the sun came back.", "Then they saw a rainbow in the sky."),
    ),
    (
        ("A new child called {F} came, and {N} was shy.", "{N} saw {F} sit all alone by the {S}."),
        ("{she} did not know what to say.", "{N} thought for a while."),
        ("Then {she} gave {F} some of {hers} {things}.", '"Do you want to play?" asked {N}.'),
        ("{F} smiled.", '"Yes, I do!" said {F}.'),
        ("Now they were friends.", "They played until it was dark."),
    ),
    (
        ("{N} found a small {A} by the {S}.", "A little {A} sat by the {S} and could not walk."),
        ("It was cold and hungry.", '"You poor thing," said {N}.'),
        ("{she} gave it some warm milk.", "{G} put it in a soft box."),
        ("Day by day it got better.", "{N} sang to it all night."),
        ("At last the {A} could run and play again.", "Then the {A} was well, and {N} let it go."),
    ),
    (
        (
            "{N} took a box of {things} from {F} and did not ask.",
            "{N} broke a box that {F} had made.",
        ),
        ('"Who did this?" asked {G}.', "{F} was very sad."),
        ("{N} hid behind the {S}.", "{she} did not feel good."),
        ('"It was me, and I am sorry," said {N}.', "Then {she} said that {she} was sorry."),
        ('"Thank you for the truth," said {G}.', "{F} was not angry any more."),
        ("They were friends again.", "After that {N} always asked first."),
    ),
)


def _count(number: int, noun: str, word: str = "") -> str:
    """``2, "shell", "more"`` -> ``"2 more shells"``."""
    noun = noun if number == 1 else PLURALS.get(noun, noun + "s")
    return " ".join(filter(None, (str(number), word, noun)))


class _Writer:
    """Fills templates in for one story; ``names[0]`` is the child the story is about."""

    def __init__(self, rng: random.Random, children: int):
        self.rng, self.said = rng, set()
        girl = rng.random() < 0.5
        same, other = (GIRLS, BOYS) if girl else (BOYS, GIRLS)
        self.names = rng.sample(same, children)
        self.place = rng.choice(list(PLACES))
        spots, objects, animals = (part.split() for part in PLACES[self.place])
        self.objects = rng.sample(objects, 2)
        # The friend is of the other sex, so that "she" and "he" never mean two people.
        self.fields = dict(
            F=rng.choice(other),
            G=rng.choice(ADULTS),
            A=rng.choice(animals),
            S=rng.choice(spots),
            P=self.place,
            things=_count(2, self.objects[0])[2:],
        )
        self.pronouns = ("she", "her", "her") if girl else ("he", "him", "his")

    def say(self, templates: Sequence[str], who: int = 0, **fields: str) -> str:
        """One sentence about ``names[who]``, from a template not yet used in this story."""
        fresh = [t for t in templates if t not in self.said] or list(templates)
        template = self.rng.choice(fresh)
        self.said.add(template)
        name = self.names[who]
        # With two children a pronoun could mean either, so both go by their names.
        she, her, hers = self.pronouns if len(self.names) == 1 else (name, name, name + "'s")
        fields = self.fields | dict(N=name, she=she, her=her, hers=hers) | fields
        sentences = re.split(r"(?<=\. )", template.format(**fields))
        return "".join(s[0].upper() + s[1:] for s in sentences)

    def event(self, delta: int, noun: str, who: int = 0) -> str:
        """A gain (``delta > 0``) or a loss of objects, often with what the child felt."""
        counts = dict(n=_count(abs(delta), noun), m=_count(abs(delta), noun, "more"))
        line = self.say(GAINS if delta > 0 else LOSSES, who, **counts)
        # Whoever was given something gives thanks; what was lost or taken makes a child sad.
        other = next((self.fields[k] for k in "FG" if self.fields[k] in line), "")
        after = (THANKS if other else GLAD) if delta > 0 else (SHARED if other else SAD)
        if self.rng.random() < 0.4:
            line += " " + self.say(after, who, O=other)
        return line


def _deltas(signs: Sequence[int], start: int, rng: random.Random) -> list[int]:
    """Amounts of 1..6 with the given signs; a sign flips where the count would leave 0..20."""
    deltas, now = [], start
    for sign in signs:
        if now in (0, MAX_NUMBER):  # only one direction stays in the range
            sign = 1 if now == 0 else -1
        room = MAX_NUMBER - now if sign > 0 else now
        deltas.append(sign * rng.randint(1, min(6, room)))
        now += deltas[-1]
    return deltas


def _work(start: int, deltas: Sequence[int], label: str = "") -> tuple[list[str], int]:
    """The equations from ``start`` through every delta, and the final count."""
    lines, now = [], start
    for delta in deltas:
        lines.append(f"{now} {'+' if delta > 0 else '-'} {abs(delta)} = {now + delta}.")
        now += delta
    return [label + lines[0], *lines[1:]], now


def _plain(rng: random.Random) -> str:
    writer = _Writer(rng, 1)
    # A plot brings its friend and animal in by itself, often as somebody new.
    openings, scenes = (
        [t for t in ts if "{F}" not in t and "{A}" not in t] for ts in (OPENINGS, SCENES)
    )
    steps = (openings, scenes, *rng.choice(PLOTS), ENDINGS)
    return " ".join(writer.say(step) for step in steps)


def _one_count(level: int, rng: random.Random) -> dict:
    """Levels 1 to 3: one child, one kind of object."""
    writer = _Writer(rng, 1)
    noun, start = writer.objects[0], rng.randint(1, 9)
    signs = {1: [1], 2: [1, -1]}.get(level) or [1, *rng.choices((1, -1), k=rng.randint(2, 3))]
    deltas = _deltas(signs, start, rng)
    adjective = rng.choice(ADJECTIVES) if rng.random() < 0.3 else ""
    lines = [writer.say(OPENINGS), writer.say(SCENES)]
    lines.append(writer.say(STARTS, n=_count(start, noun, adjective)))
    lines += [writer.event(delta, noun) for delta in deltas]
    lines.append(writer.say(ENDINGS))
    things = writer.fields["things"]
    question = writer.say(
        (
            f"How many {things} does {{N}} have now?",
            f"How many {things} does {{N}} have in the end?",
            f"How many {things} are left with {{N}}?",
        )
    )
    work, now = _work(start, deltas)
    return _finish(level, lines, question, work, now)


def _two_counts(rng: random.Random) -> dict:
    """Level 4: two kinds of one child's, or one kind of two children's; one or all asked for."""
    people = rng.random() < 0.5
    writer = _Writer(rng, 2 if people else 1)
    kinds = [writer.objects[0]] * 2 if people else writer.objects
    owners = (0, 1) if people else (0, 0)
    starts = [rng.randint(1, 8), rng.randint(1, 8)]
    deltas = [_deltas(rng.choices((1, -1), k=rng.randint(1, 2)), s, rng) for s in starts]
    labels = writer.names if people else [_count(2, k)[2:] for k in kinds]
    works = [_work(s, d, f"{label}: ") for s, d, label in zip(starts, deltas, labels, strict=False)]
    total = works[0][1] + works[1][1]
    lines = [writer.say(OPENINGS)]
    counts = [_count(s, k) for s, k in zip(starts, kinds, strict=False)]
    if people:
        lines += [writer.say(STARTS, who, n=counts[who], hers=writer.pronouns[2]) for who in owners]
    else:
        lines.append(writer.say(STARTS, n=" and ".join(counts)))
    # Each chain keeps its order, the two are shuffled into each other.
    queues, order = [list(d) for d in deltas], [0] * len(deltas[0]) + [1] * len(deltas[1])
    rng.shuffle(order)
    events = [writer.event(queues[w].pop(0), kinds[w], owners[w]) for w in order]
    events.insert(rng.randint(0, len(events)), writer.say(NOISE, k=str(rng.randint(2, 9))))
    lines += [*events, writer.say(ENDINGS)]
    things = [_count(2, k)[2:] for k in kinds]
    if total <= MAX_NUMBER and rng.random() < 0.5:
        who = " and ".join(writer.names)
        question = (
            f"How many {things[0]} do {who} have together?"
            if people
            else f"How many {things[0]} and {things[1]} does {who} have in all?"
        )
        parts = [now for _, now in works]
        work = [*works[0][0], *works[1][0], f"{parts[0]} + {parts[1]} = {total}."]
        return _finish(4, lines, question, work, total)
    asked = rng.randrange(2)
    question = f"How many {things[asked]} does {writer.names[owners[asked]]} have now?"
    return _finish(4, lines, question, *works[asked])


def _finish(level: int, lines: list[str], question: str, work: list[str], answer: int) -> dict:
    return dict(
        level=level,
        story=" ".join(lines),
        question=question,
        answer_work=" ".join([*work, f"The answer is {answer}."]),
        answer=str(answer),
    )


def example(level: int, rng: random.Random) -> dict:
    """One document of the given level (0..4). It may belong to either split: see `corpus`."""
    if level == 0:
        return dict(level=0, story=_plain(rng), question="", answer_work="", answer="")
    return _two_counts(rng) if level == 4 else _one_count(level, rng)


def prompt(example: dict) -> str:
    """The document up to and including ``Answer:``; for a plain story, the story."""
    if not example["question"]:
        return example["story"]
    return f"{example['story']}\nQuestion: {example['question']}\nAnswer:"


def text(example: dict) -> str:
    """The whole pretraining document, without ``<s>`` and ``</s>``."""
    return f"{prompt(example)} {example['answer_work']}".rstrip()


def score(example: dict, completion: str) -> float:
    """1.0 if the last ``The answer is N.`` of the completion gives the right number, else 0.0."""
    answers = re.findall(r"The answer is (\d+)\.", completion)
    return float(bool(answers) and int(answers[-1]) == int(example["answer"]))


def split_of(example: dict) -> str:
    """``"valid"`` or ``"train"``, decided by the story's text alone."""
    return "train" if crc32(example["story"].encode()) % VALID_SHARE else "valid"


def corpus(
    n: int, seed: int, levels: Sequence[int] = (1, 2, 3, 4), split: str = "train"
) -> Iterator[dict]:
    """``n`` documents of one split, each level drawn uniformly from ``levels``.

    The same arguments give the same documents. A story is in one split whatever the seed, so
    no validation story is ever trained on.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"split must be 'train' or 'valid', not {split!r}")
    rng = random.Random(f"{split} {seed}")
    while n > 0:
        drawn = example(rng.choice(levels), rng)
        if split_of(drawn) == split:
            n -= 1
            yield drawn


def write_stories(
    path: Path, count: int, levels: Sequence[int] = PRETRAIN_LEVELS, seed: int = 1
) -> None:
    """Write training data: one story a line, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stories = (json.dumps({"text": text(e)}) for e in corpus(count, seed, levels))
    path.write_text("".join(f"{line}\n" for line in stories))
