"""Texts, windows, digests and their errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from surgeon import data
from surgeon.errors import DataError


class Characters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


TOKENIZER = Characters()


def read(path: Path | str, split: str = "train") -> str:
    return "".join(chr(i) for i in data.token_ids(str(path), split, TOKENIZER))


def test_embedded_text_has_both_splits() -> None:
    train, test = read("wiki-mini"), read("wiki-mini", "test")
    assert train.startswith(" = Anarchism =")
    assert len(train) > 2_000_000
    assert 250_000 < len(test) < 300_000


def test_local_formats_give_the_same_text(tmp_path: Path) -> None:
    texts = ["first\nline", "zweite — Zeile"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n\n", encoding="utf-8")
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.jsonl") == read(tmp_path / "a.parquet") == "\n\n".join(texts)


def test_tokens_from_safetensors_need_no_tokenizer(tmp_path: Path) -> None:
    save_file({"tokens": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)}, tmp_path / "t.safetensors")
    assert data.token_ids(str(tmp_path / "t.safetensors"), "test", None).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"\xff\xfe\x00bad", "UTF-8"),
        ("a.jsonl", b'{"text": "x"}\nnope\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: there is no string under 'text'"),
        ("a.jsonl", b"[1]\n", "line 1: there is no string"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet"),
        ("a.safetensors", b"\x00" * 20, "not a readable safetensors"),
        ("a.csv", b"x", "unknown data"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.token_ids(str(tmp_path / name), "train", TOKENIZER)


def test_missing_files_and_columns(tmp_path: Path) -> None:
    for name in ("no.txt", "no.jsonl", "no.parquet", "no.safetensors"):
        with pytest.raises(DataError, match=r"no file|not a readable"):
            data.token_ids(str(tmp_path / name), "train", TOKENIZER)
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no column 'text': it has body"):
        read(tmp_path / "b.parquet")
    save_file({"tokens": torch.randn(4)}, tmp_path / "f.safetensors")
    with pytest.raises(DataError, match="integer tensor"):
        data.token_ids(str(tmp_path / "f.safetensors"), "train", None)
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(DataError, match="no tokenizer"):
        data.token_ids(str(tmp_path / "t.txt"), "train", None)


def test_calibration_windows_follow_the_protocol() -> None:
    ids = torch.arange(500)
    found = data.calibration_windows(ids, source="s", samples=7, length=16, seed=5)
    starts = random.Random(5).sample(range(500 - 16), 7)
    assert found.ids[:, 0].tolist() == starts
    assert (found.ids == found.ids[:, :1] + torch.arange(16)).all()
    again = data.calibration_windows(ids, source="s", samples=7, length=16, seed=5)
    other = data.calibration_windows(ids, source="s", samples=7, length=16, seed=6)
    assert found.digest == again.digest != other.digest
    assert data.Windows(found.ids.reshape(14, 8), "s").digest != found.digest


def test_test_windows_lie_side_by_side() -> None:
    found = data.test_windows(torch.arange(100), source="s", length=16, samples=None)
    assert (len(found), found.length) == (6, 16)
    assert found.ids.flatten().tolist() == list(range(96))
    assert len(data.test_windows(torch.arange(100), source="s", length=16, samples=2)) == 2


def test_too_short_texts_are_refused() -> None:
    with pytest.raises(DataError, match="too short: 20 tokens hold no 5 distinct windows of 16"):
        data.calibration_windows(torch.arange(20), source="s", samples=5, length=16, seed=0)
    with pytest.raises(DataError, match="too short"):
        data.test_windows(torch.arange(10), source="s", length=16, samples=None)
    with pytest.raises(DataError, match="6 windows of 16, 7 needed"):
        data.test_windows(torch.arange(100), source="s", length=16, samples=7)


def test_foreign_tokens_are_refused() -> None:
    found = data.test_windows(torch.arange(100), source="s", length=16, samples=None)
    found.check_vocabulary(96)
    with pytest.raises(DataError, match="holds token 95, the model's vocabulary has 90"):
        found.check_vocabulary(90)


def test_batches_cover_all_windows_in_order() -> None:
    found = data.Windows(torch.arange(35).reshape(7, 5), "s")
    for batch_tokens, sizes in ((1, [1] * 7), (10, [2, 2, 2, 1]), (999, [7])):
        batches = list(found.batches(batch_tokens))
        assert [len(b.ids) for b in batches] == sizes
        assert torch.cat([b.ids for b in batches]).equal(found.ids)
        assert [b.first for b in batches] == [sum(sizes[:i]) for i in range(len(sizes))]


def test_hub_names_parse() -> None:
    assert data.parse_hub("wikitext2")[:3] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "text")
    assert data.parse_hub("hub:org/name") == ("org/name", None, "text", None)
    assert data.parse_hub("hub:org/name:conf:body") == ("org/name", "conf", "body", None)
    for bad in ("hub:", "hub:a:b:c:d"):
        with pytest.raises(DataError):
            data.parse_hub(bad)


def test_hub_text_goes_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real users' path, with the one call that needs the network replaced."""
    import datasets

    calls: list[tuple[object, ...]] = []

    def load(repository: str, configuration: str | None, **options: object) -> dict[str, list[str]]:
        calls.append((repository, configuration, options["split"]))
        return {"text": ["a", "", "b", None]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("wikitext2", "test") == "a\n\n\n\nb"
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]

    def offline(*_a: object, **_o: object) -> None:
        raise ConnectionError("no route to the hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"no route to the hub\); a local"):
        read("hub:some/data")
