"""A small causal transformer learns the codes of sounds: is the stream that BRIDLE writes learnable?

    bridle tokenize MODEL_DIR builtin:audio --out CODES --files-per-output 64
    bridle tokenize MODEL_DIR builtin:audio-heldout --out HELDOUT
    bridle pack CODES --length 512 --out PACKED
    python examples/llm_from_tokens.py PACKED HELDOUT --out LLM

Trains with transformers' own Trainer on PACKED and prints, for HELDOUT, perplexities a code: the model's, the unigram's
(how frequent each code of a codebook is), and the unigram's given the position (frequency band and codebook). Then it
lets the model go on from the first half of a held-out sound, and checks that what it writes decodes to codes.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from bridle.tokens.corpus import Corpus, Row
from bridle.tokens.vocabulary import IdSpace, ModalityTokens, id_space_from_json


def main() -> None:
    arguments = parse()
    transformers.set_seed(0)
    folder = Path(arguments.packed)
    space = id_space_from_json(json.loads((folder / "vocabulary.json").read_text()), str(folder))
    rows = datasets.load_dataset(arguments.packed, split="train").with_format("torch")
    heldout = Corpus(arguments.heldout)
    model = new_model(space, length=len(rows[0]["input_ids"]))
    train(model, rows, arguments)
    figures = evaluate(model, rows, heldout)
    figures["generated_codes"] = generate(model, heldout)
    print(json.dumps(figures, indent=1))
    Path(arguments.out, "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("packed", help="folder that `bridle pack` wrote")
    parser.add_argument("heldout", help="folder that `bridle tokenize --out` wrote, of other files")
    parser.add_argument("--out", default="runs/llm", help="where the Trainer keeps its model (default: runs/llm)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    return parser.parse_args()


def new_model(space: IdSpace, length: int) -> Any:
    """A GPT-2 of 4 layers of width 128, whose vocabulary is the id space."""
    config = transformers.GPT2Config(
        vocab_size=space.size, n_positions=length, n_embd=128, n_layer=4, n_head=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=space.pad, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def train(model: Any, rows: Any, arguments: argparse.Namespace) -> None:
    """`labels` hold -100 in the padding, so it teaches nothing; `position_ids` begin at 0 in each document."""
    settings = transformers.TrainingArguments(
        output_dir=arguments.out, max_steps=arguments.steps, per_device_train_batch_size=arguments.batch,
        learning_rate=2e-3, warmup_steps=arguments.steps // 10, lr_scheduler_type="cosine", weight_decay=0.01,
        logging_steps=50, save_strategy="no", report_to=[], seed=0, dataloader_num_workers=0, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    columns = rows.select_columns(["input_ids", "labels", "position_ids"])
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=columns)
    trainer.train()
    trainer.save_model(arguments.out)
    model.eval()


@torch.no_grad()
def evaluate(model: Any, rows: Any, heldout: Corpus) -> dict[str, float]:
    """Perplexities a code on held-out sounds, begin and end tokens not counted; how often the likeliest id is of the
    codebook whose turn it is."""
    tokens, bands = heldout.tokens, bands_of(heldout)
    books, size = tokens.ids.codebooks, tokens.ids.codebook_size
    counts = np.ones((bands, books, size))  # one more of each, so that nothing is impossible
    for row in rows:
        for document in np.split(row["input_ids"].numpy(), np.cumsum(row["lengths"].numpy())[:-1]):
            codes = codes_of(tokens, document)
            for book in range(books):
                np.add.at(counts[:, book], (np.arange(len(codes)) % bands, codes[:, book]), 1)
    given = np.log(counts / counts.sum(-1, keepdims=True))
    alone = np.log(counts.sum(0) / counts.sum((0, 2))[:, None])
    sums, total, in_layout = np.zeros(3), 0, 0
    length = model.config.n_positions
    for row in heldout:
        assert row.ids is not None
        ids = row.ids[:length]
        inputs = torch.from_numpy(ids)[None].to(model.device)
        logs = model(inputs).logits[0, :-1].float().log_softmax(-1).cpu().numpy()
        place = np.arange(len(ids) - 2)
        code = ids[1:-1] - tokens.ids.offset
        at, book = place // books, place % books
        sums += (
            logs[place, ids[1:-1]].sum(),
            alone[book, code - book * size].sum(),
            given[at % bands, book, code - book * size].sum(),
        )
        total += len(code)
        in_layout += int(((logs[place].argmax(-1) - tokens.ids.offset) // size == book).sum())
    model_ppl, unigram, positional = (math.exp(-value / total) for value in sums)
    return {
        "perplexity": model_ppl,
        "unigram": unigram,
        "unigram_given_position": positional,
        "share_in_layout": in_layout / total,
        "codes": total,
    }


def codes_of(tokens: ModalityTokens, document: np.ndarray) -> np.ndarray:
    """Codes [N, M] of a document or the beginning or rest of one: whole positions only."""
    ids = document[(document >= tokens.ids.offset) & (document < tokens.ids.hole)]
    first = next((i for i, token in enumerate(ids) if token - tokens.ids.offset < tokens.ids.codebook_size), len(ids))
    whole = ids[first : first + (len(ids) - first) // tokens.ids.codebooks * tokens.ids.codebooks]
    return tokens.ids.unflatten(whole)


def bands_of(corpus: Corpus) -> int:
    """Positions of one step in time."""
    row: Row = next(iter(corpus))
    return len(row.codes) // next(iter(row.grid.values()))


@torch.no_grad()
def generate(model: Any, heldout: Corpus) -> int:
    """Goes on from the first half of a held-out sound; how many positions of valid codes came out."""
    tokens = heldout.tokens
    row = next(iter(heldout))
    assert row.ids is not None
    half = 1 + len(row.codes) // 2 * tokens.ids.codebooks
    half = min(half, 1 + (model.config.n_positions // 2) // tokens.ids.codebooks * tokens.ids.codebooks)
    prompt = torch.from_numpy(row.ids[:half])[None].to(model.device)
    limit = min(40 * tokens.ids.codebooks, model.config.n_positions - half)
    size, books = tokens.ids.codebook_size, tokens.ids.codebooks

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        """The codes of the codebook whose turn it is, and between two positions the end of the stream."""
        book = (len(ids) - 1) % books
        first = tokens.ids.offset + book * size
        return [*range(first, first + size), *([tokens.ids.end] if book == 0 else [])]

    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=True,
        eos_token_id=tokens.ids.end, prefix_allowed_tokens_fn=allowed,
    )[0].tolist()  # fmt: skip
    stream = found[1:-1] if found[-1] == tokens.ids.end else found[1:]
    codes = tokens.ids.unflatten(np.array(stream[: len(stream) // books * books]))
    return len(codes) - (half - 1) // books


if __name__ == "__main__":
    main()
