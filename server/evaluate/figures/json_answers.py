"""Whether an answer is JSON that meets a schema. A schema is read from a file; nothing that it refers to is fetched."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import referencing
from jsonschema.exceptions import SchemaError
from referencing.exceptions import Unresolvable

from common.errors import DataError
from server.evaluate.figures import patterns


def checker(path: Path) -> Callable[[str, str], float]:
    """A metric: 1 if the answer is one JSON value that meets the schema, else 0; the reference does not count.

    Args:
        path: The schema; without `$schema` it is read as draft 2020-12. Its patterns have a limit of time.

    Raises:
        DataError: The file is missing, no schema, or refers to another one.
    """
    try:
        schema = json.loads(path.read_bytes())
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        for pattern in patterns.in_schema(schema):
            patterns.compiled(pattern)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SchemaError) as error:
        raise DataError(
            f"{path}: not a JSON schema ({type(error).__name__}); mend the json_schema of the task or stage"
        ) from error
    parts = list(patterns.parts_of(schema))
    if any("patternProperties" in part for part in parts) and any("unevaluatedProperties" in part for part in parts):
        raise DataError(
            f"{path}: patternProperties and unevaluatedProperties in one schema cannot be checked within a limit of "
            "time; write additionalProperties instead"
        )
    for part in parts:
        if isinstance(part.get("$schema"), str):  # a reference to such a part would leave our keywords
            del part["$schema"]
    timed = jsonschema.validators.extend(kind, patterns.KEYWORDS)
    validator = timed(schema, registry=referencing.Registry())  # an empty one: the default would ask the network

    def score(given: str, wanted: str) -> float:
        try:
            return float(validator.is_valid(json.loads(given, parse_constant=refuse)))
        except (ValueError, RecursionError):
            return 0.0
        except Unresolvable as error:
            raise DataError(f"{path}: refers to a schema that is not in it; write that into the file") from error

    return score


def refuse(name: str) -> None:
    """NaN and infinity are no JSON."""
    raise ValueError(name)
