"""The bytes of text that each token of a tokenizer stands for. No framework is imported."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE = "Ab  c\n\td, e."  # capitals and white space, which some normalizers change
_UNLIMITED = 10**9  # transformers writes a larger number where it knows no limit
_FAST = "Pass transformers.AutoTokenizer.from_pretrained(...), or a tokenizers.Tokenizer."


class TokenBytes:
    """Reads the bytes of each token from the vocabulary of a tokenizer.

    Offsets into the text are not used: they count characters, of which a token may hold a part, and some tokenizers cut
    white space off them. The bytes of all tokens of a text, one after the other, are the text itself, possibly behind a
    space that the tokenizer puts in front. A tokenizer for which this is not so is refused.

    Args:
        name: Name of the argument, for messages.
        tokenizer: A ``tokenizers.Tokenizer``, or a tokenizer of transformers that wraps it. It is copied, so that
            padding and truncation that are set later change nothing.

    Attributes:
        vocabulary: Numbers of the tokens, by their names.
        pieces: Bytes of each token, by its number; empty for special tokens.
        sizes: Number of bytes of each token, shape ``(V,)``.
        special: Names of the special tokens, by their numbers.
        roles: Numbers of the tokens for the beginning and the end of a text, under ``"bos"`` and ``"eos"``, if known.
        prefix: Special tokens that the tokenizer puts in front of a text.
        adds_space: Whether it puts a space in front of a text.
        classes: The least number of classes of a model of the tokenizer, all of whose tokens but special ones count.
        max_length: The largest number of tokens that the model of the tokenizer reads, if it is known.

    Raises:
        TypeError: If it is not such a tokenizer.
        ValueError: If its tokens do not spell a text.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        self._backend = _backend_of(name, tokenizer)
        self.vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        self.special = {number: token.content for number, token in added.items() if token.special}
        decoders = _kinds(json.loads(self._backend.decoder.__getstate__())) if self._backend.decoder else []
        spell = _of_byte_alphabet if "ByteLevel" in decoders else _of_characters
        count = max(self.vocabulary.values(), default=-1) + 1
        self.pieces = [b""] * count
        for token, number in self.vocabulary.items():
            if "ByteFallback" in decoders and _BYTE.fullmatch(token):
                self.pieces[number] = bytes.fromhex(token[3:5])
                self.special.pop(number, None)
            elif number not in self.special:
                self.pieces[number] = token.encode() if number in added else spell(token)
        self.sizes: NDArray[np.int64] = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        self.classes = int(np.flatnonzero(self.sizes).max(initial=-1)) + 1
        numbers = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos")}
        self.roles = {role: number for role, number in numbers.items() if isinstance(number, int)}
        longest = getattr(tokenizer, "model_max_length", None)
        self.max_length = int(longest) if isinstance(longest, int) and longest < _UNLIMITED else None
        plain, whole = (self._backend.encode(_PROBE, add_special_tokens=special).ids for special in (False, True))
        self.prefix = whole[: next((place for place, number in enumerate(whole) if number in plain[:1]), 0)]
        spelled = self.spell(plain)
        self.adds_space = spelled == b" " + _PROBE.encode()
        if not self.adds_space and spelled != _PROBE.encode():
            raise ValueError(
                f"Expected the tokens of `{name}` to spell the text, but got {spelled.decode(errors='replace')!r} for"
                f" {_PROBE!r}. Spans are aligned by bytes, so pass a byte-level tokenizer, or a SentencePiece tokenizer"
                " that keeps capitals and white space."
            )

    def spell(self, numbers: Sequence[int]) -> bytes:
        """The bytes of several tokens, one after the other."""
        return b"".join(map(self.pieces.__getitem__, numbers))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without special tokens around it; their names within it are plain text."""
        self._backend.encode_special_tokens = True  # copies of a tokenizer forget it
        return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def sizes_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of bytes of each token; 0 for numbers that the tokenizer does not know.

        Args:
            numbers: Any shape.
        """
        known = (numbers >= 0) & (numbers < len(self.sizes))
        sizes: NDArray[np.int64] = np.where(known, self.sizes[np.where(known, numbers, 0)], 0)
        return sizes


def _backend_of(name: str, tokenizer: Any) -> Any:
    """A copy of the tokenizer of the library tokenizers, without padding and truncation."""
    if tokenizer is None or isinstance(tokenizer, (str, type)):
        got = f"{name}={tokenizer!r}" if not isinstance(tokenizer, type) else f"the class {tokenizer.__name__}"
        raise TypeError(f"Expected `{name}` to be a tokenizer, but got {got}. {_FAST}")
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not all(hasattr(backend, method) for method in ("encode_batch_fast", "get_added_tokens_decoder", "decoder")):
        raise TypeError(
            f"Expected `{name}` to be a fast tokenizer, of the library tokenizers, but got"
            f" {type(tokenizer).__name__}, which does not say which bytes its tokens stand for. {_FAST}"
        )
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _kinds(decoder: dict[str, Any]) -> list[str]:
    return [decoder["type"], *(kind for inner in decoder.get("decoders", []) for kind in _kinds(inner))]


def _of_characters(token: str) -> bytes:
    return token.replace(_SPACE, " ").encode()


def _of_byte_alphabet(token: str) -> bytes:
    try:
        return bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:  # not written in the alphabet
        return token.encode()


def _alphabet() -> dict[str, int]:
    """The bytes that byte-level tokenizers write as one printable character each."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _alphabet()
