"""Which files and which rows of them are a data set: saved folders, compressed files, splits, samples."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import alpaca_rows, write_jsonl

from dataflex_pipeline.data import DataSettings, scan_sources
from dataflex_pipeline.data.sources.folders import split_by_name
from dataflex_pipeline.data.sources.readers import read_rows
from dataflex_pipeline.errors import DataError


def scan(folder: Path, *names: str, **more):
    return scan_sources(replace(DataSettings(names, str(folder), "chatml", 128, None), **more))


def entries(folder: Path, **made) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(made))


def outputs(found) -> list[str]:
    return [row["output"] for _, row in found.rows()]


def answers(start: int, stop: int) -> list[str]:
    return [f"answer {n}" for n in range(start, stop)]


def text_of(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def packed(content: bytes, ending: str) -> bytes:
    if ending in (".zst", ".lz4"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, {".zst": "zstd", ".lz4": "lz4"}[ending]) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending](content)


# Folders that `datasets` saved


def test_of_a_saved_data_set_exactly_the_files_that_it_names_are_read(tmp_path):
    import datasets

    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"Here: {n}."} for n in range(40)]
    for name in ("shuffled", "mapped"):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    datasets.load_from_disk(str(tmp_path / "shuffled")).shuffle(seed=1)
    datasets.load_from_disk(str(tmp_path / "mapped")).map(lambda row: {"output": row["output"].upper()})
    for name in ("shuffled", "mapped"):
        [cache] = [path.name for path in (tmp_path / name).glob("cache-*.arrow")]
        found = scan(tmp_path, name)
        assert [row for _, row in found.rows()] == rows
        assert found.notices == [
            f"data set '{name}': not read in {tmp_path / name}: {cache} (state.json does not name them)"
        ]


def test_the_files_of_a_saved_data_set_are_read_in_the_order_of_its_state(tmp_path):
    import datasets

    datasets.Dataset.from_list(alpaca_rows(6)).save_to_disk(tmp_path / "saved", num_shards=3)
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    assert outputs(scan(tmp_path, "saved")) == [*answers(4, 6), *answers(2, 4), *answers(0, 2)]
    assert outputs(scan(tmp_path, "saved")) == list(
        datasets.load_from_disk(str(tmp_path / "saved"))["output"]
    )
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"it names data-00001-of-00003\.arrow, which is not there"):
        scan(tmp_path, "saved")


def test_a_selection_of_a_data_set_is_saved_without_the_rest(tmp_path):
    import datasets

    datasets.Dataset.from_list(alpaca_rows(10)).select([7, 3, 3]).save_to_disk(tmp_path / "saved")
    assert outputs(scan(tmp_path, "saved")) == ["answer 7", "answer 3", "answer 3"]


def test_an_index_of_rows_beside_a_saved_data_set_is_refused(tmp_path):
    import datasets

    datasets.Dataset.from_list(alpaca_rows(4)).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="saved with an index of rows beside the data"):
        scan(tmp_path, "saved")


def test_columns_that_a_saved_data_set_does_not_show_are_read_and_said(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(alpaca_rows(2))
    made.set_format(columns=["instruction"])
    made.save_to_disk(tmp_path / "saved")
    found = scan(tmp_path, "saved")
    assert outputs(found) == answers(0, 2)
    assert found.notices == [
        f"data set 'saved': {tmp_path / 'saved' / 'state.json'} shows only the columns instruction "
        "(set_format); here all columns of the files are read"
    ]


def test_one_split_of_a_saved_dictionary_has_to_be_named(tmp_path):
    import datasets

    made = {"train": alpaca_rows(6), "test": alpaca_rows(2)}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in made.items()})
    made.save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="holds the splits train, test") as caught:
        scan(tmp_path, "both")
    assert str(tmp_path / "both" / "train") in caught.value.fix
    assert outputs(scan(tmp_path, "both/test")) == answers(0, 2)
    entries(
        tmp_path,
        test={"file_name": "both", "split": "test"},
        some={"file_name": "both", "split": "train[-50%:]+test[:1]"},
        gone={"file_name": "both", "split": "validation"},
    )
    assert outputs(scan(tmp_path, "test")) == answers(0, 2)
    assert outputs(scan(tmp_path, "some")) == [*answers(3, 6), "answer 0"]
    with pytest.raises(DataError, match=r"has no split 'validation'\.") as caught:
        scan(tmp_path, "gone")
    assert "Its splits are test, train" in caught.value.why
    datasets.DatasetDict({"test": made["test"]}).save_to_disk(tmp_path / "single")
    assert outputs(scan(tmp_path, "single")) == answers(0, 2)


# Compressed files

ENDINGS = (".gz", ".bz2", ".zst", ".lz4", ".xz")


def test_plain_and_compressed_shards_of_a_folder_are_all_read(tmp_path):
    (tmp_path / "shards").mkdir()
    write_jsonl(tmp_path / "shards" / "part-0.jsonl", alpaca_rows(2))
    for number, ending in enumerate(ENDINGS, 1):
        rows = alpaca_rows(2 * number + 2)[2 * number :]
        (tmp_path / "shards" / f"part-{number}.jsonl{ending}").write_bytes(packed(text_of(rows), ending))
    found = scan(tmp_path, "shards")
    assert outputs(found) == answers(0, 12)
    assert found.notices == []


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_compressed_file_gives_the_rows_of_the_plain_one(tmp_path, kind, ending):
    rows = [{"instruction": f"Grüße {n}", "output": "x" * 3000} for n in range(200)]
    if kind == ".csv":
        content = "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in rows)
        content = b"\xef\xbb\xbf" + content.encode()
    else:
        content = json.dumps(rows).encode() if kind == ".json" else text_of(rows)
    (tmp_path / f"a{kind}{ending}").write_bytes(packed(content, ending))
    assert list(read_rows(tmp_path / f"a{kind}{ending}")) == rows
    assert scan(tmp_path, f"a{kind}{ending}").sources[0].source.name == "a"
    assert scan(tmp_path, "a").n_rows == 200


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", ["cut", "cut short", "a second stream cut", "something behind it"])
def test_a_damaged_compressed_file_is_named_and_never_read_in_part(tmp_path, ending, damage):
    whole = packed(text_of(alpaca_rows(3000)), ending)
    content = {
        "cut": whole[:-6],
        "cut short": whole[: len(whole) // 3],
        "a second stream cut": whole + whole[:7],
        "something behind it": whole + b"nothing compressed",
    }[damage]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+ cannot be decompressed"):
        scan(tmp_path, str(path))
    path.write_bytes(whole + whole)
    assert scan(tmp_path, str(path)).n_rows == 6000


def test_the_place_of_an_error_in_a_compressed_file_is_that_in_its_text(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"a": 1},\n {"a": 2}\n {"a": 3}]'))
    with pytest.raises(DataError, match=r"line 3, column 2: not valid JSON \(unexpected text\)"):
        list(read_rows(tmp_path / "a.json.gz"))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'[{"a": 1},\n {"a": 2}'))
    with pytest.raises(DataError, match=r"line 2, column 10: .*ends too early"):
        list(read_rows(tmp_path / "b.json.gz"))


def test_what_looks_like_data_and_is_not_read_is_named(tmp_path):
    folder = tmp_path / "many"
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / "empty").mkdir()
    write_jsonl(folder / "a.jsonl", alpaca_rows(1))
    write_jsonl(folder / "more" / "deep" / "b.jsonl", alpaca_rows(1))
    for name in ("c.tsv", "d.jsonl.zip", "e.parquet.gz", "README.md", "LICENSE", ".hidden", "SHA256SUMS"):
        (folder / name).write_text("x")
    found = scan(tmp_path, "many")
    assert outputs(found) == answers(0, 1)
    assert found.notices == [
        f"data set 'many': not read in {folder}: c.tsv, d.jsonl.zip, e.parquet.gz (no data in a form that "
        "is read (.json, .jsonl, .ndjson, .csv, .parquet, .arrow, .feather, .ipc; text also with .gz, .bz2, "
        ".zst, .lz4, .xz))",
        f"data set 'many': not read in {folder}: more/ (folders inside a folder are not searched)",
    ]
    with pytest.raises(DataError, match="which holds deep") as caught:
        scan(tmp_path, str(folder / "more"))
    assert f"for example {folder / 'more' / 'deep'}" in caught.value.fix


def test_a_compressed_copy_beside_its_file_is_not_read_twice(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for name, rows in (("a.jsonl", alpaca_rows(2)), ("b.jsonl", alpaca_rows(3)[2:])):
        write_jsonl(folder / name, rows)
        (folder / f"{name}.gz").write_bytes(gzip.compress(text_of(rows)))
    (folder / "b.jsonl").unlink()
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(text_of(alpaca_rows(3)[2:])))
    found = scan(tmp_path, "many")
    assert outputs(found) == answers(0, 3)
    assert found.notices == [
        f"data set 'many': not read in {folder}: a.jsonl.gz, b.jsonl.xz (by name it holds the rows of a file "
        "that is read)"
    ]


def test_copies_in_another_form_and_parts_that_are_not_there_are_said(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", alpaca_rows(1))
    (folder / "a.json").write_text(json.dumps(alpaca_rows(1)))
    write_jsonl(folder / "train-00001-of-00003.jsonl", alpaca_rows(2)[1:])
    found = scan(tmp_path, "many")
    assert found.n_rows == 3
    assert found.notices == [
        "data set 'many': a.json, a.jsonl have one name but for the extension, and all are read: are "
        "they copies?",
        "data set 'many': 1 of the 3 files of train are there (train-...-of-00003); the rest is not read",
    ]


def test_columnar_files_beside_text_are_said(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", alpaca_rows(1))
    pq.write_table(pa.Table.from_pylist(alpaca_rows(2)[1:]), folder / "b.parquet")
    found = scan(tmp_path, "many")
    assert outputs(found) == answers(0, 2)
    assert found.sources[0].source.columnar
    assert found.notices == [
        "data set 'many': Parquet or Arrow lies beside text files; null members are taken for padding in all "
        "of them, as columnar files need it"
    ]
    assert not scan(tmp_path, str(folder / "a.jsonl")).sources[0].source.columnar


# Splits


def test_a_folder_of_splits_is_read_by_the_split(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    write_jsonl(folder / "train-00000-of-00002.jsonl", alpaca_rows(2))
    write_jsonl(folder / "train-00001-of-00002.jsonl", alpaca_rows(4)[2:])
    write_jsonl(folder / "test.jsonl", alpaca_rows(9)[6:])
    write_jsonl(folder / "extra.jsonl", alpaca_rows(6)[5:])
    found = scan(tmp_path, "sets")
    assert outputs(found) == answers(0, 4)
    assert found.notices == [
        f"data set 'sets': of the folder {folder} only the train split is read (train-00000-of-00002.jsonl, "
        "train-00001-of-00002.jsonl); not read: extra.jsonl, test.jsonl. Another split is named by `split` "
        "in an entry of dataset_info.json"
    ]
    entries(
        tmp_path,
        test={"file_name": "sets", "split": "test"},
        both={"file_name": "sets", "split": "test[1:]+train[:25%]"},
        dev={"file_name": "sets", "split": "validation"},
    )
    found = scan(tmp_path, "test")
    assert outputs(found) == answers(6, 9)
    assert found.notices == [
        f"data set 'test': not read in {folder}: extra.jsonl (their names tell no split)"
    ]
    assert outputs(scan(tmp_path, "both")) == [*answers(7, 9), "answer 0"]
    with pytest.raises(DataError, match="has no split 'validation'"):
        scan(tmp_path, "dev")


def test_files_named_like_a_test_set_beside_others_are_read_and_said(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    write_jsonl(folder / "latest.jsonl", alpaca_rows(1))
    write_jsonl(folder / "unit-test.jsonl", alpaca_rows(2)[1:])
    found = scan(tmp_path, "code")
    assert outputs(found) == answers(0, 2)
    assert found.notices == [
        f"data set 'code': unit-test.jsonl in {folder} is read together with the other files, though by "
        "name it is a split of its own. A single split is named by `split` in an entry of dataset_info.json"
    ]


SLICES = [
    ("train", range(10, 110)),
    ("train[:10%]", range(10, 20)),
    ("train[:7]", range(10, 17)),
    ("train[-3:]", range(107, 110)),
    ("train[95%:]", range(105, 110)),
    ("train[20:30]", range(30, 40)),
    ("train[-20%:-10%]", range(90, 100)),
    ("train[:2]+train[-1:]", [10, 11, 109]),
    ("train[99:]+train[:1]", [109, 10]),
    ("train[:500]", range(10, 110)),
]


@pytest.mark.parametrize(("split", "expected"), SLICES)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_split_of_an_entry_is_the_slice_that_datasets_takes(tmp_path, split, expected, suffix):
    import datasets

    rows = alpaca_rows(110)[10:]
    if suffix == ".jsonl":
        write_jsonl(tmp_path / "rows.jsonl", rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    entries(tmp_path, x={"file_name": f"rows{suffix}", "split": split})
    found = outputs(scan(tmp_path, "x"))
    assert found == [f"answer {n}" for n in expected]
    kind = {".jsonl": "json", ".parquet": "parquet"}[suffix]
    theirs = datasets.load_dataset(
        kind, data_files=str(tmp_path / f"rows{suffix}"), split=split, cache_dir=str(tmp_path / "cache")
    )
    assert found == list(theirs["output"])


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", r"split is test, and .*rows\.jsonl has no split 'test'\."),
        ("test[:10%]", "has no split 'test'"),
        ("train+held", "has no split 'held'"),
        ("tran", r"Did you mean 'train'"),
        ("train[:10", "split is train.:10 .Unrecognized instruction format"),
        ("train[:200%]", "Percent slice boundaries"),
        ("train[50:10]", "has no rows"),
        (7, "sets split: 7"),
    ],
)
def test_a_split_that_is_not_there_is_an_error(tmp_path, split, message):
    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(100))
    entries(tmp_path, x={"file_name": "rows.jsonl", "split": split})
    with pytest.raises(DataError, match=message):
        scan(tmp_path, "x")


def test_a_file_named_after_a_split_is_that_split(tmp_path):
    write_jsonl(tmp_path / "my_test.jsonl", alpaca_rows(3))
    entries(tmp_path, x={"file_name": "my_test.jsonl", "split": "test[:2]"})
    assert outputs(scan(tmp_path, "x")) == answers(0, 2)


def test_max_samples_takes_the_first_rows_of_a_slice(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(100))
    entries(tmp_path, x={"file_name": "rows.jsonl", "split": "train[50%:]"})
    assert outputs(scan(tmp_path, "x", max_samples=3)) == answers(50, 53)


# num_samples

TOPICS = [
    {"instruction": f"Q{n}", "output": f"A{n}", "topic": topic}
    for n, topic in enumerate(topic for topic in ("fruit", "stone", "birds", "towns") for _ in range(25))
]


def some(tmp_path, count: int, **more):
    if not (tmp_path / "rows.jsonl").exists():
        write_jsonl(tmp_path / "rows.jsonl", TOPICS)
    entries(tmp_path, some={"file_name": "rows.jsonl", "num_samples": count})
    return scan(tmp_path, "some", **more)


def test_num_samples_is_a_seeded_random_sample_without_replacement(tmp_path):
    found = some(tmp_path, 20, seed=1)
    drawn = [int(row["output"][1:]) for _, row in found.rows()]
    assert len(set(drawn)) == found.n_rows == 20
    assert drawn == sorted(drawn)
    assert [TOPICS[n]["output"] for n in drawn] == outputs(found)
    assert {TOPICS[n]["topic"] for n in drawn} == {"fruit", "stone", "birds", "towns"}
    assert outputs(some(tmp_path, 20, seed=1)) == outputs(found)
    assert outputs(some(tmp_path, 20, seed=2)) != outputs(found)
    assert set(outputs(some(tmp_path, 5, seed=1))) < set(outputs(found))
    assert found.notices == [
        "data set 'some': num_samples: 20 of 100 rows are drawn at random by the run's seed "
        "(max_samples takes the first ones)"
    ]


def test_every_row_is_drawn_equally_often(tmp_path):
    from dataflex_pipeline.data.sources.entries import Draw

    counts = [0] * 50
    for seed in range(2000):
        for row in Draw(10, None, seed).positions(50).tolist():
            counts[row] += 1
    spread = sum((count - 400) ** 2 for count in counts) / (400 * 0.8)
    assert 20 < spread < 95  # chi-squared over 49 degrees of freedom, outside once in 10,000 each way


def test_the_draw_does_not_depend_on_how_it_is_computed(monkeypatch):
    import numpy as np

    from dataflex_pipeline.data.sources import entries

    keys = np.random.Philox(key=7).random_raw(1000)
    expected = sorted(np.argsort(keys)[:33].tolist())
    assert entries.Draw(33, None, 7).positions(1000).tolist() == expected
    monkeypatch.setattr(entries, "_BLOCK", 17)
    assert entries.Draw(33, None, 7).positions(1000).tolist() == expected


def test_num_samples_beyond_the_rows_repeats_some_of_them(tmp_path):
    found = some(tmp_path, 250)
    drawn = outputs(found)
    assert len(drawn) == found.n_rows == 250
    counts = {row["output"]: drawn.count(row["output"]) for row in TOPICS}
    assert min(counts.values()) == 1
    assert sum(counts.values()) - 100 == 150
    assert found.notices == [
        "data set 'some': num_samples: 250 is more than its 100 rows: each is there once, and 150 are drawn "
        "again at random by the run's seed"
    ]


def test_max_samples_cuts_a_draw_to_a_smaller_one(tmp_path):
    whole, part = some(tmp_path, 20), some(tmp_path, 20, max_samples=8)
    assert part.n_rows == 8
    assert set(outputs(part)) < set(outputs(whole))
    assert outputs(part) == outputs(some(tmp_path, 8))
    assert part.notices == [
        "data set 'some': num_samples: 20, and max_samples: 8 of that draw: 8 of 100 rows are drawn at "
        "random by the run's seed (max_samples alone takes the first ones)"
    ]


@pytest.mark.parametrize(
    ("count", "at_most", "sentence"),
    [
        (
            7,
            3,
            "num_samples: 7, and max_samples: 3 of that draw: 3 of 5 rows are drawn at random by the run's "
            "seed (max_samples alone takes the first ones)",
        ),
        (
            9,
            7,
            "num_samples: 9, and max_samples: 7 of that draw is more than its 5 rows: each is there once, "
            "and 2 are drawn again at random by the run's seed",
        ),
        (
            7,
            8,
            "num_samples: 7 is more than its 5 rows: each is there once, and 2 are drawn again at random by "
            "the run's seed",
        ),
    ],
)
def test_a_draw_that_max_samples_cuts_says_how_many_rows_there_are(tmp_path, count, at_most, sentence):
    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(5))
    entries(tmp_path, x={"file_name": "rows.jsonl", "num_samples": count})
    found = scan(tmp_path, "x", max_samples=at_most)
    assert found.n_rows == min(count, at_most)
    assert len(set(outputs(found))) == min(5, found.n_rows)
    assert found.notices == [f"data set 'x': {sentence}"]


def test_a_draw_of_a_slice_and_of_a_hub_data_set(tmp_path, monkeypatch):
    import datasets

    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(100))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(alpaca_rows(100))
    )
    monkeypatch.setattr("dataflex_pipeline.data.sources.hub.hub_reachable", lambda: True)
    entries(
        tmp_path,
        part={"file_name": "rows.jsonl", "split": "train[50:]", "num_samples": 10},
        hub={"hf_hub_url": "owner/set", "num_samples": 10},
    )
    found = outputs(scan(tmp_path, "part"))
    assert len(found) == 10
    assert set(found) < set(answers(50, 100))
    drawn = outputs(scan(tmp_path, "hub"))
    assert len(set(drawn)) == 10
    assert drawn != answers(0, 10)


# JSON


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n\r\n  \n", b"\n" * 70_000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_json_lines_in_a_json_file_are_read_however_long_the_first_line_is(tmp_path, before, end):
    rows = [{"instruction": "long", "output": "x" * 70_000}, {"instruction": "short", "output": "y"}]
    (tmp_path / "a.json").write_bytes(before + end.join(json.dumps(row).encode() for row in rows))
    assert list(read_rows(tmp_path / "a.json")) == rows
    (tmp_path / "b.json").write_bytes(before + json.dumps(rows, indent=1).encode().replace(b"\n", end))
    assert list(read_rows(tmp_path / "b.json")) == rows


def test_an_error_in_the_first_line_of_json_lines_is_told_with_its_place(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": }\n{"a": 2}\n')
    with pytest.raises(DataError, match="line 1, column 7: not valid JSON"):
        list(read_rows(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": {"b": 1, "c": 2, "b": 3}}\n',
            r"a\.jsonl, line 2: an object has the key 'b'",
        ),
        ("a.json", b'[{"a": 1}, {"a": 1, "a": 2}]', r"a\.json: an object has the key 'a' twice"),
        ("b.json", b'[{"a": 1}, {"x": [{"b": 1, "b": 2}]}]', r"b\.json: an object has the key 'b' twice"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=where):
        list(read_rows(tmp_path / name))


def test_numbers_that_json_does_not_have(tmp_path):
    rows = [{"instruction": "a", "output": "b", "loss_a": float("nan"), "loss_b": float("-inf"), "n": 1.0}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert scan(tmp_path, "a").notices == [
        "data set 'a': the columns 'loss_a', 'loss_b' hold NaN or Infinity, which JSON does not have; "
        "they are kept as such numbers"
    ]
    for text in ("NaN", "-Infinity", "Infinity"):
        (tmp_path / "b.json").write_text(f'[{{"instruction": "a", "output": "b", "x": {text}}}]')
        with pytest.raises(DataError, match="JSON has no NaN and no Infinity; write null"):
            scan(tmp_path, "b.json")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz"])
def test_an_array_in_a_json_lines_file_is_read_as_an_array(tmp_path, name, indent):
    content = b"\n " + json.dumps(alpaca_rows(3), indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_rows(tmp_path / name)) == alpaca_rows(3)


def test_a_damaged_array_in_a_json_lines_file_is_told_with_its_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text('[{"a": 1},\n {"b": }]\n')
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / "rows.jsonl"))
    place = f"{tmp_path / 'rows.jsonl'}, line 2, column 8"
    assert caught.value.what == f"{place}: not valid JSON (unexpected text)."


@pytest.mark.parametrize("form", ["{}.jsonl", "my-{}.json", "a.{}_2.csv", "{}-00000-of-00001.parquet"])
def test_the_words_of_a_split_in_a_file_name_are_those_of_datasets(form):
    from datasets.data_files import SPLIT_KEYWORDS

    found = {
        split: {split_by_name(form.format(word)) for word in SPLIT_KEYWORDS[split]}
        for split in SPLIT_KEYWORDS
    }
    assert found == {"train": {"train"}, "validation": {"validation"}, "test": {"test"}}
    assert {split_by_name(name) for name in ("heldout.jsonl", "trainingset.jsonl", "latest.jsonl")} == {None}


# README.md with the hub's configs


def card(folder: Path, configs: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}---\n# A data set\n")
    return folder


ONE_CONFIG = """\
- config_name: default
  data_files:
  - split: train
    path: good.jsonl
  - split: test
    path: [heldout*.jsonl]
"""


def test_the_splits_of_a_readme_are_those_of_datasets(tmp_path):
    import datasets

    folder = card(tmp_path / "set", ONE_CONFIG)
    write_jsonl(folder / "good.jsonl", alpaca_rows(3))
    write_jsonl(folder / "heldout-1.jsonl", alpaca_rows(6)[4:])
    write_jsonl(folder / "draft.jsonl", alpaca_rows(9)[8:])
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    found = scan(tmp_path, "set")
    assert outputs(found) == loaded["train"]["output"][:] == answers(0, 3)
    unnamed = (
        f"data set '{{}}': not read in {folder}: draft.jsonl (README.md does not name them for the config "
        "'default')"
    )
    assert found.notices == [
        f"data set 'set': of the folder {folder} the split train is read (good.jsonl), as its README.md has "
        "it; not read: test (heldout-1.jsonl). Another split is named by `split` in an entry of "
        "dataset_info.json",
        unnamed.format("set"),
    ]
    entries(
        tmp_path,
        held={"file_name": "set", "split": "test"},
        both={"file_name": "set", "split": "test+train[:1]"},
        none={"file_name": "set", "split": "dev"},
    )
    assert outputs(scan(tmp_path, "held")) == loaded["test"]["output"][:] == answers(4, 6)
    assert scan(tmp_path, "held").notices == [unnamed.format("held")]
    assert outputs(scan(tmp_path, "both")) == [*answers(4, 6), "answer 0"]
    with pytest.raises(DataError, match=r"split is dev, and .* has no split 'dev'"):
        scan(tmp_path, "none")


TWO_CONFIGS = """\
- config_name: en
  {default}data_files: "en/*.jsonl"
- config_name: de
  sep: ";"
  data_dir: de
"""


def test_the_config_of_a_readme_is_the_default_one_or_the_subset_of_an_entry(tmp_path):
    import datasets

    folder = card(tmp_path / "set", TWO_CONFIGS.format(default="default: true\n  "))
    for name, first in (("en/a", 0), ("en/b", 2), ("de/train", 4), ("de/test", 6)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_jsonl(folder / f"{name}.jsonl", alpaca_rows(first + 2)[first:])
    loaded = datasets.load_dataset(str(folder), "en", split="train", cache_dir=str(tmp_path / "cache"))
    found = scan(tmp_path, "set")
    assert outputs(found) == loaded["output"][:] == answers(0, 4)
    assert found.notices == [
        f"data set 'set': the config 'en' of {folder}/README.md is read; not read: de. Another config is "
        "named by `subset` in an entry of dataset_info.json",
        f"data set 'set': not read in {folder}: de/test.jsonl, de/train.jsonl (README.md does not name them "
        "for the config 'en')",
    ]
    entries(tmp_path, x={"file_name": "set", "subset": "de"}, y={"file_name": "set", "subset": "fr"})
    found = scan(tmp_path, "x")
    assert outputs(found) == answers(4, 6)
    assert (
        f"data set 'x': {folder}/README.md sets sep for the config 'de', which is not used: files are read "
        "by what is in them"
    ) in found.notices
    with pytest.raises(DataError, match=r"subset is fr, and .* has no config 'fr'"):
        scan(tmp_path, "y")
    card(folder, TWO_CONFIGS.format(default=""))
    with pytest.raises(DataError) as caught:
        scan(tmp_path, "set")
    assert caught.value.what == (
        f"dataset 'set' is the folder {folder}, whose README.md has the configs en, de."
    )
    assert caught.value.why == "Which of them is meant is not said: none is the default one."


@pytest.mark.parametrize(
    ("configs", "why"),
    [
        (
            "- config_name: a\n  data_files: gone.jsonl\n",
            "config 'a', split train: no file matches gone.jsonl",
        ),
        (
            "- config_name: a\n  data_files: notes.txt\n",
            "config 'a', split train: notes.txt is none of .json",
        ),
        ("- config_name: a\n  data_files: hf://x/y.jsonl\n", "hf://x/y.jsonl is not in this folder"),
        ("- config_name: a\n  data_files: [{split: train}]\n", "config 'a': Invalid format for data_files"),
        ("- data_files: rows.jsonl\n", "a config has no config_name"),
        ("- config_name: [a\n", "this is not valid YAML"),
        ("  default: rows.jsonl\n", "configs is not a list of objects"),
    ],
)
def test_configs_that_cannot_be_followed_name_the_readme(tmp_path, configs, why):
    folder = card(tmp_path / "set", configs)
    write_jsonl(folder / "rows.jsonl", alpaca_rows(2))
    (folder / "notes.txt").write_text("notes")
    with pytest.raises(DataError) as caught:
        scan(tmp_path, "set")
    assert caught.value.what.startswith(f"{folder / 'README.md'} cannot be followed: ")
    assert why in caught.value.what


def test_a_readme_without_files_in_its_configs_changes_nothing(tmp_path):
    folder = card(tmp_path / "set", "- config_name: default\n  features: []\n")
    write_jsonl(folder / "rows.jsonl", alpaca_rows(2))
    found = scan(tmp_path, "set")
    assert (outputs(found), found.notices) == (answers(0, 2), [])
