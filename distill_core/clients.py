"""Two ways to ask for a served model's log-probabilities: over HTTP, and in a file of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final
from urllib import error, request

from distill_core.manifest import CacheError
from distill_core.served import Question

_BUSY: Final = (408, 409, 425, 429, 500, 502, 503, 504)  # codes after which it makes sense to ask again


class CompletionsClient:
    """Asks a server with the API of OpenAI's completions and vLLM's ``prompt_logprobs``.

    Args:
        url: Address of the completions, such as ``"http://localhost:8000/v1/completions"``.
        model: Name of the model on the server.
        top_k: How many log-probabilities are asked for at each position.
        timeout: Seconds until an answer is late.
        headers: Further headers of a request, such as one with a key.
        body: Further fields of a request, or other values of those that are sent.

    Raises:
        ValueError: If the address is not one of HTTP.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        top_k: int,
        timeout: float = 60.0,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"Expected `url` to begin with http:// or https://, but got url={url!r}.")
        self.url, self.timeout = url, timeout
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        fields = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top_k, "logprobs": top_k}
        self._body = {"model": model, **fields, "return_tokens_as_token_ids": True, **(body or {})}

    def __call__(self, questions: Sequence[Question]) -> list[Mapping[str, Any] | None]:
        """The choices of the server's response.

        Args:
            questions: The sequences.

        Raises:
            OSError: If the server does not answer in time, or is too busy.
            CacheError: If the server refuses the request.
        """
        content = json.dumps({**self._body, "prompt": [question.tokens for question in questions]}).encode()
        asked = request.Request(self.url, content, self._headers)
        try:
            with request.urlopen(asked, timeout=self.timeout) as response:
                answer = json.load(response)
        except error.HTTPError as problem:
            if problem.code in _BUSY:
                raise
            text = problem.read(500).decode(errors="replace")
            raise CacheError(f"Expected {self.url} to answer, but it refused ({problem.code}): {text}") from None
        except ValueError as problem:  # half of a response
            raise OSError(f"the response is not JSON ({problem})") from None
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list):
            raise OSError("the response has no choices")
        return choices


class JsonLines:
    """Answers in a file, one JSON object in each line, with the sample's ``"key"`` or its number as ``"index"``.

    The lines may have any order. The file is read line by line, and only the places of the lines are kept.

    Args:
        path: The file.

    Raises:
        CacheError: If a line is not an object with a key or a number, or two lines have the same.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._places: dict[tuple[str, str | int], int] = {}
        for number, place, answer in self._lines():
            by = "key" if isinstance(answer, Mapping) and "key" in answer else "index"
            key = answer.get(by) if isinstance(answer, Mapping) else None
            if not isinstance(key, (str, int)) or (by, key) in self._places:
                reason = "has neither" if not isinstance(key, (str, int)) else f"repeats {key!r}"
                raise CacheError(
                    f"Expected line {number} of {self.path} to have a 'key' or an 'index' of its own, but it {reason}."
                )
            self._places[by, key] = place

    def _lines(self) -> Iterator[tuple[int, int, Any]]:
        with self.path.open("rb") as file:
            place = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, place, self._parsed(line, number)
                place += len(line)

    def _parsed(self, line: bytes, number: int | str) -> Any:
        try:
            return json.loads(line)
        except ValueError:
            raise CacheError(
                f"Expected line {number} of {self.path} to be a JSON object, but it is not. The file may be cut off."
            ) from None

    def __call__(self, questions: Sequence[Question]) -> list[Mapping[str, Any] | None]:
        """The answers that the file has.

        Args:
            questions: The sequences.
        """
        answers: list[Mapping[str, Any] | None] = []
        with self.path.open("rb") as file:
            for question in questions:
                place = self._places.get(("key", question.key), self._places.get(("index", question.index)))
                if place is None:
                    answers.append(None)
                    continue
                file.seek(place)
                answer = dict(self._parsed(file.readline(), f"of {question.key!r}"))
                answer.pop("index", None)  # the number of the sample, not of the question
                answers.append(answer)
        return answers
