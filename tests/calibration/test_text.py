from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from quantkit.calibration.data import InputSpec, open_calibration
from quantkit.calibration.text import load_tokenizer, text_samples
from quantkit.errors import InputError

VOCABULARY = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "one": 3, "two": 4, "three": 5, "four": 6, "[PAD]": 7}


def model(*names: str, length: int | str = "seq", dtype: type = np.int64) -> list[InputSpec]:
    return [InputSpec(name, np.dtype(dtype), ("batch", length)) for name in names]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """[CLS] words [SEP], and settings for truncation and padding that must not count."""
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    made.enable_truncation(3)
    made.enable_padding(length=40, pad_id=7, pad_token="[PAD]")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    made.save(str(path))
    return path


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_ids_mask_types_and_positions(tmp_path: Path, tokenizer: Path) -> None:
    path = write(tmp_path, "one two\n\n  four three two what  \n")
    inputs = model("position_ids", "input_ids", "attention_mask", "token_type_ids")
    data = open_calibration(path, inputs, tokenizer=tokenizer)
    (feed,) = list(data)
    assert list(feed) == ["position_ids", "input_ids", "attention_mask", "token_type_ids"]
    assert feed["input_ids"].tolist() == [[0, 3, 4, 1, 7, 7], [0, 6, 5, 4, 2, 1]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert feed["token_type_ids"].tolist() == [[0] * 6] * 2
    assert feed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert data.description == "2 samples of text.txt, tokenizer tokenizer.json"


def test_a_folder_that_holds_the_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    feed = next(iter(open_calibration(write(tmp_path, "one"), model("x"), tokenizer=tokenizer.parent)))
    assert feed["x"].tolist() == [[0, 3, 1]]


def test_each_batch_is_padded_to_its_own_longest_line(tmp_path: Path) -> None:
    path = write(tmp_path, "ab\nabc\nabcdef\n")
    feeds = list(open_calibration(path, model("input_ids"), tokenizer="byte", batch_size=2))
    assert [feed["input_ids"].shape for feed in feeds] == [(2, 3), (1, 6)]
    assert feeds[0]["input_ids"].tolist() == [[97, 98, 0], [97, 98, 99]]


def test_a_fixed_length_truncates_and_pads(tmp_path: Path, tokenizer: Path) -> None:
    path = write(tmp_path, "one\none two three four\n")
    inputs = model("input_ids", "attention_mask", length=4, dtype=np.int32)
    feed = next(iter(open_calibration(path, inputs, tokenizer=tokenizer)))
    assert feed["input_ids"].tolist() == [[0, 3, 1, 7], [0, 3, 4, 1]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert feed["input_ids"].dtype == np.int32


def test_lines_are_cut_at_512_tokens_by_default(tmp_path: Path) -> None:
    path = write(tmp_path, "é" * 400)  # two bytes each
    assert next(iter(open_calibration(path, model("ids"), tokenizer="byte")))["ids"].shape == (1, 512)
    assert next(iter(text_samples(path, model("ids"), "byte", max_length=9).read([[0]])))["ids"].shape == (1, 9)


def test_headings_and_lines_of_unusual_length_are_left_out(tmp_path: Path) -> None:
    good = "nine words are enough to be a fine sample"
    path = write(tmp_path, f" = A heading of quite a few words here = \n\ntoo short\n{good}\n{'long ' * 65}\n")
    data = open_calibration(path, model("ids"), tokenizer="byte")
    assert [bytes(row.tolist()).decode() for feed in data for row in feed["ids"]] == [good]
    assert len(text_samples(path, model("ids"), "byte", min_words=1, max_words=100)) == 3


def test_slice_over_the_lines_that_count(tmp_path: Path) -> None:
    path = write(tmp_path, "a\n\nb\nc\nd\n")
    data = open_calibration(f"{path}@1:3", model("ids"), tokenizer="byte")
    assert next(iter(data))["ids"].tolist() == [[98], [99]]


def test_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfab\r\ncd\r\n")
    assert next(iter(open_calibration(path, model("ids"), tokenizer="byte")))["ids"].tolist() == [[97, 98], [99, 100]]


def test_names_as_tensorflow_exports_them(tmp_path: Path) -> None:
    inputs = model("input_ids:0", "input_mask:0", "segment_ids:0")
    feed = next(iter(open_calibration(write(tmp_path, "ab"), inputs, tokenizer="byte")))
    assert feed["input_mask:0"].tolist() == [[1, 1]]


def test_padding_is_looked_up_when_the_file_has_no_settings(tmp_path: Path) -> None:
    plain = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    plain.save(str(tmp_path / "plain.json"))
    assert load_tokenizer(tmp_path / "plain.json").padding == VOCABULARY["[PAD]"]
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    bare.save(str(tmp_path / "bare.json"))
    assert load_tokenizer(tmp_path / "bare.json").padding == 0


def test_inputs_that_text_cannot_fill(tmp_path: Path) -> None:
    told = r"text cannot fill input 'past_key', 'image'; it can fill input_ids, .*; give feeds instead"
    with pytest.raises(InputError, match=told):
        open_calibration(write(tmp_path, "a"), model("input_ids", "past_key", "image"), tokenizer="byte")


def test_different_fixed_lengths(tmp_path: Path) -> None:
    inputs = [*model("input_ids", length=4), *model("attention_mask", length=5)]
    with pytest.raises(InputError, match=r"different sequence lengths: input_ids int64 \[batch, 4\], attention_mask"):
        open_calibration(write(tmp_path, "a"), inputs, tokenizer="byte")


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"text\.txt is text, which needs --tokenizer: a tokenizer.json"):
        open_calibration(write(tmp_path, "a"), model("ids"))


def test_missing_and_broken_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer .*no\.json does not exist; give a tokenizer.json"):
        load_tokenizer(tmp_path / "no.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer .*broken\.json cannot be read: "):
        load_tokenizer(tmp_path / "broken.json")


def test_without_the_tokenizers_package(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"needs tokenizers: pip install quantkit\[text\]"):
        load_tokenizer(tokenizer)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"text\.txt, line 2 is not UTF-8 text"):
        open_calibration(path, model("ids"), tokenizer="byte")


def test_text_without_lines(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"text\.txt: it holds no samples; calibration needs at least one"):
        open_calibration(write(tmp_path, "\n  \n"), model("ids"), tokenizer="byte")
