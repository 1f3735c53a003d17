"""The spans of text that two tokenizers share: equal bytes, as small as can be, and nothing that is not predicted."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors
from two_tokenizers import byte_level, lower_case, of_transformers, sentence_piece, texts

from distill_core.alignment import Aligned, TokenAligner
from distill_core.token_bytes import TokenBytes

PAIRS = {
    "two byte-level": lambda: (byte_level(300), byte_level(700)),
    "the larger is the student's": lambda: (byte_level(700), byte_level(300)),
    "bytes and SentencePiece": lambda: (byte_level(400), sentence_piece(600)),
    "SentencePiece and bytes": lambda: (sentence_piece(600), byte_level(400)),
    "two SentencePiece": lambda: (sentence_piece(600), sentence_piece(420)),
}
PIECES = [
    "def f(x):\n",
    "    ",
    "return ",
    "self._name",
    "é",
    "字",
    "🙂",
    " ",
    "\t",
    "# ",
    "0",
    "\u2581",
    "<end>",
    "ß",
    "\r\n",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


def tables(pair: tuple[Any, Any]) -> tuple[TokenBytes, TokenBytes]:
    return TokenBytes("student_tokenizer", pair[0]), TokenBytes("teacher_tokenizer", pair[1])


def row(numbers: list[int]) -> NDArray[np.int64]:
    return np.array([numbers], dtype=np.int64)


def aligned(pair: tuple[Any, Any], text: str, **settings: Any) -> tuple[Aligned, list[int]]:
    numbers = pair[0].encode(text, add_special_tokens=False).ids
    return TokenAligner(*tables(pair), **settings).align(row(numbers)), numbers


def groups(tokenizer: TokenBytes, numbers: Any, spans: Any) -> dict[int, tuple[list[int], bytes]]:
    """The positions and the bytes of the tokens of each span."""
    places: dict[int, list[int]] = {}
    for place, span in enumerate(spans.tolist()):
        if span >= 0:
            places.setdefault(span, []).append(place)
    return {span: (where, tokenizer.spell([int(numbers[place]) for place in where])) for span, where in places.items()}


def inner_ends(tokenizer: TokenBytes, numbers: Any, places: list[int]) -> set[int]:
    """The bytes between the end of each token of a span but its last and the end of the span."""
    return {len(tokenizer.spell([int(numbers[p]) for p in places[n + 1 :]])) for n in range(len(places) - 1)}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, cut=st.integers(0, 30))
def test_spans_have_equal_bytes_and_are_as_small_as_can_be(name: str, text: str, cut: int) -> None:
    pair = PAIRS[name]()
    student, teacher = tables(pair)
    numbers = pair[0].encode(text, add_special_tokens=False).ids
    numbers = numbers[: max(len(numbers) - cut, 0)]  # truncated, also within a character

    result = TokenAligner(student, teacher).align(row(numbers))

    own = groups(student, numbers, result.student_spans[0])
    other = groups(teacher, result.input_ids[0], result.teacher_spans[0])
    assert own.keys() == other.keys()
    for span, (places, data) in own.items():
        teacher_places, teacher_data = other[span]
        if places[0] == 0 or student.sizes_of(row(numbers))[0, places[0] - 1] == 0:  # a space in front of a text
            data, teacher_data = data.removeprefix(b" "), teacher_data.removeprefix(b" ")
        assert data == teacher_data
        assert places == list(range(places[0], places[-1] + 1))
        assert teacher_places == list(range(teacher_places[0], teacher_places[-1] + 1))
        shared = inner_ends(student, numbers, places) & inner_ends(teacher, result.input_ids[0], teacher_places)
        assert not shared
        assert 0 not in places
        assert 0 not in teacher_places


@settings(max_examples=40, deadline=None)
@given(text=TEXTS.filter(lambda text: "<end>" not in text))
def test_between_byte_level_tokenizers_all_tokens_but_those_of_the_first_span_are_in_spans(text: str) -> None:
    result, numbers = aligned((byte_level(300), byte_level(700)), text)

    outside = np.flatnonzero(result.student_spans[0] < 0)
    assert outside.tolist() == list(range(len(outside)))
    spelled = byte_level(700).encode(text).ids
    assert result.input_ids[0, : len(spelled)].tolist() == spelled
    assert len(outside) < len(numbers) or len(spelled) <= 1


def test_equal_tokenizers_give_each_token_its_own_span() -> None:
    result, numbers = aligned((byte_level(300), byte_level(300)), "x = [1, 2]\n")

    assert result.input_ids.tolist() == [numbers]
    assert result.student_spans.tolist() == result.teacher_spans.tolist() == [[-1, *range(1, len(numbers))]]


def test_tokens_that_split_a_character_are_aligned_by_byte() -> None:
    pair = byte_level(300), sentence_piece(600)
    result, numbers = aligned(pair, "ab 字")

    spans = groups(tables(pair)[0], numbers, result.student_spans[0])
    assert [data for _, data in spans.values()][-3:] == [b"\xe5", b"\xad", b"\x97"]


def test_row_that_begins_and_ends_within_a_character_aligns_the_rest() -> None:
    student, teacher = tables((byte_level(300), byte_level(700)))
    numbers = student.encode(["字 is a sign 字"])[0][1:-1]

    result = TokenAligner(student, teacher).align(row(numbers))

    first, *_, last = (data for _, data in groups(student, numbers, result.student_spans[0]).values())
    assert (first, last) == (b" a", b" ")  # nothing comes before the teacher's " is"
    assert teacher.spell(result.input_ids[0].tolist()) == b" is a sign "
    assert result.student_spans[0, :2].tolist() == [-1, -1]


def test_rest_of_a_character_behind_a_special_token_is_in_no_span() -> None:
    student, teacher = tables((byte_level(300), byte_level(700)))
    end, numbers = student.vocabulary["<end>"], student.encode(["字 is a sign"])[0][1:]

    result = TokenAligner(student, teacher).align(row([end, *numbers]))

    own = groups(student, [end, *numbers], result.student_spans[0])
    other = groups(teacher, result.input_ids[0], result.teacher_spans[0])
    assert result.student_spans[0, :3].tolist() == [-1, -1, -1]
    assert {span: data for span, (_, data) in own.items()} == {span: data for span, (_, data) in other.items()} != {}


def test_a_byte_that_is_not_text_ends_the_spans_and_the_next_special_token_begins_them_again() -> None:
    student, teacher = tables((byte_level(300), byte_level(700)))
    good, end = student.encode(["x = 1"])[0], student.vocabulary["<end>"]
    bad = student.encode(["字"])[0][0]
    numbers = [*good, bad, *good, end, *good]

    result = TokenAligner(student, teacher).align(row(numbers))

    spans = result.student_spans[0]
    assert (spans[1 : len(good)] >= 0).all()
    assert (spans[len(good) : 2 * len(good) + 1] < 0).all()
    assert (spans[2 * len(good) + 1 :] >= 0).all()


def test_special_tokens_with_counterparts_are_spans_of_their_own() -> None:
    pair = of_transformers(byte_level(300), eos_token="<end>"), of_transformers(sentence_piece(600), eos_token="</s>")
    student, teacher = tables(pair)
    end, text = student.vocabulary["<end>"], student.encode(["a b"])[0]

    result = TokenAligner(student, teacher).align(row([*text, end, *text]))

    place = result.input_ids[0].tolist().index(teacher.vocabulary["</s>"])
    assert result.student_spans[0, len(text)] == result.teacher_spans[0, place] >= 0
    assert (result.teacher_spans[0] == result.teacher_spans[0, place]).sum() == 1


def test_special_tokens_without_counterparts_are_not_read_by_the_teacher() -> None:
    student, teacher = tables((byte_level(300), sentence_piece(600)))
    end, text = student.vocabulary["<end>"], student.encode(["a b"])[0]

    result = TokenAligner(student, teacher).align(row([*text, end, *text]))
    named = TokenAligner(student, teacher, special_tokens={"<end>": "</s>"}).align(row([*text, end, *text]))

    assert result.student_spans[0, len(text)] == -1
    assert not set(teacher.special) & set(result.input_ids[0].tolist())
    assert named.student_spans[0, len(text)] >= 0
    with pytest.raises(
        ValueError, match=r"`special_tokens` to name tokens of both .* '</s>', which the student's does"
    ):
        TokenAligner(student, teacher, special_tokens={"</s>": "</s>"})


def test_token_that_the_teacher_puts_in_front_of_a_text_predicts_the_first_span() -> None:
    teacher = Tokenizer.from_str(sentence_piece(600).to_str())
    teacher.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", teacher.token_to_id("<s>"))]
    )
    student, table = tables((byte_level(300), teacher))
    end, text = student.vocabulary["<end>"], student.encode(["a b"])[0]

    result = TokenAligner(student, table, special_tokens={"<end>": "<s>"}).align(row([end, *text]))

    assert result.input_ids[0, :2].tolist() == [teacher.token_to_id("<s>"), *table.encode(["a b"])[0]][:2]
    assert (result.student_spans[0, 1:] >= 0).all()


def test_one_token_that_begins_and_ends_texts_is_read_as_either_by_its_place() -> None:
    student = of_transformers(byte_level(300), bos_token="<end>", eos_token="<end>")
    teacher = of_transformers(sentence_piece(600), bos_token="<s>", eos_token="</s>")
    tables_of_both = tables((student, teacher))
    end, text = tables_of_both[0].vocabulary["<end>"], tables_of_both[0].encode(["a b"])[0]

    result = TokenAligner(*tables_of_both).align(np.array([[end, *text, end]]))
    named = TokenAligner(*tables_of_both, special_tokens={"<end>": "</s>"}).align(np.array([[end, *text, end]]))

    begin, finish = (tables_of_both[1].vocabulary[name] for name in ("<s>", "</s>"))
    assert (result.input_ids[0, 0], result.input_ids[0, -1]) == (begin, finish)
    assert (named.input_ids[0, 0], named.input_ids[0, -1]) == (finish, finish)
    assert result.student_spans[0, -1] == result.teacher_spans[0, -1] >= 0


@pytest.mark.parametrize("text", [" name", "  name", "name"])
def test_a_space_that_the_teacher_puts_in_front_of_a_space_is_left_out(text: str) -> None:
    result, numbers = aligned((byte_level(300), sentence_piece(400)), "x<end>" + text)
    assert (result.student_spans[0, 2:] >= 0).all()
    assert len(numbers) > 3


def test_names_of_special_tokens_in_a_text_are_plain_text_to_the_teacher() -> None:
    student, teacher = tables((byte_level(300), sentence_piece(600)))
    text = student.encode(["a </s> b"])[0]
    aligner = TokenAligner(student, teacher)

    for each in (aligner, copy.deepcopy(aligner), pickle.loads(pickle.dumps(aligner))):
        result = each.align(row(text))
        assert teacher.vocabulary["</s>"] not in result.input_ids
        assert (result.student_spans[0, 2:] >= 0).all()


def test_limit_of_the_teachers_tokenizer_is_the_default() -> None:
    pair = byte_level(300), of_transformers(byte_level(700), model_max_length=3)
    numbers = byte_level(300).encode("return self._name").ids

    assert TokenAligner(*tables(pair)).align(row(numbers)).input_ids.shape == (1, 3)
    assert TokenAligner(*tables(pair), max_length=5).align(row(numbers)).input_ids.shape == (1, 5)
    assert tables((byte_level(300), of_transformers(byte_level(700))))[1].max_length is None


def test_padding_on_either_side_is_left_out() -> None:
    student, teacher = tables((byte_level(300), byte_level(700)))
    text = student.encode(["return x"])[0]
    padding, end = [student.vocabulary["<end>"]] * 3, len(text)
    batch = np.array([[*padding, *text], [*text, *padding]])
    mask = np.array([[0] * 3 + [1] * end, [1] * end + [0] * 3])

    result = TokenAligner(student, teacher).align(batch, mask)

    assert result.student_spans[0, 3:].tolist() == result.student_spans[1, :end].tolist()
    assert (result.student_spans[mask == 0] == -1).all()
    assert result.input_ids[0].tolist() == result.input_ids[1].tolist()
    assert teacher.vocabulary["<end>"] not in result.input_ids


def test_a_limit_of_the_teacher_drops_the_spans_that_it_cuts() -> None:
    student, teacher = tables((byte_level(700), byte_level(300)))
    numbers = student.encode(["return self._name_of(value)"])[0]
    whole = TokenAligner(student, teacher).align(row(numbers))

    result = TokenAligner(student, teacher, max_length=6).align(row(numbers))

    assert result.input_ids.shape == (1, 6)
    kept = set(result.student_spans[0].tolist()) - {-1}
    assert kept == set(result.teacher_spans[0].tolist()) - {-1} != set()
    cut = set(whole.teacher_spans[0, 6:].tolist())
    assert kept == set(whole.student_spans[0].tolist()) - cut - {-1}


def test_row_without_text_has_no_spans_and_one_token_for_the_teacher() -> None:
    student, teacher = tables((byte_level(300), byte_level(700)))

    result = TokenAligner(student, teacher).align(np.zeros((2, 3), dtype=np.int64), np.zeros((2, 3)))

    assert result.input_ids.shape == result.attention_mask.shape == (2, 1)
    assert result.attention_mask.tolist() == [[1], [1]]
    assert (result.student_spans == -1).all()


def test_numbers_beyond_the_vocabulary_have_no_bytes() -> None:
    student, teacher = tables((byte_level(300), byte_level(700)))
    text = student.encode(["a b"])[0]

    result = TokenAligner(student, teacher).align(row([*text, 5000, -1]))

    assert result.student_spans[0, -2:].tolist() == [-1, -1]


def test_settings_of_padding_and_truncation_change_nothing() -> None:
    tokenizer = Tokenizer.from_str(byte_level(700).to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    plain, text = TokenBytes("teacher_tokenizer", byte_level(700)), texts()[0][:300]

    table = TokenBytes("teacher_tokenizer", tokenizer)
    tokenizer.enable_truncation(3)

    assert table.encode([text]) == plain.encode([text])


@pytest.mark.parametrize(
    ("tokenizer", "error", "words"),
    [
        (None, TypeError, r"`name` to be a tokenizer, but got name=None\. Pass transformers\.AutoTokenizer"),
        ("gpt2", TypeError, r"`name` to be a tokenizer, but got name='gpt2'\."),
        (Tokenizer, TypeError, r"but got the class Tokenizer\."),
        (object(), TypeError, r"`name` to be a fast tokenizer, .* but got object, which does not say which bytes"),
    ],
    ids=["none", "a name", "a class", "a slow tokenizer"],
)
def test_other_things_than_fast_tokenizers_are_refused(tokenizer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        TokenBytes("name", tokenizer)


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens of `teacher_tokenizer` to spell the text, but got '.*' for 'Ab  c"):
        TokenBytes("teacher_tokenizer", lower_case())
