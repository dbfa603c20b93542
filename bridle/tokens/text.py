"""Text tokenizers: a Hugging Face tokenizer that knows the codes' tokens, and text to ids for mixed documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from bridle.tokens.layouts import Ids, TokenError
from bridle.tokens.vocabulary import PAD, IdSpace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = "tokenizer.json"


def read_tokenizer(source: str) -> Tokenizer:
    """A Hugging Face tokenizer: its ``tokenizer.json``, the folder that holds it, or a hub id (``owner/name``).

    Raises:
        TokenError: nothing there, not a fast tokenizer's file, or the library is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TokenError("text needs the tokenizers library; pip install 'bridle[tokens]'") from None
    path = Path(source)
    file = path / FILES if path.is_dir() else path
    try:
        if file.is_file():
            return _unbounded(Tokenizer.from_file(str(file)))
        if path.exists() or source.count("/") != 1 or source.startswith("."):
            raise TokenError(f"tokenizer {source}: no {FILES} there; give the file, its folder or a hub id")
        return _unbounded(Tokenizer.from_pretrained(source))
    except TokenError:
        raise
    except Exception as error:  # the library raises bare Exception for whatever it finds
        reason = " ".join(str(error).split())[:300]
        raise TokenError(f"tokenizer {source}: cannot be read ({reason}); expected a Hugging Face {FILES}") from None


def _unbounded(tokenizer: Tokenizer) -> Tokenizer:
    """Without truncation and padding, which some files ask for: pieces of a document keep their own length."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def text_size(tokenizer: Tokenizer) -> int:
    """Where added tokens begin: ids of the text vocabulary, those added earlier included."""
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def bare_tokenizer() -> Tokenizer:
    """A tokenizer without any text: its only tokens are those that are added."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel(vocab={}, unk_token=PAD))


def extend(tokenizer: Tokenizer, space: IdSpace) -> Tokenizer:
    """Adds the id space's tokens, and checks that each got its id.

    Raises:
        TokenError: the tokenizer has another number of ids than `space.text`, or some of the tokens already.
    """
    from tokenizers import AddedToken

    if text_size(tokenizer) != space.text:
        raise TokenError(
            f"the text tokenizer has {text_size(tokenizer)} ids, the vocabulary was made for {space.text}; "
            "use the tokenizer it was made with"
        )
    tokens = space.added_tokens()
    known = [token for token in tokens if tokenizer.token_to_id(token) is not None]
    if known:
        raise TokenError(f"the text tokenizer already has {len(known)} of the tokens, such as {known[0]}")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    for number in (0, len(tokens) - 1):
        found = tokenizer.token_to_id(tokens[number])
        if found != space.text + number:
            raise TokenError(f"{tokens[number]}: got id {found}, expected {space.text + number}; its ids have gaps")
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a folder that ``transformers.AutoTokenizer`` and ``PreTrainedTokenizerFast`` load."""
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "clean_up_tokenization_spaces": False}
    return {
        FILES: tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(about, indent=2) + "\n").encode(),
    }


def text_ids(tokenizer: Tokenizer, text: str) -> Ids:
    """A piece of text as ids, int64 ``[L]``; nothing is put around it."""
    import numpy as np

    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
