"""The example's text: the same bytes everywhere, and clear errors for bad input."""

from pathlib import Path

import pytest

from corpus import ByteCorpus, CorpusError, load_text


def test_the_default_corpus_is_the_same_each_time() -> None:
    text = load_text(None)
    assert text == load_text(None)
    assert b"import" in text and len(text) > 1 << 20


def test_an_item_is_a_sequence_and_the_same_moved_by_one() -> None:
    corpus = ByteCorpus(b"abcdefghi", sequence_length=4)
    assert len(corpus) == 2
    x, y = corpus[1]
    assert bytes(x.tolist()) == b"efgh" and bytes(y.tolist()) == b"fghi"


def test_a_folder_is_read_in_the_order_of_names_without_binaries(
    tmp_path: Path,
) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {"b": b"2", "a": b"1", ".hidden": b"x", "bin": b"\0"}.items():
        (tmp_path / name).write_bytes(text)
    (tmp_path / "sub" / "c").write_bytes(b"3")
    assert load_text(tmp_path) == b"123"


@pytest.mark.parametrize("kind", ["missing", "empty file", "empty folder"])
def test_a_path_without_text_is_an_error_that_names_it(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "corpus"
    if kind == "empty file":
        path.touch()
    elif kind == "empty folder":
        path.mkdir()
    with pytest.raises(CorpusError) as caught:
        load_text(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_text_shorter_than_a_sequence_is_an_error() -> None:
    ByteCorpus(b"x" * 129, sequence_length=128)
    with pytest.raises(CorpusError):
        ByteCorpus(b"x" * 128, sequence_length=128)
