"""The whole id space: every layout, modality and shape comes back, and Hugging Face's tokenizers know every id."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bridle.cli import main
from bridle.tokens.layouts import TokenError, Vocabulary
from bridle.tokens.text import bare_tokenizer, extend, read_tokenizer, tokenizer_files
from bridle.tokens.vocabulary import ALL_LAYOUTS, IdSpace, ModalityTokens, id_space, id_space_from_json

MODALITIES = ("audio", "image", "video")


@st.composite
def spaces(draw: st.DrawFn) -> IdSpace:
    blocks = {}
    for name in draw(st.lists(st.sampled_from(MODALITIES), min_size=1, unique=True)):
        books, layout = draw(st.integers(1, 4)), draw(st.sampled_from(ALL_LAYOUTS))
        delays = st.none() | st.lists(st.integers(0, 3), min_size=books, max_size=books).map(tuple)
        marks = layout in ("interleaved", "delay") and draw(st.booleans())
        blocks[name] = ModalityTokens(
            Vocabulary(books, draw(st.integers(1, 40)), marks=draw(st.integers(1, 5)) if marks else 0),
            layout,
            draw(delays) if layout in ("delay", "parallel") else None,
            draw(st.floats(0.05, 3.0)) if marks else None,
        )
    return id_space(blocks, draw(st.integers(0, 100_000)))


@given(space=spaces(), data=st.data())
def test_documents_of_every_layout_modality_and_shape_come_back(space: IdSpace, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(space.modalities)))
    tokens = space.of(name)
    steps, across = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    shape = (steps * across, tokens.ids.codebooks)
    codes = data.draw(arrays(np.int64, shape, elements=st.integers(0, tokens.ids.codebook_size - 1)))
    duration = data.draw(st.none() | st.floats(0.01, 30.0))
    ids = tokens.encode(codes, {"time": steps, "frequency": across}, duration)
    assert (tokens.decode(ids) == codes).all()
    assert ids.min() >= tokens.ids.offset >= space.text
    assert ids.max() < tokens.ids.offset + tokens.ids.size <= space.pad
    if tokens.layout != "parallel":
        at = data.draw(st.integers(0, len(ids) - 1))
        with pytest.raises(TokenError, match=r"position|expected|stands"):
            tokens.decode(np.concatenate([ids[:at], [space.pad], ids[at + 1 :]]))


@given(space=spaces())
def test_the_json_says_all_of_it(space: IdSpace) -> None:
    raw = json.loads(json.dumps(space.as_json()))
    assert id_space_from_json(raw, "v.json") == space
    assert len(space.added_tokens()) == space.size - space.text == len(set(space.added_tokens()))
    first = raw["modalities"][0]
    for change in (
        {**raw, "version": 2},
        {**raw, "size": raw["size"] + 1},
        {**raw, "modalities": [{**first, "offset": first["offset"] + 1}, *raw["modalities"][1:]]},
        {**raw, "modalities": [{**first, "codebooks": first["codebooks"] + 1}, *raw["modalities"][1:]]},
        {key: value for key, value in raw.items() if key != "text"},
        [],
    ):
        with pytest.raises(TokenError, match=r"v\.json"):
            id_space_from_json(change, "v.json")


def test_time_marks_stand_before_the_steps_that_begin_their_second() -> None:
    tokens = id_space({"audio": ModalityTokens(Vocabulary(2, 10, marks=8), mark_s=1.0)}, 100).of("audio")
    codes = np.zeros((10, 2), np.int64)  # 5 steps of 0.5 s, two positions each
    ids = tokens.encode(codes, {"time": 5, "frequency": 2}, 2.5).tolist()
    first = tokens.ids.mark(0)
    step = [100, 110] * 2
    assert ids == [tokens.ids.begin, first, *step, *step, first + 1, *step, *step, first + 2, *step, tokens.ids.end]
    moved = [*ids[:2], ids[2], first + 1, *ids[3:]]
    with pytest.raises(TokenError, match=r"position 3: time mark .* stands where none belongs"):
        tokens.decode(moved)


def test_tokenizers_give_the_ids_of_the_vocabulary(text_tokenizer: Path, tmp_path: Path) -> None:
    import transformers

    for text in (None, read_tokenizer(str(text_tokenizer))):
        blocks = {
            "audio": ModalityTokens(Vocabulary(2, 12, marks=3), mark_s=0.5),
            "image": ModalityTokens(Vocabulary(3, 7), "delay"),
        }
        space = id_space(blocks, text.get_vocab_size() if text else 0)
        folder = tmp_path / ("with" if text else "without")
        folder.mkdir()
        for name, content in tokenizer_files(extend(text or bare_tokenizer(), space)).items():
            (folder / name).write_bytes(content)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        assert len(tokenizer) == space.size
        assert tokenizer.pad_token_id == space.pad
        assert tokenizer.convert_tokens_to_ids(space.added_tokens()) == list(range(space.text, space.size))
        names = space.added_tokens()
        for name in blocks:
            tokens = space.of(name)
            codes = np.random.default_rng(0).integers(0, tokens.ids.codebook_size, (9, tokens.ids.codebooks))
            ids = tokens.encode(codes, {"time": 9}, 2.0).tolist()
            joined = "".join(names[token - space.text] for token in ids)
            assert tokenizer(joined)["input_ids"] == ids
            assert (tokens.decode(tokenizer(joined)["input_ids"]) == codes).all()
    with pytest.raises(TokenError, match="ids"):
        extend(read_tokenizer(str(text_tokenizer)), id_space({"audio": ModalityTokens(Vocabulary(1, 2))}, 5))


def test_one_id_space_is_shared_by_three_modalities(
    models: dict[str, Path], text_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shared"
    command = ["vocabulary", *(str(models[name]) for name in MODALITIES), "--out", str(out)]
    assert main([*command, "--tokenizer", str(text_tokenizer)]) == 0
    said = capsys.readouterr().out
    assert "text: ids 0 to 269" in said
    space = id_space_from_json(json.loads((out / "vocabulary.json").read_text()), "v")
    for name in ("image", "audio"):
        codes = tmp_path / name
        arguments = [f"builtin:{name}-heldout", "--out", str(codes), "--vocabulary", str(out / "vocabulary.json")]
        assert main(["tokenize", str(models[name]), *arguments, "--workers", "0"]) == 0
        assert json.loads((codes / "vocabulary.json").read_text()) == space.as_json()
        assert json.loads((codes / "job.json").read_text())["settings"]["offset"] == space.of(name).ids.offset
    other = [str(models["audio"]), "builtin:audio-heldout", "--out", str(tmp_path / "x"), "--workers", "0"]
    file = str(out / "vocabulary.json")
    for more, said in [
        (["--vocabulary", file, "--layout", "delay"], "leave that option out"),
        (["--vocabulary", str(tmp_path / "none.json")], "no such file"),
        (["--tokenizer", str(text_tokenizer), "--offset", "5"], "leave --offset out"),
        (["--tokenizer", str(tmp_path)], "no tokenizer.json there"),
    ]:
        assert main(["tokenize", *other, *more]) in (1, 2)
        assert said in capsys.readouterr().err
