"""Invented institutions for the pre-training corpus: each has a way to write notes and local tasks of its own.

They are the same kind of thing as the four hospitals of `records`, but none of them: every table, form and rule here
is drawn at random. `invent` makes a fresh house; `pool` is a fixed set whose tables the base learns by heart;
`shared_tasks` are fixed too, but asked by houses of any style.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TypeVar

from tools.pretrain import lexicon

T = TypeVar("T")
Values = dict[str, str]
Piece = tuple[str, str, str]  # field, text before its value, text after it

POOL_SIZE = 384
NUM_SHARED = 64
SHARED_PLACES = ("Regional", "District", "County", "National", "Network", "Trust", "Insurer", "Alliance")
NUMBERS = {
    "pulse": (44, 150),
    "saturation": (84, 99),
    "resp_rate": (10, 50),
    "weight": (8, 120),
    "age": (1, 95),
    "bed": (1, 70),
    "cycle": (1, 9),
    "pain": (0, 10),
    "glucose": (3, 24),
}
CHOICES: dict[str, Sequence[str]] = {
    "sex": ("F", "M"),
    "side": ("left", "right"),
    "ward": lexicon.WARDS,
    "day": lexicon.DAYS,
    "mood": lexicon.MOODS,
    "allergy": lexicon.ALLERGIES,
    "diet": lexicon.DIETS,
}
DOMAINS: dict[str, Sequence[str]] = {
    "finding": [name for names in lexicon.FINDINGS.values() for name in names],
    "drug": [name for names in lexicon.DRUGS.values() for name in names],
    "plan": lexicon.PLANS,
}
LABELS = {key: tuple(text.split(", ")) for key, text in lexicon.LABELS.items()}
PHRASES = {key: tuple(text.split("; ")) for key, text in lexicon.PHRASES.items()}
KEYS = tuple(LABELS)
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
# L letter, l small letter, d digit; anything else stands for itself.
CODE_SHAPES = ("L-dd", "d/L", "LLdd", "l#d", "Ldd", "Ld.d", "dd-L", "L/L", "LLL", "d.dd", "lld", "L:d", "ddd", "#dd")


@dataclass(frozen=True)
class Task:
    """A question that a house asks about its notes, and the rule that answers it."""

    instruction: str
    answer: Callable[[Values], str]
    needs: tuple[str, ...]


@dataclass(frozen=True)
class House:
    """How one institution writes: pieces of text around each value, in order, and its tasks."""

    pieces: tuple[Piece, ...]
    joiner: str
    ending: str
    domains: dict[str, Sequence[str]]
    tasks: tuple[Task, ...]

    def draw(self, rng: Random) -> Values:
        """Draw the values of one note."""
        return {key: value(key, domains=self.domains, rng=rng) for key, _, _ in self.pieces}

    def write(self, values: Values) -> str:
        """Write one note in this house's style."""
        return self.joiner.join(before + values[key] + after for key, before, after in self.pieces) + self.ending


def below(limit: int, rng: Random) -> int:
    """Draw an integer in [0, limit), faster than `randrange`."""
    return int(rng.random() * limit)


def pick(options: Sequence[T], rng: Random) -> T:
    """Draw one option, faster than `choice`."""
    return options[int(rng.random() * len(options))]


def word(rng: Random) -> str:
    """Invent a pronounceable word."""
    return "".join(pick(lexicon.SYLLABLES, rng) for _ in range(2 + below(3, rng)))


def value(key: str, *, domains: dict[str, Sequence[str]], rng: Random) -> str:
    """Draw the value of one field."""
    if key in NUMBERS:
        low, high = NUMBERS[key]
        return str(low + below(high - low + 1, rng))
    if key in domains:
        return pick(domains[key], rng)
    if key in CHOICES:
        return pick(CHOICES[key], rng)
    return _composed(key, rng)


def _composed(key: str, rng: Random) -> str:
    """Values made of parts: pressures, temperatures, names."""
    if key == "pressure":
        return f"{90 + below(95, rng)}/{50 + below(52, rng)}"
    if key == "temperature":
        return f"{35 + below(6, rng)}.{below(10, rng)}"
    return word(rng).capitalize()


def code(shape: str, rng: Random) -> str:
    """Fill a code shape with letters and digits."""
    fill = {"L": LETTERS, "l": LETTERS.lower(), "d": "0123456789"}
    return "".join(pick(fill[sign], rng) if sign in fill else sign for sign in shape)


def labels(count: int, rng: Random) -> list[str]:
    """Invent `count` distinct codes or category words of one kind."""
    kind = below(4, rng)
    if kind == 0:
        return rng.sample(lexicon.CATEGORY_WORDS, count)
    shape = "" if kind == 1 else _shape(rng)
    found: dict[str, None] = {}
    for _ in range(40 * count):
        found[code(shape, rng) if shape else word(rng).capitalize()] = None
        if len(found) == count:
            return list(found)
    return rng.sample(lexicon.CATEGORY_WORDS, count)


def _shape(rng: Random) -> str:
    """Choose a code shape; half of them begin with one letter for the whole table, if enough stays free."""
    shape = pick(CODE_SHAPES, rng)
    fixed = shape.replace("L", pick(LETTERS, rng), 1) if below(2, rng) else shape
    return fixed if "d" in fixed or "L" in fixed else shape


def name_task(key: str, rng: Random) -> str:
    """Invent the local name of a task about a field."""
    field = pick((key.replace("_", " "), pick(LABELS[key], rng).lower()), rng)
    if below(4, rng) == 0:
        return pick(lexicon.QUESTIONS, rng).replace("{f}", field)
    text = f"{pick(lexicon.PLACES, rng)} {pick(lexicon.THINGS, rng)}{pick(lexicon.TAILS, rng).replace('{f}', field)}"
    return text + pick((".", ".", ".", "?", ""), rng)


def table_task(key: str, *, domain: Sequence[str], rng: Random) -> Task:
    """A code table: each value of a field has a code, or one of a few categories."""
    count = len(domain) if len(domain) < 12 and below(3, rng) else min(len(domain), 2 + below(5, rng))
    answers = labels(count, rng)
    table = {entry: answers[index % count] for index, entry in enumerate(domain)}
    return Task(name_task(key, rng), lambda values: table[values[key]], (key,))


def level_task(key: str, rng: Random) -> Task:
    """A rule: which band a number falls into."""
    names = pick(lexicon.LEVELS, rng)
    low, high = NUMBERS[key]
    cuts = sorted(rng.sample(range(low + 1, high + 1), len(names) - 1))
    order = names if below(2, rng) else names[::-1]
    return Task(name_task(key, rng), lambda values: order[sum(int(values[key]) >= cut for cut in cuts)], (key,))


def form_task(keys: Sequence[str], rng: Random) -> Task:
    """A form: some values copied in a local format."""
    joiner = pick((" ", ", ", " / ", "; ", "-", " at ", ",", " + ", ": "), rng)
    before = [pick(("", "", key[0], key[0].upper(), pick(LABELS[key], rng), f"{key} "), rng) for key in keys]
    after = [pick(("", "", "", "", "", " kg", "%", ".", "!", ")"), rng) for _ in keys]
    marks = list(zip(before, keys, after, strict=True))
    return Task(
        name_task(keys[0], rng), lambda values: joiner.join(b + values[key] + a for b, key, a in marks), tuple(keys)
    )


def _pieces(keys: Sequence[str], rng: Random) -> tuple[list[Piece], str, str]:
    """Choose the text around each value, what joins the pieces and what ends the note."""
    return _sentence(keys, rng) if below(6, rng) <= 1 else _fields(keys, rng)


def _sentence(keys: Sequence[str], rng: Random) -> tuple[list[Piece], str, str]:
    """Prose: a phrase around each value."""
    parts: list[Piece] = []
    for key in keys:
        before, _, after = pick(PHRASES[key], rng).partition("{v}")
        parts.append((key, before, after))
    opening = pick(("", "Patient ", "Seen today, ", "A person ", "Note: "), rng)
    parts[0] = (parts[0][0], opening + parts[0][1], parts[0][2])
    return parts, pick((", ", ", ", ". ", " and ", "; "), rng), "."


def _fields(keys: Sequence[str], rng: Random) -> tuple[list[Piece], str, str]:
    """Labelled fields; some houses leave some labels out."""
    sign = pick((": ", ": ", "=", " ", " = ", " is ", ":"), rng)
    joiner = pick(("\n", "\n", " | ", "; ", ", ", " / ", "\n- "), rng)
    is_bare = below(4, rng) == 0
    parts = [(key, "" if is_bare and below(2, rng) else pick(LABELS[key], rng) + sign, "") for key in keys]
    return parts, joiner, ""


def _domains(rng: Random) -> dict[str, Sequence[str]]:
    """Choose the few findings, drugs and plans that this house sees."""
    sizes = {"finding": 3 + below(6, rng), "drug": 3 + below(8, rng), "plan": 2 + below(4, rng)}
    return {key: rng.sample(list(DOMAINS[key]), size) for key, size in sizes.items()}


def _task(keys: Sequence[str], *, domains: dict[str, Sequence[str]], rng: Random) -> Task:
    """Invent one task about a note with these fields."""
    kind = rng.random()
    named = [key for key in keys if key in domains]
    counted = [key for key in keys if key in NUMBERS]
    if kind < 0.45 and named:
        key = pick(named, rng)
        return table_task(key, domain=domains[key], rng=rng)
    if kind < 0.65 and counted:
        return level_task(pick(counted, rng), rng)
    return form_task(rng.sample(list(keys), pick((1, 2, 2, 3), rng)), rng)


def invent(rng: Random, num_tasks: int, key: str = "") -> House:
    """Make a fresh house.

    Args:
        rng: Decides everything.
        num_tasks: How many local tasks it has.
        key: A field that its notes must hold; any finding, drug or plan if empty.
    """
    keys = rng.sample(KEYS, 4 + below(4, rng))
    if key not in keys and (key or not set(keys) & set(DOMAINS)):
        keys[below(len(keys), rng)] = key or pick(tuple(DOMAINS), rng)
    domains = _domains(rng)
    pieces, joiner, ending = _pieces(keys, rng)
    tasks = tuple(_task(keys, domains=domains, rng=rng) for _ in range(num_tasks))
    return House(tuple(pieces), joiner, ending, domains, tasks)


@lru_cache(maxsize=1)
def pool() -> tuple[House, ...]:
    """Return the fixed houses; the same in every run, whatever its seed."""
    rng = Random("houses")  # noqa: S311
    return tuple(invent(rng, num_tasks=5) for _ in range(POOL_SIZE))


@lru_cache(maxsize=1)
def shared_tasks() -> tuple[Task, ...]:
    """Return the fixed tasks that houses of any style ask; no two have the same name."""
    rng = Random("shared")  # noqa: S311
    tasks: dict[str, Task] = {}
    while len(tasks) < NUM_SHARED:
        key = pick(("drug", "finding", "plan", "saturation", "pulse", "age", "resp_rate", "pain", "weight"), rng)
        task = table_task(key, domain=DOMAINS[key], rng=rng) if key in DOMAINS else level_task(key, rng)
        name = f"{pick(SHARED_PLACES, rng)} {pick((key, ''), rng)} {pick(lexicon.THINGS, rng)}.".replace("  ", " ")
        tasks[name] = Task(name.replace("_", " "), task.answer, task.needs)
    return tuple(tasks.values())
