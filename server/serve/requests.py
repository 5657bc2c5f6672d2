"""Requests in OpenAI's form: what is understood is checked, what is not is refused and never silently left out.

Source: OpenAI's API reference, "Chat" and "Completions"; the fields here are those that one model without tools needs.
A field that is not served may come with a value that asks for nothing, as clients send it of their own accord.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_STOPS = 4
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}  # null asks for nothing in all of them
NEUTRAL_OF_MESSAGE: Final[Mapping[str, tuple[Any, ...]]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}
Text = Annotated[str, Field(max_length=1 << 20)]


class Refused(Exception):
    """A request that is not served.

    Attributes:
        kind: `type` of OpenAI's error object.
    """

    def __init__(self, message: str, *, status: int = 400, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class _Strict(BaseModel):
    """Unknown fields are errors, but for those that ask for nothing."""

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        """Leave out what asks for nothing; the rest of those fields is refused as not supported."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            neutral = cls.neutral.get(name)
            asks_nothing = neutral is not None and (
                value is None or any(type(value) is type(known) and value == known for known in neutral)
            )  # types count, so that 0 is not false
            if not asks_nothing:
                kept[name] = value
        return kept


class Part(_Strict):
    """A piece of a message that comes as a list; only text is understood."""

    type: Literal["text"]
    text: Text


class Talk(_Strict):
    """One message; `developer` is what OpenAI calls the system's role today."""

    neutral = NEUTRAL_OF_MESSAGE

    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]

    @field_validator("role", mode="before")
    @classmethod
    def _today(cls, role: Any) -> Any:
        return "system" if role == "developer" else role

    @property
    def text(self) -> str:
        """Its whole content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class _Sampling(_Strict):
    """What both endpoints share."""

    neutral = NEUTRAL

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=1024)  # these three change no answer and are not kept
    safety_identifier: str | None = Field(default=None, max_length=1024)
    prompt_cache_key: str | None = Field(default=None, max_length=1024)
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts at which the answer ends, before them."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or not all(0 < len(text) <= 256 for text in stops):
            raise Refused(f"stop: at most {MAX_STOPS} texts of 1 to 256 characters")
        return stops


class ChatRequest(_Sampling):
    """Body of `/v1/chat/completions`."""

    messages: list[Talk] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, by either name."""
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Sampling):
    """Body of `/v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @property
    def text(self) -> str:
        """The prompt, which may come as a list of one."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; 16 by default, as in OpenAI's."""
        return self.max_tokens or 16


Request = TypeVar("Request", ChatRequest, TextRequest)


def parse(data: bytes, kind: type[Request]) -> Request:
    """A body as a request.

    Raises:
        Refused: Names the field and never repeats its value.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first: Any = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"])[:200] or "body"
        if first["type"] != "extra_forbidden":
            raise Refused(f"{where}: {first['msg']}") from None
        is_message = where.startswith("messages.")
        known: Mapping[str, tuple[Any, ...]] = NEUTRAL_OF_MESSAGE if is_message else NEUTRAL
        values = [json.dumps(value) for value in (None, *known.get(str(first["loc"][-1]), ()))]
        remedy = f"; leave it out, or send {' or '.join(values)}" if len(values) > 1 else ""
        raise Refused(f"{where}: is not supported{remedy}") from None
