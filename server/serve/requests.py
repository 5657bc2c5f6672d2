"""Requests in OpenAI's form: what is understood is checked, what is not is refused and never silently left out.

Source: OpenAI's API reference, "Chat" and "Completions"; the fields here are those that one model without tools needs.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_STOPS = 4
Text = Annotated[str, Field(max_length=1 << 20)]


class Refused(Exception):
    """A request that is not served.

    Attributes:
        status: HTTP status.
        kind: `type` of OpenAI's error object.
    """

    def __init__(self, message: str, *, status: int = 400, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class _Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Part(_Strict):
    """A piece of a message that comes as a list; only text is understood."""

    type: Literal["text"]
    text: Text


class Talk(_Strict):
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]

    @property
    def text(self) -> str:
        """Its whole content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool = False


class _Sampling(_Strict):
    """What both endpoints share; values that mean "nothing" are taken of fields that are not supported."""

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=1024)
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts at which the answer ends, before them."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(found) > MAX_STOPS or not all(0 < len(text) <= 256 for text in found):
            raise Refused(f"stop: at most {MAX_STOPS} texts of 1 to 256 characters")
        return found


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

    prompt: Text
    logprobs: None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; 16 unless told, as in OpenAI's."""
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
        raise Refused(
            f"{where}: {first['msg'] if first['type'] != 'extra_forbidden' else 'is not supported'}"
        ) from None
