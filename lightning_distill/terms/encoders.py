"""The terms on all layers of transformers: hidden states, attention maps, and relations of queries, keys and values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.adapters import AdapterFactory
from lightning_distill.losses import AttentionMapLoss, AttentionRelationLoss, DistillationLoss
from lightning_distill.recording import Call, Tap
from lightning_distill.schedules import Weight
from lightning_distill.terms.base import LossCallable
from lightning_distill.terms.features import FeatureDistillation
from lightning_distill.terms.layer_maps import LayerOutput, Layers, Pairs, checked_layers, layer_pairs
from lightning_distill.terms.losses import Mask, attention_mask, counted_positions, takes_mask

_ROUNDING = 0.02  # rows of probabilities in half precision add up to 1 within this


class _WithoutPadding(FeatureDistillation):
    """A term on tokens: padding does not count, by the attention mask in the student's call or in the batch."""

    mask_name = "attention_mask"

    def _mask(self, student: Call, labels: Tensor | None) -> Tensor | None:
        if self.mask is not None:
            return counted_positions(student, self.mask, None, None)
        mask = attention_mask(student, self.mask_name)
        if mask is not None and not takes_mask(self.loss):
            raise ValueError(
                f"Expected `loss` to leave out padding, since the batch has an {self.mask_name!r}, but got"
                f" {self.loss!r}, which takes no mask. Pass another loss, or name the layers in a FeatureDistillation,"
                " which compares padding too."
            )
        return mask


class _LayerByLayer(_WithoutPadding):
    """A term on an entry of both networks' outputs that holds a tensor for each layer."""

    needs_network = True
    first: ClassVar[int] = 1  # number of the layer whose tensor is the first

    def __init__(
        self, output: str, layers: Layers, loss: LossCallable | str, argument: str, **settings: object
    ) -> None:
        # the numbers of layers are known when the networks have been called: until then it reads the last
        student, teacher = (Tap("", LayerOutput(who, output, -1)) for who in ("student", "teacher"))
        super().__init__(student, teacher, loss, **settings)  # type: ignore[arg-type]
        if not isinstance(output, str):
            raise TypeError(f"Expected `output` to be a name of an output, but got output={output!r}.")
        self.output, self.layers = output, checked_layers(layers)
        self.student_arguments = self.teacher_arguments = {argument: True}
        decodes = output.startswith(("decoder_", "cross_"))
        self.mask_name = "decoder_attention_mask" if decodes else "attention_mask"

    def pairs(self, student: int, teacher: int) -> Pairs:
        """The numbers of the layers to compare, for networks with so many layers."""
        return layer_pairs(self.layers, student, teacher, self.first)

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Pair the layers, and make the adapters, from a first call."""
        depths = [
            len(LayerOutput(call.who, self.output, 0).all(call.output)) - 1 + self.first
            for call in (student, *teachers)
        ]
        if len(set(depths[1:])) > 1:
            raise ValueError(
                f"Expected all teachers to have the same number of layers for term {self.name!r}, but got {depths[1:]}."
                " Make a term for each teacher with FeatureDistillation."
            )
        self._read(self.pairs(*depths[:2]))
        super().build(student, teachers)

    def reset(self) -> None:
        """Drop the adapters and the pairs of layers."""
        super().reset()
        self._read([(self.first - 1, self.first - 1)])

    def _read(self, pairs: Pairs) -> None:
        self._pairs = [
            (
                Tap("", LayerOutput("student", self.output, student - self.first)),
                Tap("", LayerOutput("teacher", self.output, teacher - self.first)),
            )
            for student, teacher in pairs
        ]
        self.student_taps, self.teacher_taps = [pair[0] for pair in self._pairs], [pair[1] for pair in self._pairs]

    def extra_repr(self) -> str:
        """Settings."""
        return f"layers={self.layers!r}, loss={self.loss}, weight={self.weight}, name={self.name!r}"


class HiddenStatesDistillation(_LayerByLayer):
    """A loss between the hidden states of two transformers, layer by layer.

    Both networks are called with ``output_hidden_states=True`` in a step, as models of Hugging Face are, or return
    ``hidden_states`` anyway: the embeddings' output, then the output of each layer. Padding does not count: the
    attention mask is read from the student's call, else from the batch.

    Args:
        layers: ``"uniform"`` compares the embeddings' outputs, and layer m of the student's L_s layers with layer
            ceil(m L_t / L_s) of the teacher's L_t; ``"last"`` compares the last layers; else pairs of numbers, the
            student's first, or a dict of them. Layers are numbered from 1, the embeddings' output is 0, and negative
            numbers count from the last layer.
        loss: As for :class:`FeatureDistillation`, averaged over the pairs of layers. A loss without a mask is refused
            if the batch has an attention mask.
        weight: Factor of the term in the total loss, a number or a schedule. The number of pairs makes the papers'
            sum over the layers.
        adapter: As for :class:`FeatureDistillation`; ``"linear"`` maps the student's width to the teacher's also where
            they agree.
        share_adapter: Whether all pairs of layers have the same adapter, as in TinyBERT, or each has its own.
        embeddings: Whether ``"uniform"`` compares the embeddings' outputs too.
        tokens: ``"all"``, or ``"first"`` for the first token alone, the [CLS] of BERT.
        output: Entry of the networks' outputs. Models with an encoder and a decoder have ``"encoder_hidden_states"``
            and ``"decoder_hidden_states"``.
        mask: Where a batch keeps the mask of the tokens that count, shape ``(N, L)``; ``None`` takes the attention
            mask, if the call or the batch has one.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: If a setting is not one of those above. In the first step: if a network returns no hidden states, a
            layer does not exist, or the student has more layers than the teacher with ``"uniform"``.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> from lightning_distill.losses import PatientLoss
        >>> tinybert = HiddenStatesDistillation(adapter="linear", share_adapter=True)
        >>> patient_kd = HiddenStatesDistillation({1: 2, 2: 4, 3: 6}, PatientLoss(), tokens="first", weight=10.0)
        >>> tinybert.pairs(4, 12), patient_kd.pairs(4, 12)
        ([(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)], [(1, 2), (2, 4), (3, 6)])

    References:
        Jiao et al. 2020 (TinyBERT), equations 8 and 9, arXiv:1909.10351; deviation: the mean over the pairs of layers.
        Sun et al. 2019 (Patient KD), equation 7, arXiv:1908.09355, with ``PatientLoss`` on the first token.
        Sun et al. 2020 (MobileBERT), equation 2, arXiv:2004.02984, with ``"mse"`` or ``FeatureMapTransferLoss``.
    """

    first = 0

    def __init__(
        self,
        layers: Layers = "uniform",
        loss: str | DistillationLoss | LossCallable = "mse",
        *,
        weight: Weight = 1.0,
        adapter: str | nn.Module | AdapterFactory | None = "auto",
        share_adapter: bool = False,
        embeddings: bool = True,
        tokens: Literal["all", "first"] = "all",
        output: str = "hidden_states",
        mask: Mask | None = None,
        name: str = "hidden_states",
    ) -> None:
        super().__init__(
            output, layers, loss, "output_hidden_states", weight=weight, adapter=adapter, name=name, mask=mask
        )
        checks.boolean("share_adapter", share_adapter)
        checks.boolean("embeddings", embeddings)
        checks.one_of("tokens", tokens, ("all", "first"))
        self.shares_adapter, self.embeddings, self.tokens = share_adapter, embeddings, tokens

    def pairs(self, student: int, teacher: int) -> Pairs:
        """The numbers of the layers to compare, for networks with so many layers."""
        pairs = super().pairs(student, teacher)
        return [(0, 0), *pairs] if self.layers == "uniform" and self.embeddings else pairs

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Pair the layers, and make the adapters, from a first call."""
        super().build(student, teachers)
        widths = {
            (student.feature(student_tap).shape[-1], teacher.feature(teacher_tap).shape[-1])
            for teacher in teachers
            for student_tap, teacher_tap in self._pairs
        }
        if self.shares_adapter and len(widths) > 1:
            raise ValueError(
                "Expected all layers of a network to have the same width for share_adapter=True, but got the widths"
                f" {sorted(widths)} of student and teacher. Pass share_adapter=False."
            )

    def _feature(self, student: Call, tap: Tap) -> Tensor:
        return self._tokens(student.feature(tap))

    def _target(self, student: Call, teacher: Call, tap: Tap) -> Tensor:
        return self._tokens(teacher.feature(tap))

    def _tokens(self, hidden: Tensor) -> Tensor:
        return hidden if self.tokens == "all" else hidden[:, 0]

    def _mask(self, student: Call, labels: Tensor | None) -> Tensor | None:
        mask = super()._mask(student, labels)
        return mask if mask is None or self.tokens == "all" or mask.ndim == 1 else mask[:, 0]


class AttentionDistillation(_LayerByLayer):
    """A loss between the attention maps of two transformers, layer by layer.

    Both networks are called with ``output_attentions=True`` in a step, as models of Hugging Face are, or return
    ``attentions`` anyway, for each layer a tensor of the shape ``(N, heads, L, L)``, or ``(N, L, L)`` for the mean over
    the heads. Models of Hugging Face make them only if they are loaded with ``attn_implementation="eager"``, and return
    probabilities, after the dropout: set ``attention_probs_dropout_prob=0`` in the student's config. Padding does not
    count, neither as a query nor as a key.

    Args:
        layers: As for :class:`HiddenStatesDistillation`, without the embeddings.
        loss: ``"kl"`` or ``"mse"`` of the probabilities, or a loss such as ``AttentionMapLoss("mse")``, averaged over
            the pairs of layers.
        weight: Factor of the term in the total loss, a number or a schedule. The number of pairs makes the papers'
            sum over the layers.
        average_heads: Whether the mean over the heads is compared, which also allows different numbers of heads.
        output: Entry of the networks' outputs. Models with an encoder and a decoder have ``"encoder_attentions"`` and
            ``"decoder_attentions"``.
        mask: As for :class:`HiddenStatesDistillation`.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: If a setting is not one of those above. In the first step: if a network returns no attention maps, a
            layer does not exist, the numbers of heads differ without ``average_heads``, or a loss on scores gets
            probabilities.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> AttentionDistillation("last", weight=0.1).pairs(4, 12)
        [(4, 12)]

    References:
        Jiao et al. 2020 (TinyBERT), equation 7, arXiv:1909.10351, with ``"mse"``; deviations: probabilities, since
        models of Hugging Face do not return scores, and the mean over the pairs of layers.
        Sun et al. 2020 (MobileBERT), equation 3, arXiv:2004.02984, with ``"kl"``.
    """

    reads_maps = False

    def __init__(
        self,
        layers: Layers = "uniform",
        loss: str | DistillationLoss | LossCallable = "kl",
        *,
        weight: Weight = 1.0,
        average_heads: bool = False,
        output: str = "attentions",
        mask: Mask | None = None,
        name: str = "attention",
    ) -> None:
        if isinstance(loss, str):
            checks.one_of("loss", loss, ("kl", "mse"))
            loss = AttentionMapLoss(loss, from_scores=False)
        super().__init__(output, layers, loss, "output_attentions", weight=weight, adapter=None, name=name, mask=mask)
        checks.boolean("average_heads", average_heads)
        self.average_heads = average_heads

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Pair the layers, and check the maps of a first call."""
        super().build(student, teachers)
        student_tap, teacher_tap = self._pairs[-1]
        maps = self._feature(student, student_tap), self._target(student, teachers[0], teacher_tap)
        if maps[1].any():  # a process without a batch builds from zeros
            self._check_probabilities(*maps)

    def _check_probabilities(self, student: Tensor, teacher: Tensor) -> None:
        """Check that the loss is one on the maps that the networks return, once: it waits for the device."""
        from_scores = getattr(self.loss, "from_scores", None) if getattr(self.loss, "kind", "") == "kl" else None
        if from_scores is not None and from_scores == _are_probabilities(teacher):
            kind = "probabilities" if from_scores else "scores"
            raise ValueError(
                f"Expected `loss` to be one on {kind}, which the teacher returns, but got from_scores={from_scores}."
                f" Pass AttentionMapLoss('kl', from_scores={not from_scores})."
            )
        if _are_probabilities(teacher) and not _are_probabilities(student):
            warnings.warn(
                "Expected the rows of the student's attention maps to add up to 1, as the teacher's do, but they do"
                " not: the model returns them after its dropout. Set attention_probs_dropout_prob=0 (attention_dropout,"
                " attn_pdrop) in the student's config.",
                stacklevel=2,
            )

    def _feature(self, student: Call, tap: Tap) -> Tensor:
        return self._maps(student.feature(tap), "student")

    def _target(self, student: Call, teacher: Call, tap: Tap) -> Tensor:
        return self._maps(teacher.feature(tap), "teacher")

    def _maps(self, maps: Tensor, who: str) -> Tensor:
        if maps.ndim not in (3, 4):
            raise ValueError(
                f"Expected the {who}'s {self.output} to have the shape (batch, heads, tokens, tokens), but got shape"
                f" {tuple(maps.shape)}. Pass output=<the entry with the attention maps>."
            )
        maps = maps.unsqueeze(1) if maps.ndim == 3 else maps
        return maps.mean(1, keepdim=True) if self.average_heads else maps

    def _pair(self, index: int, taps: tuple[Tap, Tap], student: Call, teacher: Call) -> tuple[Tensor, Tensor]:
        student_map, teacher_map = self._feature(student, taps[0]), self._target(student, teacher, taps[1])
        if student_map.shape != teacher_map.shape:
            heads = student_map.shape[1] != teacher_map.shape[1]
            raise ValueError(
                "Expected student and teacher to have attention maps of the same shape, but got"
                f" {tuple(student_map.shape)} and {tuple(teacher_map.shape)}."
                + (
                    " Pass average_heads=True, or compare relations, which allow other numbers of heads:"
                    " AttentionRelationDistillation."
                    if heads
                    else " Call both with the same tokens."
                )
            )
        return student_map, teacher_map


class AttentionRelationDistillation(_WithoutPadding):
    """A divergence of the relations between tokens, by the queries, the keys and the values of one layer of each model.

    The widths and numbers of heads may differ, and only one layer is compared, usually the last. Padding does not
    count: the attention mask is read from the student's call, else from the batch. The relations are between all other
    tokens of a row, also between those of packed documents.

    Args:
        student_layer: Name of a self-attention layer of the student, whose parts ``query``, ``key`` and ``value`` are
            read, or the names or taps of the three projections themselves.
        teacher_layer: The same for the teacher. MiniLMv2 takes the last layer of a base model, and layer 21 of 24 or 19
            of 24 of a large one.
        relation_heads: Number of relation heads, a divisor of both widths; the paper has 48, and 64 for large teachers.
        weight: Factor of the term in the total loss, a number or a schedule. The term is the mean over queries, keys
            and values; 3 makes the paper's sum.
        mask: As for :class:`HiddenStatesDistillation`.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: If ``relation_heads`` is less than 1, or the two sides name different numbers of projections. In the
            first step: if ``relation_heads`` does not divide a width.
        TypeError: If ``relation_heads`` is not an int.

    Example:
        >>> bert = "bert.encoder.layer.{}.attention.self"
        >>> term = AttentionRelationDistillation(bert.format(3), bert.format(11), relation_heads=12)
        >>> [tap.layer for tap in term.student_taps][0]
        'bert.encoder.layer.3.attention.self.query'

    References:
        Wang et al. 2021 (MiniLMv2), equations 5 to 8, arXiv:2012.15828; deviation: the mean over queries, keys, values.
    """

    reads_maps = False

    def __init__(
        self,
        student_layer: str | Sequence[str | Tap],
        teacher_layer: str | Sequence[str | Tap],
        *,
        relation_heads: int,
        weight: Weight = 1.0,
        mask: Mask | None = None,
        name: str = "attention_relation",
    ) -> None:
        loss = AttentionRelationLoss(relation_heads=relation_heads)
        student, teacher = _projections(student_layer), _projections(teacher_layer)
        super().__init__(student, teacher, loss, weight=weight, adapter=None, name=name, mask=mask)


def _projections(layer: str | Sequence[str | Tap]) -> list[str | Tap]:
    if isinstance(layer, str):
        return [f"{layer}.{part}" for part in ("query", "key", "value")]
    return [*layer]


def _are_probabilities(maps: Tensor) -> bool:
    """Whether rows add up to 1 at most, and no number is negative; rows of padding may be 0."""
    maps = maps.detach().float()
    return bool((maps >= 0).all() and (maps.sum(-1) <= 1 + _ROUNDING).all() and (maps.sum(-1) > 1 - _ROUNDING).any())
