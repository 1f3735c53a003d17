"""Log-probabilities of a served model (T12): read, lined up with the tokens, checked, and asked for again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_model import VOCABULARY, Served, StatusError, choice, log_probabilities, response, serving, slow

from distill_core.clients import CompletionsClient, JsonLines
from distill_core.manifest import CacheError
from distill_core.served import Answers, Question, _in_order, rows_of_answer

TOKENS = [[3, 1, 4, 1, 5], [9, 2], [6], [5, 3, 5, 8, 9, 7, 9]]
QUESTIONS = [Question(index, f"text {index}", tokens) for index, tokens in enumerate(TOKENS)]


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


def answers(served: Served, **settings: Any) -> Answers:
    client = CompletionsClient(served.url, "teacher", top_k=4, timeout=settings.pop("timeout", 5.0))
    return Answers(client, top_k=4, vocabulary=VOCABULARY, wait=0.0, **settings)


def check_rows(rows: Any, tokens: list[int], generated: bool = True) -> None:
    expected = log_probabilities(tokens)
    order = np.argsort(-expected, axis=1)[:, :4]
    last = len(tokens) if generated else len(tokens) - 1
    np.testing.assert_array_equal(rows.classes[:last], order[:last])
    np.testing.assert_allclose(rows.logs[:last], np.take_along_axis(expected, order, 1)[:last], rtol=1e-6)
    if not generated:
        assert np.isnan(rows.logs[-1]).all()


def test_every_position_gets_the_likeliest_next_tokens(served: Served) -> None:
    for rows, tokens in zip(answers(served)(QUESTIONS), TOKENS, strict=True):
        check_rows(rows, tokens)

    assert [request["prompt"] for request in served.requests] == [TOKENS]
    assert served.requests[0]["model"] == "teacher"


def reordered(body: dict[str, Any], call: int) -> Any:
    return {"choices": response(body, call)["choices"][::-1]}


def without_one(body: dict[str, Any], call: int) -> Any:
    choices = response(body, call)["choices"]
    return {"choices": choices[:1] + choices[2:] if call == 1 else choices}


def truncated(body: dict[str, Any], call: int) -> Any:
    result = response(body, call)
    if call == 1:
        result["choices"][0]["prompt_logprobs"].pop()
    return result


def half_sent(body: dict[str, Any], call: int) -> Any:
    text = json.dumps(response(body, call))
    return text[: len(text) // 2] if call == 1 else text


def busy(body: dict[str, Any], call: int) -> Any:
    if call == 1:
        raise StatusError(503)
    return response(body, call)


def of_another_sample(body: dict[str, Any], call: int) -> Any:
    result = response(body, call)
    if call == 1:
        choices = result["choices"]
        choices[0]["index"], choices[3]["index"] = 3, 0
        choices[3]["prompt_logprobs"] = choices[3]["prompt_logprobs"][: len(TOKENS[0])]
    return result


@pytest.mark.parametrize(
    ("respond", "calls", "repeated"),
    [
        (reordered, 1, None),
        (without_one, 2, [TOKENS[1]]),
        (truncated, 2, [TOKENS[0]]),
        (half_sent, 2, TOKENS),
        (busy, 2, TOKENS),
        (of_another_sample, 2, [TOKENS[0], TOKENS[3]]),
    ],
)
def test_missing_and_wrong_answers_are_asked_for_again(
    served: Served, respond: Any, calls: int, repeated: list[list[int]] | None
) -> None:
    served.respond = respond

    for rows, tokens in zip(answers(served)(QUESTIONS), TOKENS, strict=True):
        check_rows(rows, tokens)
    assert len(served.requests) == calls
    assert repeated is None or served.requests[-1]["prompt"] == repeated


def test_a_late_answer_is_asked_for_again(served: Served) -> None:
    served.respond = slow(0.6)

    for rows, tokens in zip(answers(served, timeout=0.3)(QUESTIONS), TOKENS, strict=True):
        check_rows(rows, tokens)
    assert len(served.requests) == 2


def test_an_answer_that_stays_wrong_names_its_sample(served: Served) -> None:
    served.respond = lambda body, call: truncated(body, 1)

    with pytest.raises(
        CacheError, match=r"the answer for sample 0 to be complete after 3 tries, but it has 4 positions"
    ):
        answers(served, retries=2)(QUESTIONS)
    assert len(served.requests) == 3


def test_a_request_that_the_server_refuses_is_not_repeated(served: Served) -> None:
    def refuse(body: dict[str, Any], call: int) -> Any:
        raise StatusError(404)

    served.respond = refuse
    with pytest.raises(CacheError, match=r"to answer, but it refused \(404\)"):
        answers(served)(QUESTIONS)
    assert len(served.requests) == 1


def test_a_server_that_is_not_there_is_an_error_in_words() -> None:
    client = CompletionsClient("http://127.0.0.1:9/v1/completions", "teacher", top_k=4)
    ask = Answers(client, top_k=4, vocabulary=VOCABULARY, retries=1, wait=0.0)

    with pytest.raises(CacheError, match=r"but asking failed: .*Connection refused.*4 samples of 4"):
        ask(QUESTIONS)


def test_an_address_that_is_not_one_of_http_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `url` to begin with http:// or https://, but got url='file:///x'"):
        CompletionsClient("file:///x", "teacher", top_k=4)


# The forms of an answer ----------------------------------------------------------------------------------------------

OWN = choice(TOKENS[0], 5)["prompt_logprobs"]
FLAT = [None, *({token: value["logprob"] for token, value in row.items()} for row in OWN[1:])]
NAMES = {f"<{token}>": token for token in range(VOCABULARY)}
NAMED = [None, *({f"<{token}>": value for token, value in row.items()} for row in FLAT[1:])]


@pytest.mark.parametrize(
    "answer",
    [
        {"prompt_logprobs": OWN},
        {"tokens": TOKENS[0], "top_logprobs": FLAT},
        {"logprobs": {"tokens": [f"<{token}>" for token in TOKENS[0]], "top_logprobs": NAMED}},
    ],
    ids=["vLLM", "own", "completions with echo"],
)
def test_every_form_of_an_answer_gives_the_same_rows(answer: dict[str, Any]) -> None:
    check_rows(rows_of_answer(answer, TOKENS[0], 4, VOCABULARY, NAMES.get), TOKENS[0], generated=False)


def changed(position: int, entry: Any) -> list[Any]:
    return [*FLAT[:position], entry, *FLAT[position + 1 :]]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "it is missing"),
        ("text", "it is a str and not an object"),
        ({"id": 3}, "neither prompt_logprobs nor top_logprobs, only id"),
        ({"logprobs": {"content": []}}, "of generated tokens alone: ask for those of the sample's own tokens"),
        ({"top_logprobs": FLAT[:-1]}, "it has 4 positions for 5 tokens: truncated, or of another sample"),
        (
            {"tokens": [3, 1, 4, 2, 5], "top_logprobs": FLAT},
            "it has token 2 at position 3, where the sample has token 1",
        ),
        ({"tokens": [3], "top_logprobs": FLAT}, "5 entries of log-probabilities and another number of tokens"),
        ({"top_logprobs": changed(2, None)}, "it has no log-probabilities for the token after position 1"),
        ({"top_logprobs": changed(2, {"1": -0.5})}, "it has 1 log-probabilities after position 1, and top_k=4"),
        ({"top_logprobs": changed(2, {"1": "-0.5"})}, "it has the log-probability '-0.5' after position 1"),
        ({"top_logprobs": changed(2, {"1": float("nan")})}, "it has the log-probability nan after position 1"),
        ({"top_logprobs": changed(2, {"1": 0.5})}, "it has the log-probability 0.5 after position 1"),
        ({"top_logprobs": changed(2, {"12": -0.5})}, "it names token 12 after position 1, and the vocabulary has 12"),
        ({"top_logprobs": changed(2, {"-3": -0.5})}, "it names the token '-3', which is not a token id"),
        (
            {"top_logprobs": changed(2, {str(token): -0.5 for token in range(4)})},
            r"add up to 2\.426: ask for log-probabilities at a temperature of 1",
        ),
        ({"prompt_logprobs": [None, *OWN[2:], OWN[1]]}, "it lacks the sample's own token"),
        (
            {"logprobs": {"top_logprobs": NAMED}},
            "names the token '<.*>' by its text: ask for token ids, or pass token_id=",
        ),
        ({"logprobs": {"top_logprobs": FLAT}}, r"names the token '\d+' by its text: ask for token ids"),
        ({"tokens": TOKENS[0], "top_logprobs": [*FLAT[1:], FLAT[1]]}, "its first entry is not None"),
        ({"top_logprobs": FLAT}, "it has no 'tokens', by which it is compared with the sample"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_in_words(answer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rows_of_answer(answer, TOKENS[0], 4, VOCABULARY)


def test_a_token_that_the_tokenizer_does_not_have_is_refused() -> None:
    answer = {"logprobs": {"top_logprobs": NAMED}}

    with pytest.raises(ValueError, match="which the tokenizer does not have"):
        rows_of_answer(answer, TOKENS[0], 4, VOCABULARY, {}.get)


def test_numbers_of_numpy_are_read() -> None:
    rows = [None, *({token: np.float32(value) for token, value in row.items()} for row in FLAT[1:])]
    answer = {"tokens": np.array(TOKENS[0]), "top_logprobs": rows}

    check_rows(rows_of_answer(answer, TOKENS[0], 4, VOCABULARY), TOKENS[0], generated=False)


@pytest.mark.parametrize("returned", [None, {"choices": []}, ["text"]])
def test_a_function_that_does_not_return_answers_is_refused(returned: Any) -> None:
    with pytest.raises(CacheError, match="Expected `ask` to return a list with an answer for each question"):
        Answers(lambda questions: returned, top_k=4, vocabulary=VOCABULARY)(QUESTIONS)


# Files ---------------------------------------------------------------------------------------------------------------


def lines(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in objects), encoding="utf-8")
    return path


def test_lines_are_found_by_key_or_number_in_any_order(tmp_path: Path) -> None:
    named = [{**choice(question.tokens, 4), "key": question.key} for question in QUESTIONS[:2]]
    numbered = [{**choice(question.tokens, 4), "index": question.index} for question in QUESTIONS[2:]]
    file = JsonLines(lines(tmp_path / "answers.jsonl", *numbered[::-1], *named))

    ask = Answers(file, top_k=4, vocabulary=VOCABULARY, retries=0)
    for rows, tokens in zip(ask(QUESTIONS), TOKENS, strict=True):
        check_rows(rows, tokens)


def test_a_sample_without_a_line_is_named(tmp_path: Path) -> None:
    file = JsonLines(lines(tmp_path / "answers.jsonl", {**choice(TOKENS[0], 4), "index": 0}))

    with pytest.raises(CacheError, match=r"the answer for sample 1 to be complete.* but it is missing"):
        Answers(file, top_k=4, vocabulary=VOCABULARY, retries=0)(QUESTIONS[:2])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"index": 0}\n{"inde', r"line 2 of .*answers\.jsonl to be a JSON object, but it is not\. .* cut off"),
        ('{"index": 0}\n\n{"index": 0}\n', r"line 3 of .* of its own, but it repeats 0"),
        ('{"tokens": []}\n', "line 1 of .* of its own, but it has neither"),
        ("[]\n", "line 1 of .* of its own, but it has neither"),
    ],
)
def test_a_file_with_a_wrong_line_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(CacheError, match=words):
        JsonLines(path)


def test_a_line_with_a_key_is_not_taken_for_the_sample_of_that_number(tmp_path: Path) -> None:
    file = JsonLines(lines(tmp_path / "answers.jsonl", {**choice(TOKENS[0], 4), "key": 0}))

    assert file([Question(0, "another key", TOKENS[0])]) == [None]


# The order of answers ------------------------------------------------------------------------------------------------


def later(number: int) -> Question:
    return Question(number, number, TOKENS[0])


@pytest.mark.parametrize(
    ("asked", "indices", "expected"),
    [
        ((8, 9), (9, 8), [8, 9]),  # a function that returns the question's index
        ((8, 9), (1, 0), [0, 1]),  # a server, which numbers the questions of a call
        ((8, 9), (9,), [None, 9]),
        ((1, 3), (1,), [None, None]),  # the question 1, or the second of the call: nobody knows
        ((8, 9), (8, 7), [None, None]),
    ],
)
def test_answers_are_numbered_by_their_question_or_their_place_in_the_call(
    asked: tuple[int, ...], indices: tuple[int, ...], expected: list[int | None]
) -> None:
    placed = _in_order([{"index": index} for index in indices], [later(number) for number in asked])

    assert [answer and answer["index"] for answer in placed] == expected
