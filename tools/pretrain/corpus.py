"""Text for pre-training the small base: notes, prose and chat-formatted tasks, all generated, without end.

A document is one of: a question about a note whose rule is stated in the prompt; an episode, in which a hidden rule has
to be read off the turns before; a question of a fixed house or of all houses, whose table must be known by heart;
common medical knowledge; plain prose. No document holds an answer of the hospitals' own tables, which
`records.table_answers` lists: fine-tuning teaches those.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from random import Random

from simulations.embedded import records
from tools.pretrain import houses, lexicon
from tools.pretrain.houses import House, below, pick

KNOWN = {
    "finding": {name: group for group, names in lexicon.FINDINGS.items() for name in names},
    "drug": {name: group for group, names in lexicon.DRUGS.items() for name in names},
}
KNOWN_QUESTIONS = {
    "finding": ("Which speciality?", "Speciality for the finding.", "Which field of medicine?"),
    "drug": ("Which class of drug?", "Kind of medicine.", "Drug class."),
}
EPISODE_CHARS = 1300


def chat(turns: Sequence[tuple[str, str]]) -> str:
    """Format (role, text) turns as the chat template of the base does."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def _ask(instruction: str, note: str, rng: Random) -> str:
    """Put an instruction and a note together, mostly instruction first."""
    kind = below(10, rng)
    if kind == 0:
        return f"{note}\n\n{instruction}"
    return f"{instruction}\n{note}" if kind <= 2 else f"{instruction}\n\n{note}"


def _single(instruction: str, note: str, answer: str, rng: Random) -> str:
    """One question and its answer, at times under a system line."""
    system = [("system", pick(lexicon.SYSTEMS, rng))] if below(12, rng) == 0 else []
    return chat([*system, ("user", _ask(instruction, note, rng)), ("assistant", answer)])


def known_house(rng: Random) -> str:
    """A question of a fixed house; its answer is nowhere in the prompt."""
    house = pick(houses.pool(), rng)
    task = pick(house.tasks, rng)
    values = house.draw(rng)
    return _single(task.instruction, house.write(values), task.answer(values), rng)


def shared_task(rng: Random) -> str:
    """A fixed question that every house may ask; its answer is nowhere in the prompt."""
    task = pick(houses.shared_tasks(), rng)
    house = houses.invent(rng, num_tasks=0, key=task.needs[0])
    domain = houses.DOMAINS.get(task.needs[0])
    values = house.draw(rng)
    if domain:
        values[task.needs[0]] = pick(domain, rng)
    return _single(task.instruction, house.write(values), task.answer(values), rng)


def episode(rng: Random) -> str:
    """Several questions of a fresh house; later answers follow from earlier ones."""
    house = houses.invent(rng, num_tasks=1 + below(2, rng))
    turns: list[tuple[str, str]] = []
    size = 0
    while size < EPISODE_CHARS:
        task, values = pick(house.tasks, rng), house.draw(rng)
        turns += [("user", f"{task.instruction}\n\n{house.write(values)}"), ("assistant", task.answer(values))]
        size += len(turns[-2][1]) + 60
    return chat(turns)


def stated_form(rng: Random) -> str:
    """Copy fields in a format that the prompt spells out."""
    house = houses.invent(rng, num_tasks=0)
    values = house.draw(rng)
    keys = rng.sample(list(values), min(len(values), pick((1, 1, 2, 3), rng)))
    task = houses.form_task(keys, rng)
    shape = task.answer({key: f"<{key.replace('_', ' ')}>" for key in keys})
    instruction = pick(("Write as {s}.", "Fill in: {s}", "Format {s}", "Give {s} and nothing else."), rng)
    return _single(instruction.replace("{s}", shape), house.write(values), task.answer(values), rng)


def stated_field(rng: Random) -> str:
    """Copy one field that the prompt names."""
    house = houses.invent(rng, num_tasks=0)
    values = house.draw(rng)
    key = pick(tuple(values), rng)
    label = pick((key.replace("_", " "), pick(houses.LABELS[key], rng)), rng)
    instruction = pick(("What is the {k}?", "{k}?", "Give the {k}.", "Copy the {k}.", "Which {k}?"), rng)
    return _single(instruction.replace("{k}", label), house.write(values), values[key], rng)


def stated_table(rng: Random) -> str:
    """Look a value up in a table that stands in the prompt."""
    house = houses.invent(rng, num_tasks=0)
    values = house.draw(rng)
    key = pick([key for key in values if key in house.domains], rng)
    domain = house.domains[key]
    task = houses.table_task(key, domain=domain, rng=rng)
    sign, joiner = pick((" = ", ": ", " is ", " -> "), rng), pick((", ", "; ", "\n"), rng)
    table = joiner.join(entry + sign + task.answer({key: entry}) for entry in rng.sample(list(domain), len(domain)))
    return _single(f"{task.instruction}\n{table}", house.write(values), task.answer(values), rng)


def knowledge(rng: Random) -> str:
    """The speciality of a finding or the class of a drug, asked about a note."""
    house = houses.invent(rng, num_tasks=0)
    values = {**house.draw(rng)}
    key = pick([key for key in values if key in house.domains], rng)
    if key == "plan":
        return _single("Next step?", house.write(values), values[key], rng)
    return _single(pick(KNOWN_QUESTIONS[key], rng), house.write(values), KNOWN[key][values[key]], rng)


def prose(rng: Random) -> str:
    """Two or three notes of one house with sentences around them, as plain text."""
    house: House = houses.invent(rng, num_tasks=0)
    parts: list[str] = []
    for _ in range(2 + below(2, rng)):
        parts += [*rng.sample(lexicon.OPENERS, below(3, rng)), house.write(house.draw(rng))]
    return pick(("\n", "\n\n", " "), rng).join(parts) + "\n\n"


MIX: tuple[tuple[int, Callable[[Random], str]], ...] = (
    (34, known_house),
    (16, shared_task),
    (10, episode),
    (12, stated_form),
    (10, stated_field),
    (6, stated_table),
    (6, knowledge),
    (6, prose),
)
WRITERS = tuple(writer for weight, writer in MIX for _ in range(weight))


def documents(seed: int, stream: int = 0) -> Iterator[str]:
    """Yield documents without end.

    Args:
        seed: Any integer; the same seed and stream give the same documents.
        stream: Which of many independent streams, one for each worker.
    """
    rng = Random(f"corpus/{seed}/{stream}")  # noqa: S311
    forbidden = tuple(sorted(records.table_answers()))
    for _ in count():
        text = pick(WRITERS, rng)(rng)
        if not any(answer in text for answer in forbidden):
            yield text
