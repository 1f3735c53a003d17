"""L23: outputs and features in every form that networks return, and the taps that pick a tensor from them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation, Tap

MakeTrainer = Callable[..., Trainer]


@dataclass
class Both:
    logits: Tensor
    feature: Tensor
    note: str = "kept"


@dataclass
class Unclear:
    first: Tensor
    second: Tensor


Named = namedtuple("Named", ["feature", "logits"])
Alone = namedtuple("Alone", ["scores"])
UnclearTuple = namedtuple("UnclearTuple", ["one", "two"])

# form -> (from feature and logits to the output, from the output to the logits)
OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda f, z: z, lambda out: out),
    "tuple of one": (lambda f, z: (z,), lambda out: out[0]),
    "tuple with a state": (lambda f, z: (z, (f, f)), lambda out: out[0]),
    "tuple after a loss": (lambda f, z: (z.sum(), z), lambda out: out[1]),
    "dict with logits": (lambda f, z: {"feature": f, "logits": z}, lambda out: out["logits"]),
    "dict with one tensor": (lambda f, z: {"scores": z, "note": "kept"}, lambda out: out["scores"]),
    "ordered dict": (lambda f, z: OrderedDict(feature=f, logits=z), lambda out: out["logits"]),
    "dataclass": (lambda f, z: Both(z, f), lambda out: out.logits),
    "namedtuple": (lambda f, z: Named(f, z), lambda out: out.logits),
    "namedtuple of one": (lambda f, z: Alone(z), lambda out: out.scores),
}
# of an inner layer the first is the feature, of a network it may as well be one of several heads
FIRST: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda f, z: (z, f), lambda out: out[0]),
    "list": (lambda f, z: [z, f], lambda out: out[0]),
}
AMBIGUOUS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "dict": (lambda f, z: {"one": z, "two": f}, r"'one': tensor of shape \(8, 5\), 'two': tensor of shape \(8, 6\)"),
    "dataclass": (Unclear, r"'first': tensor of shape \(8, 6\), 'second': tensor of shape \(8, 5\)"),
    "namedtuple": (UnclearTuple, r"'one': tensor of shape \(8, 6\), 'two': tensor of shape \(8, 5\)"),
    "nested tuple": (lambda f, z: ((z, f), f), r"0: tuple, 1: tensor of shape \(8, 6\)"),
}


class Gives(nets.MLP):
    """Returns its feature and logits in a form; ``block`` inside does the same."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any], width: int = 6) -> None:
        super().__init__(width)
        self.block = Block(form)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.layer2(torch.tanh(self.layer1(x.flatten(1))))
        return feature, self.head(torch.tanh(feature))

    def forward(self, x: Tensor) -> Any:
        return self.block(*self.parts(x))


class Block(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, feature: Tensor, logits: Tensor) -> Any:
        return self.form(feature, logits)


class Spy:
    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.pairs.append((student.detach().clone(), teacher.clone()))
        return ((student - teacher) ** 2).mean()


def run(
    trainer: MakeTrainer, form: Any, read: Callable[[Any], Tensor], make_term: Callable[[Any], Any], **settings: Any
) -> tuple[Tensor, Tensor]:
    """The two tensors that one step compares if both networks return their outputs in a form."""

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(read(module.model(batch[0])), batch[1])

    spy = Spy()
    module = nets.StepModule(nets.make(Gives, 1, form), step)
    callback = settings.pop("kind", DistillCallback)(nets.make(Gives, 2, form), make_term(spy), **settings)
    trainer(max_steps=1, callbacks=[callback]).fit(module, nets.loader())
    assert len(spy.pairs) == 1
    return spy.pairs[0]


def expected(index: int) -> list[Tensor]:
    """Feature (0) or logits (1) of student and teacher for the first batch."""
    with torch.no_grad():
        return [nets.make(Gives, seed, Both).parts(nets.batches()[0][0])[index] for seed in (1, 2)]


# The obvious tensor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", OUTPUTS)
def test_the_logits_of_every_form_of_output_are_found(trainer: MakeTrainer, form: str) -> None:
    """L23: logits by name, or the only tensor."""
    nets.close(run(trainer, *OUTPUTS[form], LogitsDistillation), expected(1), 1e-6)


@pytest.mark.parametrize("form", [*OUTPUTS, *FIRST])
def test_the_obvious_tensor_of_every_form_of_feature_is_found(trainer: MakeTrainer, form: str) -> None:
    """L23: the output of a tapped layer is read like a network's."""
    pair = run(
        trainer, *{**OUTPUTS, **FIRST}[form], lambda spy: FeatureDistillation("block", "block", spy, adapter=None)
    )
    nets.close(pair, expected(1), 1e-6)


@pytest.mark.parametrize("form", FIRST)
@pytest.mark.parametrize("output", [0, (0, 0), (0, lambda output: output[0])])
def test_of_several_outputs_one_is_named(trainer: MakeTrainer, form: str, output: Any) -> None:
    """L23: the same for both networks, or a pair where they differ; without a name nothing is guessed."""
    make, read = FIRST[form]
    nets.close(run(trainer, make, read, lambda spy: LogitsDistillation(spy, output=output)), expected(1), 1e-6)
    with pytest.raises(ValueError, match=r"LogitsDistillation\(output=\.\.\.\).*tensors are: 0: tensor .*, 1: tensor"):
        run(trainer, make, read, LogitsDistillation)


@pytest.mark.parametrize("form", AMBIGUOUS)
@pytest.mark.parametrize("place", ["output", "feature"])
def test_an_ambiguous_output_raises_and_lists_its_tensors(trainer: MakeTrainer, form: str, place: str) -> None:
    """L23: no guess; the message shows keys and shapes, and what to pass."""
    make, listed = AMBIGUOUS[form]

    def term(spy: Any) -> Any:
        return LogitsDistillation(spy) if place == "output" else FeatureDistillation("block", "block", spy)

    source = "the model's output" if place == "output" else r"the output of student layer 'block'"
    match = (
        rf"Expected `output` to pick one tensor of {source}, .*Tap\(layer, output=\.\.\.\).*The tensors are: {listed}"
    )
    with pytest.raises(ValueError, match=match):
        run(trainer, make, lambda out: torch.zeros(8, nets.CLASSES, requires_grad=True, device=DEVICE), term)


# Taps that pick ------------------------------------------------------------------------------------------------------

PICKS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], Any]] = {
    "index of a tuple": (lambda f, z: (z, f), lambda out: out[0], 1),
    "index from the end": (lambda f, z: (z, z, f), lambda out: out[0], -1),
    "index of a list": (lambda f, z: [z, f], lambda out: out[0], 1),
    "key of a dict": (lambda f, z: {"logits": z, "feature": f}, lambda out: out["logits"], "feature"),
    "field of a dataclass": (lambda f, z: Both(z, f), lambda out: out.logits, "feature"),
    "field of a namedtuple": (Named, lambda out: out.logits, "feature"),
    "index of a namedtuple": (Named, lambda out: out.logits, 0),
    "function": (lambda f, z: ((z, [f]), z), lambda out: out[1], lambda out: out[0][1][0]),
}


@pytest.mark.parametrize("pick", PICKS)
def test_a_tap_picks_by_index_key_field_or_function(trainer: MakeTrainer, pick: str) -> None:
    """L23: `Tap(output=...)`, of which the tapped layer's own obvious tensor is another."""
    form, read, output = PICKS[pick]
    tap = Tap("block", output=output)
    pair = run(trainer, form, read, lambda spy: FeatureDistillation(tap, tap, spy, adapter=None))
    nets.close(pair, expected(0), 1e-6)


@pytest.mark.parametrize("output", [5, -3, "nothing", lambda out: "no tensor"])
def test_a_tap_that_picks_nothing_raises(trainer: MakeTrainer, output: Any) -> None:
    """L23: with what there is."""
    tap = Tap("block", output=output)
    match = r"Expected `output` to pick one tensor of the output of student layer 'block', but got output="
    with pytest.raises(ValueError, match=match):
        run(trainer, *FIRST["tuple"], lambda spy: FeatureDistillation(tap, tap, spy, adapter=None))


def test_an_output_of_a_tap_on_a_plain_tensor_raises(trainer: MakeTrainer) -> None:
    """L23: `output=0` of a tensor would be its first example."""
    tap = Tap("layer2", output=0)
    match = r"Expected `output` to be None where .* is a tensor, but got output=0\. .*output=\(0, None\)\)"
    with pytest.raises(ValueError, match=match):
        run(trainer, *OUTPUTS["tensor"], lambda spy: FeatureDistillation(tap, "layer2", spy))


def test_the_input_of_a_layer_can_be_tapped(trainer: MakeTrainer) -> None:
    """L23: `where="input"`, of one argument and of several."""
    pair = run(
        trainer,
        *OUTPUTS["tensor"],
        lambda spy: FeatureDistillation(
            Tap("block", where="input", output=1), Tap("block", where="input", output=1), spy
        ),
    )
    nets.close(pair, expected(1), 1e-6)
    tap = Tap("head", where="input")
    pair = run(trainer, *OUTPUTS["tensor"], lambda spy: FeatureDistillation(tap, tap, spy))
    nets.close(pair, [torch.tanh(feature) for feature in expected(0)], 1e-6)


def test_the_whole_network_can_be_tapped(trainer: MakeTrainer) -> None:
    """L23: the layer "" is the network."""
    tap = Tap("", output="feature")
    form, read = OUTPUTS["dict with logits"]
    pair = run(trainer, form, read, lambda spy: FeatureDistillation(tap, tap, spy, name="whole"), student="model")
    nets.close(pair, expected(0), 1e-6)


class Again(nets.MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer1(x.flatten(1)))
        return self.head(torch.tanh(self.layer2(torch.tanh(self.layer2(x)))))

    def run(self, index: int) -> Tensor:
        x = torch.tanh(self.layer1(nets.batches()[0][0].flatten(1)))
        first = self.layer2(x)
        return (first, self.layer2(torch.tanh(first)))[index].detach()


@pytest.mark.parametrize("index", [0, 1])
def test_a_tap_reads_the_call_of_its_index(trainer: MakeTrainer, index: int) -> None:
    """L23: `call=`, another one on each side."""
    spy = Spy()
    student, teacher = nets.make(Again, 1, 6), nets.make(Again, 2, 6)
    term = FeatureDistillation(Tap("layer2", call=index), Tap("layer2", call=1 - index), spy)
    trainer(max_steps=1, callbacks=[DistillCallback(teacher, term)]).fit(nets.InnerModule(student), nets.loader())
    start = nets.make(Again, 1, 6)
    nets.close(spy.pairs[0], [start.run(index), teacher.run(1 - index)], 1e-6)


def test_an_override_of_logits_reads_unusual_outputs(trainer: MakeTrainer) -> None:
    """L23: for both networks."""

    class Reads(DistillCallback):
        def logits(self, output: Any) -> Tensor:
            return output["deep"][0]["er"]

    form, read = (lambda f, z: {"deep": [{"er": z}], "f": f}), (lambda out: out["deep"][0]["er"])
    nets.close(run(trainer, form, read, LogitsDistillation, kind=Reads), expected(1), 1e-6)


# Hugging Face --------------------------------------------------------------------------------------------------------


class Classifies(LightningModule):
    """The usual wrapping: the network is called with the whole batch, labels included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def bert(seed: int, hidden: int) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=nets.CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        output_hidden_states=True,
    )
    return nets.make(transformers.BertForSequenceClassification, seed, config)


def test_hugging_face_models_are_distilled_in_logits_and_hidden_states(trainer: MakeTrainer) -> None:
    """L23: ModelOutput on both sides, keyword arguments, encoder layers that give a tensor or a tuple."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (8, 6), generator=generator)
    mask = torch.ones_like(tokens)
    mask[:, 4:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(8) % nets.CLASSES}
    student, teacher = bert(1, 8), bert(2, 8)
    with torch.no_grad():
        teacher_output, student_output = teacher.eval()(**batch), bert(1, 8).eval()(**batch)
    logits, layer, state = Spy(), Spy(), Spy()
    hidden = Tap("", output=lambda output: output.hidden_states[1])
    terms = [
        LogitsDistillation(logits),
        FeatureDistillation("bert.encoder.layer.1", "bert.encoder.layer.1", layer),
        FeatureDistillation(hidden, hidden, state, name="hidden"),
    ]
    callback = DistillCallback(teacher, terms, student="model")
    module = Classifies(student)
    trainer(max_steps=1, callbacks=[callback]).fit(module, nets.as_loader([batch]))
    nets.close(logits.pairs[0], [student_output.logits, teacher_output.logits], 1e-5)
    nets.close(layer.pairs[0], [student_output.hidden_states[2], teacher_output.hidden_states[2]], 1e-5)
    nets.close(state.pairs[0], [student_output.hidden_states[1], teacher_output.hidden_states[1]], 1e-5)


def test_hugging_face_models_of_unequal_width_get_a_linear_adapter(trainer: MakeTrainer) -> None:
    """L23: token sequences (N, L, H) are mapped over their last dimension."""
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(20, (8, 6), generator=generator), "labels": torch.arange(8) % nets.CLASSES}
    term = FeatureDistillation("bert.encoder.layer.0", "bert.encoder.layer.1")
    callback = DistillCallback(bert(2, 12), [LogitsDistillation(), term])
    module = Classifies(bert(1, 8))
    trainer(max_steps=2, callbacks=[callback]).fit(module, nets.as_loader([batch, batch]))
    assert [tuple(parameter.shape) for parameter in term.adapters[0].parameters()] == [(12, 8), (12,)]


def test_a_hugging_face_output_without_logits_raises_and_lists_its_keys(trainer: MakeTrainer) -> None:
    """L23: a bare encoder gives hidden states only."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def encoder(seed: int) -> Any:
        config = bert(1, 8).config
        return nets.make(transformers.BertModel, seed, config)

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        return module.model(batch).last_hidden_state.square().mean()

    module = nets.StepModule(encoder(1), step)
    data = nets.as_loader([torch.zeros(4, 6, dtype=torch.long)])
    with pytest.raises(ValueError, match=r"'last_hidden_state': tensor of shape \(4, 6, 8\), 'pooler_output': tensor"):
        trainer(callbacks=[DistillCallback(encoder(2))]).fit(module, data)
