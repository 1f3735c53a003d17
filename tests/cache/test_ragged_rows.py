"""Sequences are stored without padding, and come back at the student's places (C17)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cache_nets import network, table
from ragged_data import Padding, Sentences, Unmasked, built, difference, teacher, trained
from token_nets import LENGTHS, VOCABULARY, CausalModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill_core.cache_files import checksum
from distill_core.columns import Ragged
from lightning_distill import (
    CacheError,
    Distiller,
    FeatureDistillation,
    LogitsDistillation,
    SequenceDistillation,
    SoftTargetLoss,
    TeacherCache,
)

FORMAT_1 = Path(__file__).parent / "format_1"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return built(tmp_path_factory.mktemp("ragged"), layers=["body"])


def test_c17_every_token_is_stored_and_no_padding(cache: TeacherCache) -> None:
    """C17: in several shards, of batches of differing length; NumPy alone reads them."""
    folder = cache.reader.folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert manifest["arrays"]["output"] == {"shape": [VOCABULARY], "dtype": "float32", "ragged": "attention_mask"}
    shards = range(cache.manifest.shards)
    assert len(shards) > 1
    lengths = np.concatenate([np.load(folder / f"shard-0000{shard}.output.lengths.npy") for shard in shards])
    values = np.concatenate([np.load(folder / f"shard-0000{shard}.output.values.npy") for shard in shards])
    assert lengths.tolist() == list(LENGTHS)
    assert values.shape == (sum(LENGTHS), VOCABULARY)


@pytest.mark.parametrize("rows", [[3], [23, 0, 7, 7, 15], []])
def test_c17_rows_of_any_order_are_those_of_the_sequences_alone(cache: TeacherCache, rows: list[int]) -> None:
    """C17"""
    answers = cache.read(rows)
    assert isinstance(answers["output"], Ragged)
    assert answers["output"].lengths.tolist() == [LENGTHS[row] for row in rows]
    expected = [teacher()(torch.tensor([Sentences()[row]["input_ids"]]))["logits"][0].detach() for row in rows]
    assert len(answers["output"].values) == sum(map(len, expected))
    if rows:
        np.testing.assert_allclose(answers["output"].values, torch.cat(expected).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "padding", [Padding(), Padding("left"), Padding(length=12), Padding("left", length=11)], ids=str
)
@pytest.mark.parametrize("workers", [0, 2])
def test_c17_the_weights_are_those_of_a_live_teacher(cache: TeacherCache, padding: Any, workers: int) -> None:
    """C17: the student's own padding, order and batch size, with and without workers."""
    live, cached = (trained(source, padding, num_workers=workers) for source in (teacher(), cache))
    assert difference(live, cached) < 1e-6


def test_c17_features_of_tokens_are_distilled_under_their_mask(cache: TeacherCache) -> None:
    """C17"""

    def term() -> Any:
        return [FeatureDistillation("model.body", "body", mask="attention_mask", weight=3.0)]

    live, cached = (trained(source, Padding("left"), terms=term()) for source in (teacher(), cache))
    assert difference(live, cached) < 1e-6


def test_c17_answers_alone_may_be_stored(tmp_path: Path) -> None:
    """C17: a mask of your own; a function must be passed again when the cache is opened."""

    def answers(batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"].cumsum(1) * batch["attention_mask"] > 1

    built(tmp_path, mask=answers)
    cache = TeacherCache.open(tmp_path, mask=answers)
    assert cache.read(range(24))["output"].lengths.tolist() == [length - 1 for length in LENGTHS]
    live, cached = (
        trained(source, Padding("left"), terms=[SequenceDistillation(weight=2.0, mask=lambda b: shifted(answers(b)))])
        for source in (teacher(), cache)
    )
    assert difference(live, cached) < 1e-6
    with pytest.raises(CacheError, match=r"^Expected `mask` to be the function that the cache was built with, but got"):
        trained(TeacherCache.open(tmp_path), Padding())
    with pytest.raises(ValueError, match=r"^Expected term 'tokens' to count tokens that the cache holds, but its mask"):
        trained(cache, Padding())


def shifted(mask: Tensor) -> Tensor:
    """The mask of the tokens that the marked positions predict."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], 1)


def test_c17_labels_say_where_padding_begins_if_no_mask_does(tmp_path: Path) -> None:
    """C17: padding on the right, as in data with labels alone."""
    padding = Padding(mask=False)
    cache = built(tmp_path, collate_fn=padding)
    assert cache.manifest.arrays["output"]["ragged"] == "labels"
    assert cache.read(range(24))["output"].lengths.tolist() == list(LENGTHS)
    live, cached = (trained(source, padding, module=Unmasked()) for source in (teacher(), cache))
    assert difference(live, cached) < 1e-6


def test_c17_a_mask_in_a_tuple_is_named_by_its_index(tmp_path: Path) -> None:
    """C17: and remembered by the manifest."""

    def collate(samples: list[Any]) -> tuple[Tensor, ...]:
        return tuple(Padding()(samples).values())

    cache = built(tmp_path, collate_fn=collate, mask=1, forward=lambda net, batch: net(*batch[:2]))
    assert TeacherCache.open(tmp_path).manifest.arrays["output"]["ragged"] == 1
    assert cache.read(range(24))["output"].lengths.tolist() == list(LENGTHS)


def test_c17_the_likeliest_tokens_are_ragged_too(tmp_path: Path) -> None:
    """C17: with the tail, no information is lost at 12 of 13 tokens."""
    cache = built(tmp_path, top_k=12, dtype="float16")
    assert cache.read([0, 1])["output"].values[0].shape == (LENGTHS[0] + LENGTHS[1], 12)
    live, cached = (trained(source, Padding("left")) for source in (teacher(), cache))
    assert difference(live, cached) < 1e-3


def test_c17_a_loop_of_your_own_passes_the_collate_function(cache: TeacherCache) -> None:
    """C17"""
    loader = DataLoader(cache.attach(Sentences()), 6, collate_fn=cache.collate(Padding("left")), shuffle=True)
    batch = next(iter(loader))
    student, totals = CausalModel(), []
    for source in (cache, teacher()):
        with Distiller(student, source, SequenceDistillation(SoftTargetLoss(2.0))) as distiller:
            with distiller.record():
                student(batch.batch["input_ids"], batch.batch["attention_mask"])
            totals.append(distiller.total(torch.zeros(()), batch))
    assert totals[0].item() == pytest.approx(totals[1].item(), abs=1e-6)


def test_c17_encoders_and_decoders_have_positions_of_their_own(tmp_path: Path) -> None:
    """C17: the decoder's output under its labels, the encoder's features under its attention mask."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    net = transformers.T5ForConditionalGeneration(config)
    lengths = [(4, 2), (6, 3), (2, 5), (5, 4)]
    samples = [{"input_ids": list(range(1, m + 1)), "labels": list(range(3, n + 3))} for m, n in lengths]

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        sources, targets = (Padding()([{"input_ids": row[name]} for row in rows]) for name in ("input_ids", "labels"))
        return {**{name: sources[name] for name in ("input_ids", "attention_mask")}, "labels": targets["labels"]}

    settings: dict[str, Any] = {"collate_fn": collate, "batch_size": 2, "progress": False}
    settings |= {"layers": ["encoder.final_layer_norm"], "forward": lambda net, batch: net(**batch)}
    cache = TeacherCache.build(net, samples, tmp_path, **settings)
    arrays = cache.manifest.arrays
    assert (arrays["output"]["ragged"], arrays["feature0"]["ragged"]) == ("labels", "attention_mask")
    answers = cache.read(range(4))
    assert answers["output"].lengths.tolist() == [n for _, n in lengths]
    assert answers["feature0"].lengths.tolist() == [m for m, _ in lengths]


def test_c17_sequences_without_a_mask_say_how_to_pass_one(tmp_path: Path) -> None:
    """C17: before anything is trained."""

    def collate(samples: list[Any]) -> dict[str, Tensor]:
        return {"input_ids": Padding()(samples)["input_ids"]}

    with pytest.raises(CacheError, match=r"For sequences of differing length put `attention_mask` into the batch, or"):
        built(tmp_path / "a", collate_fn=collate)
    with pytest.raises(CacheError, match=r"^Expected `mask` to give the places of the tokens in .*, but got mask='m'"):
        built(tmp_path / "b", mask="m")
    with pytest.raises(
        CacheError, match=r"^Expected `mask` to be a mask of the tokens, but got mask=2, .* as in label"
    ):
        built(tmp_path / "c", collate_fn=lambda s: tuple(Padding()(s).values()), mask=2)


def test_c17_other_tokens_than_the_teacher_got_are_refused(cache: TeacherCache) -> None:
    """C17: truncated samples, a batch without a mask, packed samples, a term that counts padding."""

    def truncated(samples: list[Any]) -> Any:
        return Padding()([{"input_ids": sample["input_ids"][:4]} for sample in samples])

    def dropped(samples: list[Any]) -> Any:
        return Padding()(samples[1:])

    with pytest.raises(
        CacheError, match=r"to have the \d tokens that the teacher got, but its mask has 4: the samples"
    ):
        trained(cache, truncated)
    with pytest.raises(CacheError, match=r"^Expected the batch to have 5 sequences, .* but its mask has 4"):
        trained(cache, dropped)
    with pytest.raises(CacheError, match=r"^Expected the batch to have 'attention_mask', which says where the tokens"):
        trained(cache, Padding(mask=False), module=Unmasked())
    with pytest.raises(ValueError, match=r"^Expected term 'logits' to have a mask, since the cache holds the tokens"):
        trained(cache, Padding(), terms=[LogitsDistillation(SoftTargetLoss(1.0, class_dim=-1))])
    with pytest.raises(ValueError, match=r"^Expected term 'model.body' to have a mask, since the cache"):
        trained(cache, Padding(), terms=[FeatureDistillation("model.body", "body")])


def test_c17_rows_of_one_length_stay_as_they_were(tmp_path: Path) -> None:
    """C17: images and maps have no mask; a sequence classifier's output has no positions."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = teacher()

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Tensor:
            return self.net(input_ids, attention_mask)["logits"].mean(1)

    settings: dict[str, Any] = {"collate_fn": Padding(), "progress": False, "batch_size": 4}
    cache = TeacherCache.build(Classifier(), Sentences(), tmp_path, **settings)
    assert "ragged" not in cache.manifest.arrays["output"]
    assert cache.read([3, 5])["output"].shape == (2, VOCABULARY)


def test_c17_a_resumed_build_gives_the_same_bytes(tmp_path: Path) -> None:
    """C12, C17"""
    built(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "manifest.json").rename(tmp_path / "half" / "building.json")
    (tmp_path / "half" / "shard-00001.json").unlink()
    built(tmp_path / "half")
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "half")]
    assert contents[0] == contents[1]


def test_c17_caches_of_the_first_format_are_read_and_left_alone(tmp_path: Path) -> None:
    """C17: the files were written before rows could be ragged."""
    folder = Path(shutil.copytree(FORMAT_1, tmp_path / "old"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    cache = TeacherCache.open(folder, teacher=network(8), dataset=table())
    cache.verify()
    with torch.no_grad():
        expected = network(8)(table().tensors[0])
    indices, logs, _ = cache.read(range(40))["output"]
    assert torch.equal(torch.from_numpy(indices[:, 0]), expected.argmax(-1))
    np.testing.assert_allclose(logs[:, 0], expected.log_softmax(-1).max(-1).values.numpy(), atol=0.01)
    settings: dict[str, Any] = {"layers": ["1"], "top_k": 3, "dtype": "uint8", "batch_size": 8, "shard_bytes": 600}
    again = TeacherCache.build(network(8), table(), folder, progress=False, **settings)
    assert again.manifest.version == 1
    assert {name: content for name, content in before.items() if (folder / name).read_bytes() != content} == {}


def test_c17_lengths_that_do_not_fit_the_positions_name_their_file(tmp_path: Path) -> None:
    """C11, C17: also where the checksum is right."""
    built(tmp_path)
    file = tmp_path / "shard-00000.output.lengths.npy"
    lengths = np.load(file)
    lengths[2] += 1
    np.save(file, lengths)
    listed = json.loads((tmp_path / "shard-00000.json").read_text())
    listed[file.name]["blake2b"] = checksum(file)
    (tmp_path / "shard-00000.json").write_text(json.dumps(listed))
    with pytest.raises(CacheError, match=r"shard-00000\.output\.lengths\.npy to hold the lengths of rows with"):
        TeacherCache.open(tmp_path).read([0])
    with pytest.raises(CacheError, match=r"shard-00000\.output\.lengths\.npy"):
        TeacherCache.open(tmp_path).verify()


def test_padding_on_the_left_needs_an_attention_mask(tmp_path: Path) -> None:
    cache = built(tmp_path, collate_fn=Padding(mask=False), forward=lambda net, batch: net(batch["input_ids"]))

    with pytest.raises(CacheError, match="Labels do not show padding on the left: put an attention_mask into the"):
        trained(cache, Padding("left", mask=False))
