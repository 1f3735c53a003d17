"""The ways to make a cache: from a live teacher, in parts, from arrays, from a served model, from any predictor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import nn

from distill_core.clients import JsonLines
from distill_core.parts import Part, merge
from distill_core.remote import building, local_folder
from distill_core.served import Answers, Ask, TokenIds
from distill_core.storage import Storage
from distill_core.store import CacheError
from lightning_distill.cache.builder import Forward
from lightning_distill.cache.building import build
from lightning_distill.cache.imported import Imported
from lightning_distill.cache.keyed import Key
from lightning_distill.cache.positions import Mask
from lightning_distill.cache.predictions import Predictor
from lightning_distill.cache.served import ServedTeacher, Tokens
from lightning_distill.recording import Tap
from lightning_distill.teachers.inputs import Place

Cache = TypeVar("Cache", bound="Makers")  # typing.Self is new in Python 3.11


class Makers:
    """Base of :class:`TeacherCache` with the methods that make one."""

    @classmethod
    def open(cls: type[Cache], path: str | PathLike[str], *, mask: Mask | None = None, key: Key | None = None) -> Cache:
        """Open a cache that was built before; see :meth:`TeacherCache.open`."""
        raise NotImplementedError

    @classmethod
    def build(
        cls: type[Cache],
        teacher: nn.Module,
        dataset: Any,
        path: str | PathLike[str],
        *,
        layers: Sequence[str | Tap] = (),
        outputs: bool = True,
        top_k: int | None = None,
        dtype: str = "float16",
        sampled: int | None = None,
        feature_dtype: str | None = None,
        views: int = 1,
        transform_seed: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: bool = True,
        resume: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        key: Key | None = None,
        mask: Mask | None = None,
        forward: Forward | None = None,
        teacher_inputs: Place = None,
        device: torch.device | str | None = None,
        allow_stale_augmentation: bool = False,
        shard_bytes: int = 64 * 2**20,
        trainer: Trainer | None = None,
    ) -> Cache:
        """Run the teacher over the data once and keep its outputs.

        A build that was stopped continues with its missing shards. Under ``torch.distributed`` the processes share the
        work.

        Args:
            teacher: The teacher; it runs in eval mode, and its mode is restored afterwards.
            dataset: The data, map-style, with a length.
            path: The folder, or a URL of fsspec such as ``"s3://bucket/cache"``: the cache is then built in a local
                folder and copied there.
            layers: Layers whose features are kept.
            outputs: Whether the outputs are kept.
            top_k: How many of the likeliest classes are kept of each output; None keeps all numbers.
            dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``; with ``top_k`` ``"float16"`` or ``"uint8"``, 8 bits
                linear in the log-probability.
            sampled: How many classes are drawn at random from each output, with importance weights: an unbiased
                estimate of all probabilities in few bytes, for losses that are linear in them. None draws none.
            feature_dtype: Precision of the features: None is ``dtype``; ``"uint8"`` is 8 bits, linear between the
                smallest and the largest number of each channel in a shard.
            views: Number of augmented views of each item; epochs cycle through them.
            transform_seed: Makes random transforms repeatable, so that student and teacher get the same views. They
                must draw from the global generators of torch, NumPy or Python.
            batch_size: Number of items in a batch of the teacher.
            num_workers: Number of worker processes that load data.
            progress: Whether to print the size beforehand and show a progress bar.
            resume: Whether a build that was begun, or is complete, is continued.
            collate_fn: Makes a batch of items; None is torch's own.
            key: Where an item has a key of its own: a column of a dict, an index of a tuple, or a function of the item
                that returns a string, bytes or a whole number; :func:`content_key` for a digest of the item. Rows are
                then found by key, in any data that hold the items. Needed for streams. None numbers the items.
            mask: Where a batch keeps the mask of its tokens, shape ``(B, T)``: a key, an index, or a function of the
                batch. Outputs and features ``(B, T, ...)`` are stored at these positions alone. None looks for
                ``attention_mask``, then ``labels``; for the outputs of an encoder and a decoder
                ``decoder_attention_mask``, then ``labels``.
            forward: Called with the teacher and a batch, returns its output; None calls it with the batch's inputs.
            teacher_inputs: The teacher's inputs, if they are not the student's, as in :class:`DistillCallback`: a
                function such as ``Normalize.between(...)``, or a key or an index. Its settings, or the source of a
                function of a module, are remembered: other inputs are another teacher.
            device: Where the teacher runs; None leaves it where it is.
            allow_stale_augmentation: Accept items that change between reads: the student then gets other views than
                the teacher did.
            shard_bytes: Approximate size of a shard; one is held in memory while it is built.
            trainer: Runs the build inside its ``predict``: in its processes, on its device and in its precision, with
                one device or DDP. None runs it here.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If a setting is wrong, items change between reads, the folder holds something else, or another
                process builds there.
            OSError: If the disk is full; resuming completes the folder.
        """
        build(
            teacher,
            dataset,
            path,
            resume=resume,
            progress=progress,
            layers=layers,
            outputs=outputs,
            storage=Storage(dtype, top_k, sampled, feature_dtype),
            views=views,
            transform_seed=transform_seed,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            key=key,
            mask=mask,
            forward=forward,
            teacher_inputs=teacher_inputs,
            device=device,
            allow_stale_augmentation=allow_stale_augmentation,
            shard_bytes=shard_bytes,
            trainer=trainer,
        )
        return cls.open(path, mask=mask, key=key)

    @classmethod
    def build_part(
        cls: type[Cache], teacher: nn.Module, dataset: Any, path: str | PathLike[str], part: str, **settings: Any
    ) -> None:
        """Build every n-th shard of a cache, for jobs that run independently of each other.

        Each job builds into a folder of its own, with the same teacher, data and settings. :meth:`merge`, or
        ``lightning-distill cache merge``, makes one cache of the folders.

        Args:
            teacher: As in :meth:`build`.
            dataset: As in :meth:`build`, with a length.
            path: The folder of the part, on this machine.
            part: Which part, such as ``"3/16"`` for the third of sixteen.
            **settings: Those of :meth:`build`.

        Raises:
            CacheError: As in :meth:`build`.
            ValueError: If the part does not exist.
        """
        chosen, folder = Part.of(part), local_folder(path)
        names = ("dtype", "top_k", "sampled", "feature_dtype")
        storage = Storage(**{"dtype": "float16", **{name: settings.pop(name) for name in names if name in settings}})
        build(teacher, dataset, folder, storage=storage, part=chosen, **settings)

    @classmethod
    def merge(cls: type[Cache], path: str | PathLike[str], parts: Sequence[str | PathLike[str]]) -> Cache:
        """Make one cache of the folders of several parts, which stay as they are.

        Every file is compared with its checksum while it is copied. A merge that was stopped continues.

        Args:
            path: The folder of the merged cache.
            parts: The folders of the parts, in any order.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If the parts are not of one build, a shard is missing or differs between two parts, or a file is
                damaged; the message names the folder or the file.
            OSError: If the disk is full; shards that were copied stay.
        """
        with building(path) as folder:
            merge(folder, parts)
        return cls.open(path)

    @classmethod
    def from_arrays(
        cls: type[Cache],
        arrays: Any,
        path: str | PathLike[str],
        *,
        dataset: Any = None,
        teacher: nn.Module | None = None,
        top_k: int | None = None,
        dtype: str = "float16",
        sampled: int | None = None,
        feature_dtype: str | None = None,
        key: Key | None = None,
        keys: Sequence[Any] | None = None,
        mask: Mask | None = None,
        resume: bool = True,
        shard_bytes: int = 64 * 2**20,
    ) -> Cache:
        """Store outputs that exist already, such as those of another program.

        Args:
            arrays: The outputs, with a row for each item of the data, in their order: an array ``(N, ...)``, which may
                be memory-mapped, or a tensor; for sequences a list of arrays ``(T, ...)``, without padding. Or a dict
                of ``"output"`` and of names of layers to such arrays.
            path: The folder.
            dataset: The data. Some of their items are then compared with those of the training data; None compares
                their number alone.
            teacher: The teacher that the arrays come from, which :meth:`open` compares; None notes a digest of the
                arrays.
            top_k: As in :meth:`build`; the outputs must then be logits or log-probabilities.
            dtype: As in :meth:`build`.
            sampled: As in :meth:`build`; the outputs must then be logits or log-probabilities.
            feature_dtype: As in :meth:`build`.
            key: Where an item has its key, as in :meth:`build`.
            keys: The key of each row; None reads them from ``dataset``.
            mask: Where a batch keeps the mask of its tokens, for sequences. None is ``"attention_mask"``.
            resume: Whether a build that was begun, or is complete, is continued.
            shard_bytes: Approximate size of a shard.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If the arrays, the data and the keys do not fit each other, or the folder holds something else.
            ValueError: If the numbers do not fit the storage.
            OSError: If the disk is full; resuming completes the folder.

        Example:
            >>> import tempfile
            >>> from lightning_distill import TeacherCache
            >>> tokens = [torch.randn(5, 30), torch.randn(2, 30)]
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache = TeacherCache.from_arrays(tokens, folder, key="id", keys=["a", "b"])
            ...     cache.read([1])["output"].values.shape
            (2, 30)
        """
        imported = Imported(arrays, dataset, teacher, key, keys)
        with building(path) as folder:
            imported.write(folder, Storage(dtype, top_k, sampled, feature_dtype), mask, shard_bytes, resume)
        return cls.open(path, mask=mask, key=key)

    @classmethod
    def from_logprobs(
        cls: type[Cache],
        dataset: Any,
        path: str | PathLike[str],
        ask: Ask | str | PathLike[str],
        *,
        name: str,
        vocabulary: int,
        top_k: int,
        tokens: Tokens = "input_ids",
        key: Key | None = None,
        dtype: str = "float16",
        mask: Mask | None = None,
        token_id: TokenIds | None = None,
        temperature: float = 1.0,
        batch_size: int = 8,
        requests: int = 4,
        retries: int = 3,
        wait: float = 1.0,
        resume: bool = True,
        progress: bool = True,
        shard_bytes: int = 16 * 2**20,
    ) -> Cache:
        """Store the log-probabilities that a served model gives the tokens of each sample.

        Every answer is compared with the sample's tokens. Answers that are missing, late, cut off or of another sample
        are asked for again. Only whole shards count: a build that was stopped asks for the rest. The forms of an answer
        are in :mod:`distill_core.served`.

        Args:
            dataset: The data, map-style, with a length, tokenized with the served model's tokenizer.
            path: The folder.
            ask: Called with a list of questions, which have ``tokens``, ``key`` and ``index``; returns the answers. A
                :class:`distill_core.clients.CompletionsClient` asks a server; the path of a file of JSON lines reads
                answers from there.
            name: Name of the served model; a build that is resumed compares it.
            vocabulary: Number of the student's classes.
            top_k: How many of the likeliest tokens are kept at each position.
            tokens: Where a sample has its tokens: a column, an index, or a function of the sample. An
                ``attention_mask`` beside a column leaves out padding.
            key: Where a sample has its key, as in :meth:`build`.
            dtype: ``"float16"`` or ``"uint8"``, 8 bits linear in the log-probability.
            mask: Where a batch of the training keeps the mask of its tokens. None is ``"attention_mask"``.
            token_id: The id of a token that an answer names by its text, such as ``tokenizer.convert_tokens_to_ids``.
                None refuses such answers.
            temperature: Temperature of the served log-probabilities, which must be 1: the list of the likeliest tokens
                at another one does not tell how likely all others are.
            batch_size: Number of sequences in a request.
            requests: Number of requests at the same time.
            retries: How often a sequence is asked for again.
            wait: Seconds before the first repetition; each further one waits twice as long.
            resume: Whether a build that was begun, or is complete, is continued.
            progress: Whether to show a progress bar.
            shard_bytes: Approximate size of a shard.

        Returns:
            The cache, opened. The last position of a sequence is unknown, NaN, unless the answers have a generated
            token. No loss with ``shift=True`` reads it.

        Raises:
            CacheError: If answers stay missing or wrong, which names the samples; if a setting does not fit, or the
                folder holds something else.
            OSError: If the disk is full; resuming completes the folder.
        """
        if temperature != 1:
            raise CacheError(
                f"Expected `temperature` to be 1, but got temperature={temperature!r}. Ask for log-probabilities before"
                " the sampler's temperature, such as with logprobs_mode='raw_logprobs' in vLLM."
            )
        answers = Answers(
            JsonLines(ask) if isinstance(ask, (str, PathLike)) else ask,
            top_k=top_k,
            vocabulary=vocabulary,
            token_id=token_id,
            retries=retries,
            wait=wait,
        )
        served = ServedTeacher(
            dataset,
            answers,
            name=name,
            tokens=tokens,
            key=key,
            dtype=dtype,
            mask=mask,
            batch_size=batch_size,
            requests=requests,
            shard_bytes=shard_bytes,
        )
        with building(path) as folder:
            served.build(folder, resume=resume, progress=progress)
        return cls.open(path, mask=mask, key=key)

    @classmethod
    def from_predictions(
        cls: type[Cache], predict: Any, dataset: Any, path: str | PathLike[str], *, name: str, **settings: Any
    ) -> Cache:
        """Store the predictions of anything that is not a module: a function, an ONNX session, a scikit-learn model.

        Args:
            predict: A function from a NumPy array of inputs to an array of logits; an ``onnxruntime.InferenceSession``,
                whose first output counts; or an estimator of scikit-learn or with its API: the logarithms of
                ``predict_proba``, not below 1e-7, or else its ``predict``.
            dataset: The data, as in :meth:`build`.
            path: The folder.
            name: Name of the predictor; :meth:`open` and a build that is resumed compare it.
            **settings: Those of :meth:`build` but ``layers`` and ``device``.

        Returns:
            The cache, opened.

        Raises:
            CacheError: As in :meth:`build`.
            TypeError: If ``predict`` is none of these, or its predictions are not an array of numbers with a row for
                each input.

        Example:
            >>> import tempfile
            >>> from lightning_distill import TeacherCache
            >>> data = torch.utils.data.TensorDataset(torch.arange(6.0).view(3, 2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache = TeacherCache.from_predictions(
            ...         lambda x: -x, data, folder, name="minus", dtype="float32", progress=False
            ...     )
            ...     cache.read([2])["output"]
            array([[-4., -5.]], dtype=float32)
        """
        return cls.build(Predictor(predict, name), dataset, path, **settings)
