"""`bridle vocabulary MODEL_DIR … --out FILE`: one id space for several models' codes, beside a text vocabulary."""

from __future__ import annotations

import argparse

HELP = "write one id space for the codes of several models, and a tokenizer that knows them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    from bridle.commands.tokenize_bulk import add_vocabulary_arguments

    parser.add_argument("models", metavar="MODEL_DIR", nargs="+", help="model folders, one of each modality")
    add_vocabulary_arguments(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="write vocabulary.json and tokenizer/ there")


def run(args: argparse.Namespace) -> int:
    """Writes the id space and prints where each modality's ids lie.

    Raises:
        RecipeError, TokenError: settings or models that do not go together.
        OSError: it cannot be written.
    """
    from bridle.model_folder import load
    from bridle.tokens.bulk import TOKENIZER, VOCABULARY, Settings, tokenizer_of, vocabulary_of
    from bridle.tokens.store import Store
    from bridle.tokens.text import read_tokenizer

    settings = Settings(
        layout=args.layout, delays=args.delays, mark_s=args.time_marks, tokenizer=args.tokenizer, offset=args.offset
    )
    tokenizer = read_tokenizer(args.tokenizer) if args.tokenizer else None
    space = vocabulary_of([load(folder) for folder in args.models], settings, tokenizer)
    store = Store(args.out)
    for name, content in tokenizer_of(space, tokenizer).items():
        store.put_bytes(f"{TOKENIZER}/{name}", content)
    store.put_json(VOCABULARY, space.as_json())
    print(f"text: ids 0 to {space.text - 1}" if space.text else "text: none")
    for name, tokens in space.modalities.items():
        ids = tokens.ids
        print(
            f"{name}: ids {ids.offset} to {ids.offset + ids.size - 1}, {ids.codebooks} codebooks of {ids.codebook_size}"
        )
    print(f"padding: {space.pad}; {space.size} ids in all, written to {store.shown(VOCABULARY)}")
    return 0
