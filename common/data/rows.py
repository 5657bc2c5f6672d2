"""One training example in one form, whatever columns it came from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: The text of the turn, as it was read.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One example: a conversation that ends with an assistant turn.

    Attributes:
        messages: The turns; a system turn can only be the first, the last one is the assistant's.
        unit: The privacy unit that the row belongs to, for example a patient's pseudonym. Private.
        row_id: Where the row was read, such as "train.jsonl line 12"; holds no field value, so messages may name it.
        num_context: Leading messages that are given and never learned from; every assistant turn after them is.
        is_input_empty: Whether the row's shape has an input field that was empty here.
        input_start: Where in the longest user turn the input begins, after the instruction; 0: all of it may be cut.
        num_cut: Tokens that were cut out of the input.
        rejected: The conversation with the worse answer, where the row is a pair; `messages` then has the better one.
        is_desirable: Whether the answer is wanted, where it was rated.
    """

    messages: tuple[Message, ...]
    unit: str
    row_id: str
    num_context: int = 0
    is_input_empty: bool = False
    input_start: int = 0
    num_cut: int = 0
    rejected: tuple[Message, ...] = ()
    is_desirable: bool | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; the names of the `messages` and `prompt`/`completion` shapes are fixed.

    Attributes:
        instruction: Column of the task or question.
        input: Column of the text that the task is about; may be missing or empty.
        output: Column of the answer.
        unit: Column that names the privacy unit; "" makes every row a unit of its own.
        objective: "dpo" reads `prompt`, `chosen` and `rejected`, "kto" `prompt`, `completion` and `label`, "sft" any
            of the other shapes.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    unit: str = ""
    objective: str = "sft"
