"""Caches of served models and of predictors that are not modules (C21, T12)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_nets import table
from served_model import VOCABULARY, Served, StatusError, choice, log_probabilities, response, serving
from torch import nn

from distill_core.clients import CompletionsClient
from distill_core.manifest import CacheError
from lightning_distill import TeacherCache
from lightning_distill.cache.keyed import input_digests

TEXTS = [
    {"id": f"text {index}", "input_ids": np.random.default_rng(index).integers(VOCABULARY, size=2 + index % 5).tolist()}
    for index in range(20)
]
SETTINGS: dict[str, Any] = {
    "name": "big model",
    "vocabulary": VOCABULARY,
    "top_k": 4,
    "batch_size": 2,
    "wait": 0.0,
    "progress": False,
    "shard_bytes": 150,
}


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


def client(served: Served) -> CompletionsClient:
    return CompletionsClient(served.url, "teacher", top_k=4)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# Served models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_served_teacher_is_stored_as_its_whole_logits_would_be(served: Served, tmp_path: Path, dtype: str) -> None:
    cache = TeacherCache.from_logprobs(TEXTS, tmp_path / "served", client(served), dtype=dtype, **SETTINGS)
    logits = [log_probabilities(text["input_ids"]).astype("float32") for text in TEXTS]
    whole = TeacherCache.from_arrays(logits, tmp_path / "whole", top_k=4, dtype=dtype)

    assert cache.manifest.shards > 3
    for row in range(len(TEXTS)):
        (stored, lengths), (expected, expected_lengths) = (c.read([row])["output"] for c in (cache, whole))
        assert lengths == expected_lengths == len(TEXTS[row]["input_ids"])
        np.testing.assert_array_equal(stored[0], expected[0])
        np.testing.assert_allclose(stored[1], expected[1], atol=1e-6)
        np.testing.assert_allclose(stored[2], expected[2], atol=2e-3)
    cache.verify()


def test_a_build_that_failed_asks_for_the_missing_shards_alone(served: Served, tmp_path: Path) -> None:
    def broken(body: dict[str, Any], call: int) -> Any:
        if call > 5:
            raise StatusError(500)
        return response(body, call)

    TeacherCache.from_logprobs(TEXTS, tmp_path / "whole", client(served), **SETTINGS)
    served.requests.clear()
    served.respond = broken
    with pytest.raises(CacheError, match="Samples that were stored stay: call it again to ask for the rest"):
        TeacherCache.from_logprobs(TEXTS, tmp_path / "cache", client(served), retries=0, requests=1, **SETTINGS)
    kept = files(tmp_path / "cache")
    assert any(name.endswith(".npy") for name in kept)
    with pytest.raises(CacheError, match="it is not complete"):
        TeacherCache.open(tmp_path / "cache")

    served.requests.clear()
    served.respond = response
    TeacherCache.from_logprobs(TEXTS, tmp_path / "cache", client(served), **SETTINGS)

    asked = [tokens for request in served.requests for tokens in request["prompt"]]
    assert 0 < len(asked) < len(TEXTS)
    assert files(tmp_path / "cache") == files(tmp_path / "whole")
    assert (
        files(tmp_path / "cache").items()
        >= {name: content for name, content in kept.items() if name.endswith(".npy")}.items()
    )


def test_answers_in_a_file_are_found_by_the_key_of_the_sample(served: Served, tmp_path: Path) -> None:
    lines = [json.dumps({**choice(text["input_ids"], 4), "key": text["id"]}) for text in TEXTS]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines[::-1]), encoding="utf-8")

    keyed = TeacherCache.from_logprobs(TEXTS, tmp_path / "a", tmp_path / "answers.jsonl", key="id", **SETTINGS)
    asked = TeacherCache.from_logprobs(TEXTS, tmp_path / "b", client(served), **SETTINGS)

    rows = list(range(20))
    for stored, expected in zip(keyed.read(rows)["output"].values, asked.read(rows)["output"].values, strict=True):
        np.testing.assert_array_equal(stored, expected)
    assert [sample.rows for sample in map(keyed.attach(TEXTS[::-1]).__getitem__, (0, 19))] == [19, 0]
    tokens = torch.tensor([TEXTS[3]["input_ids"]])
    seen = input_digests({"input_ids": tokens}, torch.ones_like(tokens).bool(), [0])
    assert keyed.reader.input_digests(np.array([3])) == seen  # other tokens with the same key are refused in training


def test_padding_of_a_sample_is_not_asked_for(served: Served, tmp_path: Path) -> None:
    padded = [
        {"input_ids": torch.tensor([0, *text["input_ids"], 0]), "attention_mask": [0, *[1] * len(text["input_ids"]), 0]}
        for text in TEXTS
    ]

    cache = TeacherCache.from_logprobs(padded, tmp_path / "cache", client(served), **SETTINGS)

    assert served.requests[0]["prompt"][0] in [text["input_ids"] for text in TEXTS]
    assert cache.read([3])["output"].lengths.tolist() == [len(TEXTS[3]["input_ids"])]


@pytest.mark.parametrize(
    ("samples", "settings", "words"),
    [
        (TEXTS, {"temperature": 0.7}, r"Expected `temperature` to be 1, but got temperature=0\.7"),
        (TEXTS, {"tokens": "tokens"}, "to have its tokens at tokens='tokens', but got a sample of .*input_ids"),
        ([{"input_ids": "text"}], {}, "to be one or more whole numbers, but got 'text'. Tokenize the text first"),
        ([{"input_ids": []}], {}, r"to be one or more whole numbers, but got \[\]"),
        ([{"input_ids": [0.5]}], {}, r"to be one or more whole numbers, but got \[0\.5\]"),
        (TEXTS, {"top_k": 12}, "Expected `top_k` to be 1 to 11"),
        (TEXTS, {"requests": 0}, "Expected `requests` to be a whole number of 1 or more, but got requests=0"),
        (iter(TEXTS), {}, "Expected a map-style dataset with a length, but got list_iterator"),
    ],
)
def test_wrong_data_and_settings_are_refused_before_anything_is_asked(
    served: Served, tmp_path: Path, samples: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        TeacherCache.from_logprobs(samples, tmp_path / "cache", client(served), **{**SETTINGS, **settings})
    assert served.requests == []
    assert not (tmp_path / "cache").exists()


def test_another_model_does_not_continue_the_build(served: Served, tmp_path: Path) -> None:
    TeacherCache.from_logprobs(TEXTS, tmp_path / "cache", client(served), **SETTINGS)

    with pytest.raises(CacheError, match="begun with teacher="):
        TeacherCache.from_logprobs(TEXTS, tmp_path / "cache", client(served), **{**SETTINGS, "name": "another"})


# Predictors ----------------------------------------------------------------------------------------------------------

DATA = table()
INPUTS, LABELS = DATA.tensors[0].numpy(), DATA.tensors[1].numpy()
FAST: dict[str, Any] = {"dtype": "float32", "progress": False}


def onnx_session() -> Any:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    places = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 6]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negative", places[:1], places[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


def test_predictions_of_a_session_are_its_first_output(tmp_path: Path) -> None:
    cache = TeacherCache.from_predictions(onnx_session(), DATA, tmp_path / "cache", name="negative", **FAST)

    np.testing.assert_array_equal(cache.read(range(40))["output"], -INPUTS)


def test_predictions_of_a_classifier_are_its_log_probabilities(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(INPUTS, LABELS)
    cache = TeacherCache.from_predictions(model, DATA, tmp_path / "cache", name="regression", batch_size=7, **FAST)

    np.testing.assert_allclose(cache.read(range(40))["output"], np.log(model.predict_proba(INPUTS)), rtol=1e-5)


def test_predictions_of_a_regression_are_its_values(tmp_path: Path) -> None:
    from sklearn.linear_model import LinearRegression

    model = LinearRegression().fit(INPUTS, INPUTS[:, :2])
    cache = TeacherCache.from_predictions(model, DATA, tmp_path / "cache", name="regression", **FAST)

    np.testing.assert_allclose(cache.read(range(40))["output"], model.predict(INPUTS), rtol=1e-4, atol=1e-5)


def test_another_predictor_does_not_continue_the_build(tmp_path: Path) -> None:
    TeacherCache.from_predictions(np.negative, DATA, tmp_path / "cache", name="negative", **FAST)

    with pytest.raises(CacheError, match="begun with teacher="):
        TeacherCache.from_predictions(np.square, DATA, tmp_path / "cache", name="square", **FAST)


@pytest.mark.parametrize(
    ("predict", "words"),
    [
        (3, "Expected `predict` to be a function, an ONNX session or an estimator, but got a int"),
        (lambda x: x[:2], r"a row for each of 40 inputs, but got float32 of shape \(2, 6\)"),
        (lambda x: np.ma.masked_greater(x, 0), "Expected a prediction everywhere, but got masked entries"),
        (lambda x: ["a"] * len(x), "an array of numbers with a row for each of 40 inputs, but got <U1"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(tmp_path: Path, predict: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        TeacherCache.from_predictions(predict, DATA, tmp_path / "cache", name="wrong", **FAST)


def test_a_classifier_of_several_outputs_is_refused(tmp_path: Path) -> None:
    class Several:
        def predict_proba(self, inputs: Any) -> Any:
            return [inputs, inputs]

    with pytest.raises(TypeError, match="Expected `predict_proba` to return one array, but got several"):
        TeacherCache.from_predictions(Several(), DATA, tmp_path / "cache", name="several", **FAST)


def test_a_student_learns_from_a_predictor(tmp_path: Path) -> None:
    from lightning_distill import Distiller, LogitsDistillation
    from lightning_distill.losses import SoftTargetLoss

    torch.manual_seed(0)
    student, weight = nn.Linear(6, 10), torch.randn(6, 10)
    cache = TeacherCache.from_predictions(lambda x: x @ weight.numpy(), DATA, tmp_path / "cache", name="linear", **FAST)
    distiller = Distiller(student, cache, LogitsDistillation(SoftTargetLoss(temperature=2.0)), task_weight=0.0)
    (batch,) = torch.utils.data.DataLoader(cache.attach(DATA), batch_size=40)
    with distiller.record():
        student(batch.batch[0])

    loss = distiller.total(torch.zeros(()), batch)

    teacher, own = ((scores / 2).log_softmax(1) for scores in (DATA.tensors[0] @ weight, student(DATA.tensors[0])))
    torch.testing.assert_close(loss, 4 * (teacher.exp() * (teacher - own)).sum(1).mean())


@pytest.mark.parametrize("key", [torch.tensor(7), np.int64(7)], ids=["tensor", "NumPy"])
def test_a_key_that_is_a_tensor_is_a_number_in_a_file(tmp_path: Path, key: Any) -> None:
    data = [{"id": key, "input_ids": torch.tensor([3, 1, 4])}]
    file = tmp_path / "answers.jsonl"

    file.write_text(json.dumps({**choice([3, 1, 4], 4), "key": 7}) + "\n", encoding="utf-8")
    settings: dict[str, Any] = {"name": "teacher", "vocabulary": VOCABULARY, "top_k": 4, "key": "id", "retries": 0}
    cache = TeacherCache.from_logprobs(data, tmp_path / "cache", file, progress=False, **settings)
    assert len(cache.read([0])["output"].lengths) == 1


def test_a_digest_of_inputs_is_that_of_the_tokens_wherever_they_are() -> None:
    tokens = torch.tensor([[5, 3, 0], [7, 1, 2]])
    mask = tokens > 0
    alone = input_digests({"input_ids": tokens}, mask, [0, 1])
    numbers, positions = torch.tensor([4, 9]), torch.arange(3).expand(2, -1)

    batches = [
        {"id": numbers, "input_ids": tokens},
        {"position_ids": positions, "attention_mask": mask.long(), "input_ids": tokens},
        (numbers, tokens, mask.long()),
        (numbers, {"input_ids": tokens}),
    ]
    for batch in batches:
        np.testing.assert_array_equal(input_digests(batch, mask, [0, 1]), alone)
    images = torch.arange(8, dtype=torch.uint8).view(1, 2, 2, 2)
    assert input_digests((numbers, images), None, [0]) != input_digests((numbers, images + 1), None, [0])
    assert (alone != input_digests({"id": numbers, "input_ids": tokens + 1}, mask, [0, 1])).all()


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_last_position_without_an_answer_makes_a_loss_that_reads_it_nan(tmp_path: Path, dtype: str) -> None:
    answer = {key: choice([3, 1, 4], 4)[key] for key in ("prompt_logprobs",)}  # no generated token
    settings: dict[str, Any] = {"name": "teacher", "vocabulary": VOCABULARY, "top_k": 4, "dtype": dtype}
    data = [{"input_ids": [3, 1, 4]}, {"input_ids": [3, 1, 4]}]
    cache = TeacherCache.from_logprobs(data, tmp_path, lambda asked: [answer] * len(asked), progress=False, **settings)

    (_, logs, tail), _ = cache.read([0, 1])["output"]
    assert np.isnan(logs).all(1).tolist() == np.isnan(tail).all(1).tolist() == [False, False, True] * 2
    cache.verify()


def test_other_tokens_with_the_same_keys_do_not_continue_a_build_of_answers(served: Served, tmp_path: Path) -> None:
    TeacherCache.from_logprobs(TEXTS, tmp_path, client(served), **{**SETTINGS, "key": "id"})
    others = [{**text, "input_ids": [*text["input_ids"][::-1], 1]} for text in TEXTS]
    asked = len(served.requests)

    with pytest.raises(CacheError, match="to hold a cache of these samples, but it holds others with the same keys"):
        TeacherCache.from_logprobs(others, tmp_path, client(served), **{**SETTINGS, "key": "id"})
    assert len(served.requests) == asked
