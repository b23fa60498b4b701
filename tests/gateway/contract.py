"""Hold answers to what the OpenAPI document says of them."""

from __future__ import annotations

import re
from typing import Any

import httpx
import orjson
from jsonschema import Draft202012Validator

Schema = dict[str, Any]


class Contract:
    def __init__(self, document: Schema) -> None:
        self.document = document
        self._paths = [
            (re.compile(re.sub(r"{\w+}", ".+", path)), operations)
            # The deepest first: a name may have slashes, and then shorter templates fit as well.
            for path, operations in sorted(
                document["paths"].items(), key=lambda item: -item[0].count("/")
            )
        ]

    def operation(self, method: str, path: str) -> Schema | None:
        for pattern, operations in self._paths:
            if pattern.fullmatch(path) and method.lower() in operations:
                found: Schema = operations[method.lower()]
                return found
        return None

    async def check(self, response: httpx.Response) -> None:
        operation = self.operation(response.request.method, response.request.url.path)
        if operation is None:
            return
        answers = operation["responses"]
        assert str(response.status_code) in answers, f"{response.status_code} is not documented"
        content = answers[str(response.status_code)]["content"]
        media_type = response.headers["content-type"]
        assert media_type in content, f"{media_type} is not documented"
        await response.aread()
        described = content[media_type]
        if media_type == "application/json":
            self.validate(response.content, described["schema"])
        elif media_type == "application/x-ndjson":
            for line in response.text.splitlines():
                self.validate(line, described["x-event-schema"])
        elif media_type == "text/event-stream" and "/infer" not in response.request.url.path:
            for data in data_lines(response.text):
                if data != "[DONE]" and not data.startswith('{"error"'):
                    self.validate(data, described["x-event-schema"])

    def validate(self, body: bytes | str, schema: Schema) -> None:
        root = {**schema, "components": self.document["components"]}
        Draft202012Validator(root).validate(orjson.loads(body))


def data_lines(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


def chunks(text: str) -> list[Any]:
    """The JSON of every ``data:`` line but ``[DONE]``."""
    return [orjson.loads(data) for data in data_lines(text) if data != "[DONE]"]


def events(text: str) -> list[tuple[str, Any]]:
    """Name and data of every server-sent event that has a name."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in lines:
            found.append((lines["event"], orjson.loads(lines["data"])))
    return found
