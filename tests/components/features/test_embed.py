"""embed: fitted on what training may know, saved so that anyone can embed a new item, honest about what is missing."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from components.common.artifacts import folder_hash, write_json
from components.common.contracts import Canonical
from components.common.splits import SplitConfig, rows_by_day, split_days
from components.data import pictures
from components.data.sources import RawTables
from components.data.sources.simulator import read
from components.features import embed
from components.features.embed import EmbedConfig
from components.features.encoders import image_encoder, text_encoder
from tests.components.features.small_encoders import clip_model, sentence_model
from tests.components.small_world import SIMULATOR, WINDOW, ingest_tables, with_column

CONFIG = EmbedConfig(dim=6, text_features=50, text_dim=5, text_encoder=None, image_encoder=None, seed=1, fit=None)
SPLIT = SplitConfig(valid_share=0.1, test_share=0.1)
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def raw() -> RawTables:
    """The simulator's tables; item 0 has no modality, item 1 texts alone."""
    tables = read("", replace(SIMULATOR, item_life=16), WINDOW)
    ids = tables.items["item_id"].to_pylist()
    text, image = tables.modalities["text"], tables.modalities["image"]
    without = {"text": ids[:1], "image": ids[:2]}
    kept = {
        name: table.filter(pa.array([i not in without[name] for i in table["item_id"].to_pylist()]))
        for name, table in {"text": text, "image": image}.items()
    }
    return replace(tables, modalities=kept)


def run(raw: RawTables, root: Path, config: EmbedConfig = CONFIG) -> Path:
    """Ingested and embedded as in production; the report is the one that validate writes of data that passed."""
    ingest_tables(raw, root / "canonical")
    write_json(root / "report.json", {"passed": True, "canonical_sha256": folder_hash(root / "canonical")})
    embed.run(config, SPLIT, root / "canonical", root / "report.json", root / "embedding")
    return root / "embedding"


@pytest.fixture(scope="module")
def embedded(raw: RawTables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(raw, tmp_path_factory.mktemp("embed"))


def untitled(raw: RawTables) -> RawTables:
    """Without the titles, which are embedded if no item has a text."""
    return replace(raw, items=with_column(raw.items, "title", [None] * len(raw.items)))


def vectors(folder: Path) -> dict[int, np.ndarray | None]:
    rows = pq.read_table(folder / "item_embedding.parquet").to_pylist()
    return {
        row["item_id"]: None if row["embedding"] is None else np.array(row["embedding"], np.float32) for row in rows
    }


def shown_in_training(raw: RawTables) -> set[int]:
    day = np.array([f"{t:%Y-%m-%d}" for t in raw.events["timestamp"].to_pylist()])
    item = raw.events["item_id"].to_numpy()
    days = np.unique(day)  # of eight equal days, one tenth is one day
    return set(item[day < days[-2]].tolist())


def by_hand(fit: dict[str, np.ndarray], given: dict[str, np.ndarray | None]) -> np.ndarray:
    """The vector of a new item, from the saved numbers alone."""
    blocks = []
    for name in sorted({key.split(".")[0] for key in fit if key.endswith(".std")}):
        x = given.get(name)
        scaled = np.zeros_like(fit[f"{name}.mean"]) if x is None else (x - fit[f"{name}.mean"]) / fit[f"{name}.std"]
        norm = np.linalg.norm(scaled)
        blocks.append(scaled / norm if norm else scaled)
    return (np.concatenate(blocks) - fit["pca.mean"]) @ fit["pca.components"].T / fit["pca.scale"]


def test_new_items_are_embedded_from_the_saved_fit(embedded: Path, raw: RawTables) -> None:
    fit, found = load_file(embedded / "fit.safetensors"), vectors(embedded)
    modality = {
        name: dict(zip(table["item_id"].to_pylist(), table["vector"].to_pylist(), strict=True))
        for name, table in raw.modalities.items()
    }
    assert any(item not in modality["image"] for item in modality["text"])  # and with a modality missing
    for item, vector in found.items():
        given = {name: np.array(rows[item]) if item in rows else None for name, rows in modality.items()}
        if vector is None:
            assert set(given.values()) == {None}
        else:
            np.testing.assert_allclose(vector, by_hand(fit, given), atol=1e-5)


def test_an_item_with_no_modality_has_no_vector(embedded: Path, raw: RawTables) -> None:
    table = pq.read_table(embedded / "item_embedding.parquet")
    rows = {row["item_id"]: row for row in table.to_pylist()}
    ids = raw.items["item_id"].to_pylist()
    assert list(rows) == ids
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), CONFIG.dim)
    assert rows[ids[0]]["embedding"] is None and not rows[ids[0]]["has_text"] and not rows[ids[0]]["has_image"]
    assert rows[ids[1]]["embedding"] is not None and rows[ids[1]]["has_text"] and not rows[ids[1]]["has_image"]
    have = {name: set(table["item_id"].to_pylist()) for name, table in raw.modalities.items()}
    for item, row in rows.items():
        assert [row["has_text"], row["has_image"]] == [item in have["text"], item in have["image"]]
        assert (row["embedding"] is None) == (not row["has_text"] and not row["has_image"])
    facts = json.loads((embedded / "fit.json").read_text())
    assert facts["missing"] == {name: len(ids) - len(have[name]) for name in have}
    assert facts["missing_all"] == sum(row["embedding"] is None for row in rows.values()) > 0
    assert table["created_at"].to_pylist() == raw.items["created_at"].to_pylist()


def test_vectors_enter_a_network_with_unit_variance(embedded: Path, raw: RawTables) -> None:
    shown = shown_in_training(raw)
    trained = np.stack([v for item, v in vectors(embedded).items() if item in shown and v is not None])
    assert trained.std() == pytest.approx(1, abs=0.02)
    assert json.loads((embedded / "fit.json").read_text())["training_items"] == len(shown)


def test_the_fit_knows_training_items_only(embedded: Path, raw: RawTables, tmp_path: Path) -> None:
    """Another vector for an item that only the later days show changes that item alone."""
    shown = shown_in_training(raw)
    text = raw.modalities["text"]
    later = next(i for i in text["item_id"].to_pylist() if i not in shown)
    trained = next(i for i in text["item_id"].to_pylist() if i in shown)
    before = vectors(embedded)
    for item, others_move in ((later, False), (trained, True)):
        values = text["vector"].to_pylist()
        values[text["item_id"].to_pylist().index(item)] = [50.0, -50.0, 50.0, 0.0, 0.0, 9.0]
        changed = replace(raw, modalities=raw.modalities | {"text": with_column(text, "vector", values)})
        folder = run(changed, tmp_path / str(item))
        after = vectors(folder)
        moved = {i for i in before if before[i] is not None and not np.array_equal(before[i], after[i])}
        assert item in moved
        assert (moved == {item}) is not others_move
        same_fit = (folder / "fit.safetensors").read_bytes() == (embedded / "fit.safetensors").read_bytes()
        assert same_fit is not others_move
        versions = [json.loads((f / "fit.json").read_text())["version"] for f in (folder, embedded)]
        assert (versions[0] == versions[1]) is not others_move


def test_a_modality_that_training_never_shows_tells_the_fit_nothing(raw: RawTables, tmp_path: Path) -> None:
    """Images come with the newest items: their own vectors alone know of them."""
    shown, image = shown_in_training(raw), raw.modalities["image"]
    later = image.filter(pa.array([item not in shown for item in image["item_id"].to_pylist()]))
    moved = with_column(later, "vector", [[3 * x + 1 for x in vector] for vector in later["vector"].to_pylist()])
    found = [
        run(replace(raw, modalities=raw.modalities | {"image": table}), tmp_path / name, replace(CONFIG, dim=4))
        for name, table in {"given": later, "moved": moved}.items()
    ]
    assert len({(folder / "fit.safetensors").read_bytes() for folder in found}) == 1
    fit = load_file(found[0] / "fit.safetensors")
    assert set(fit["image.mean"]) == {0} and set(fit["image.std"]) == {1}
    given, changed = map(vectors, found)
    for item, vector in given.items():
        if item not in later["item_id"].to_pylist():
            np.testing.assert_array_equal(vector, changed[item])
        else:
            assert vector is not None and np.isfinite(vector).all()


def test_later_events_and_items_change_no_fit(embedded: Path, raw: RawTables, tmp_path: Path) -> None:
    """The items that later days show are no part of the fit, however often they are shown."""
    day = np.array([f"{t:%Y-%m-%d}" for t in raw.events["timestamp"].to_pylist()])
    item = raw.events["item_id"].to_numpy().copy()
    item[day >= np.unique(day)[-2]] = raw.items["item_id"][3].as_py()
    folder = run(replace(raw, events=with_column(raw.events, "item_id", item)), tmp_path)
    assert (folder / "fit.safetensors").read_bytes() == (embedded / "fit.safetensors").read_bytes()


def test_equal_input_gives_equal_bytes(embedded: Path, raw: RawTables, tmp_path: Path) -> None:
    assert folder_hash(run(raw, tmp_path)) == folder_hash(embedded)


def test_training_items_are_those_of_the_training_days(embedded: Path, raw: RawTables) -> None:
    data = Canonical(embedded.with_name("canonical"))
    assert set(embed.training_items(data, SPLIT).to_pylist()) == shown_in_training(raw)
    counts = rows_by_day(data.events())
    cut = split_days(list(counts), list(counts.values()), SPLIT)
    assert (cut.valid_day, cut.test_day) == ("2024-03-07", "2024-03-08")


def test_dim_too_large(raw: RawTables, tmp_path: Path) -> None:
    told = r"embed\.dim is 12, but 11 values of \d+ training items span at most 11 dimensions; lower it to 11 or less"
    with pytest.raises(ValueError, match=told):
        run(raw, tmp_path, replace(CONFIG, dim=12))
    assert not (tmp_path / "embedding").exists()
    run(raw, tmp_path / "fits", replace(CONFIG, dim=11))


@pytest.mark.parametrize("titles", ["no title", "ids", "no word twice"])
def test_no_modality_at_all(titles: str, raw: RawTables, tmp_path: Path) -> None:
    ids = raw.items["item_id"].to_pylist()
    given = {"no title": [None] * len(ids), "ids": list(map(str, ids)), "no word twice": [f"Item word{i}" for i in ids]}
    folder = run(replace(raw, items=with_column(raw.items, "title", given[titles]), modalities={}), tmp_path)
    assert set(vectors(folder).values()) == {None}
    facts = json.loads((folder / "fit.json").read_text())
    assert (facts["dim"], facts["missing_all"], facts["modalities"]) == (0, len(raw.items), [])
    assert "titles share too few words" in embed.summary(facts)["vector"]


def test_vectors_are_those_of_a_pca_of_all_at_once(embedded: Path, raw: RawTables, monkeypatch) -> None:
    """In chunks of any size: scikit-learn's PCA of the joint matrix spans the same axes."""
    from sklearn.decomposition import PCA

    fit = load_file(embedded / "fit.safetensors")
    joint, shown = [], shown_in_training(raw)
    for name, table in sorted(raw.modalities.items()):
        rows = dict(zip(table["item_id"].to_pylist(), table["vector"].to_pylist(), strict=True))
        known = np.array([rows[i] for i in rows if i in shown])
        np.testing.assert_allclose(fit[f"{name}.mean"], known.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(fit[f"{name}.std"], known.std(axis=0), atol=1e-6)
        missing = [np.nan] * known.shape[1]
        x = np.array([rows.get(i, missing) for i in raw.items["item_id"].to_pylist() if i in shown])
        x = np.nan_to_num((x - known.mean(axis=0)) / known.std(axis=0))
        joint.append(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))
    pca = PCA(CONFIG.dim).fit(np.concatenate(joint, axis=1))
    np.testing.assert_allclose(fit["pca.mean"], pca.mean_, atol=1e-6)
    along = (fit["pca.components"] * pca.components_).sum(axis=1)
    np.testing.assert_allclose(np.abs(along), 1, atol=1e-5)
    facts = json.loads((embedded / "fit.json").read_text())
    assert facts["explained_variance"] == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-6)


def test_the_size_of_a_chunk_changes_nothing(embedded: Path, raw: RawTables, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(embed, "FIT_BATCH", 7)
    before, after = vectors(embedded), vectors(run(raw, tmp_path))
    for item, vector in before.items():
        np.testing.assert_allclose(after[item], vector, atol=1e-5) if vector is not None else None


def test_an_earlier_fit_embeds_new_items_and_keeps_its_version(embedded: Path, raw: RawTables, tmp_path: Path) -> None:
    """One item more, and other events: old items keep their vectors to the byte, and the new one gets one."""
    (old_text, old_image), new = (raw.modalities[name] for name in ("text", "image")), 999_999
    added = old_text.slice(3, 1)
    given = {**added.to_pylist()[0], "item_id": new}
    text = pa.concat_tables([old_text, pa.Table.from_pylist([given], old_text.schema)])
    item = {**raw.items.to_pylist()[-1], "item_id": new}
    grown = replace(
        raw,
        items=pa.concat_tables([raw.items, pa.Table.from_pylist([item], raw.items.schema)]),
        modalities={"text": text, "image": old_image},
        events=raw.events.slice(0, 2800),
    )
    refit = run(grown, tmp_path / "refit")
    kept = run(grown, tmp_path / "kept", replace(CONFIG, fit=str(embedded)))
    versions = [json.loads((f / "fit.json").read_text())["version"] for f in (embedded, kept, refit)]
    assert versions[0] == versions[1] != versions[2]
    before, after = vectors(embedded), vectors(kept)
    for old, vector in before.items():
        assert np.array_equal(vector, after[old]) if vector is not None else after[old] is None
    fit = load_file(embedded / "fit.safetensors")
    np.testing.assert_allclose(after[new], by_hand(fit, {"text": np.array(given["vector"])}), atol=1e-5)


def test_an_earlier_fit_must_be_whole_and_of_the_same_kind(embedded: Path, raw: RawTables, tmp_path: Path) -> None:
    kept = replace(CONFIG, fit=str(embedded))
    with pytest.raises(ValueError, match=r"embed\.dim is 5, but the fit of .* has 6; set the one to the other"):
        run(raw, tmp_path / "dim", replace(kept, dim=5))
    told = r"fitted on image by vectors of the source, text by vectors of the source, now it is text by vectors of .*;"
    with pytest.raises(ValueError, match=told):
        run(replace(raw, modalities={"text": raw.modalities["text"]}), tmp_path / "kinds", kept)
    with pytest.raises(ValueError, match=r"text by vectors of the source, now it is .*text by TF-IDF; set embed\.fit"):
        run(with_texts(raw, image=True), tmp_path / "words", kept)
    with pytest.raises(ValueError, match=r"fit\.json is not there"):
        run(raw, tmp_path / "none", replace(kept, fit=str(tmp_path / "no")))
    copy = tmp_path / "copy"
    shutil.copytree(embedded, copy)
    (copy / "fit.safetensors").write_bytes((copy / "fit.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"holds no fit\.safetensors of version .*; copy the folder whole"):
        run(raw, tmp_path / "cut", replace(kept, fit=str(copy)))


def test_an_earlier_fit_of_vectors_of_another_length(embedded: Path, raw: RawTables, tmp_path: Path) -> None:
    image = raw.modalities["image"]
    longer = with_column(
        image, "vector", [[*vector, 1.0] for vector in image["vector"].to_pylist()], pa.list_(pa.float32())
    )
    width = len(image["vector"][0])
    told = (
        rf"embed\.fit: vectors of image have {width + 1} values here, {embedded} was fitted on {width}; set embed\.fit"
    )
    with pytest.raises(ValueError, match=told):
        run(replace(raw, modalities=raw.modalities | {"image": longer}), tmp_path, replace(CONFIG, fit=str(embedded)))


@pytest.mark.parametrize("kept", ["of new items alone", "all the same"])
def test_training_items_that_nothing_tells_apart(kept: str, raw: RawTables, tmp_path: Path) -> None:
    image, shown = raw.modalities["image"], shown_in_training(raw)
    trained = np.array([item in shown for item in image["item_id"].to_pylist()])
    alone = image.filter(pa.array(~trained))
    same = with_column(image, "vector", [[0.1] * len(image["vector"][0])] * len(image))
    given, have = (alone, 0) if kept == "of new items alone" else (same, int(trained.sum()))
    told = rf"the {len(shown)} training items have the same vector or none \({{'image': {have}}}\).*; give items that"
    with pytest.raises(ValueError, match=told):
        run(replace(untitled(raw), modalities={"image": given}), tmp_path, replace(CONFIG, dim=2))
    assert not (tmp_path / "embedding").exists()


# ---- texts ------------------------------------------------------------------------------------------------------

WORDS = ("gambit", "rook", "orbit", "nebula", "espresso", "roast", "reef", "swell")


def terms(folder: Path) -> list[str]:
    with safe_open(folder / "fit.safetensors", "np") as opened:
        return json.loads(opened.metadata()["fit"])["terms"]


def version(folder: Path) -> str:
    return json.loads((folder / "fit.json").read_text())["version"]


def with_texts(raw: RawTables, image: bool = False) -> RawTables:
    """Titles are texts; every ninth item has none; items that training never shows say a word of their own."""
    shown = shown_in_training(raw)
    rng = np.random.default_rng(0)
    texts = [
        None if i % 9 == 0 else " ".join(["the", *rng.choice(WORDS, 4), *["zeppelin"] * 3 * (item not in shown)])
        for i, item in enumerate(raw.items["item_id"].to_pylist())
    ]
    modalities = {"image": raw.modalities["image"]} if image else {}
    return replace(raw, items=with_column(raw.items, "text", texts), modalities=modalities)


def test_texts_without_vectors_are_embedded_and_can_be_by_hand(raw: RawTables, tmp_path: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    given = with_texts(raw, image=True)
    folder = run(given, tmp_path)
    fit, facts = load_file(folder / "fit.safetensors"), json.loads((folder / "fit.json").read_text())
    assert facts["modalities"] == ["image", "text"]
    assert terms(folder) == sorted(WORDS)  # no stop word, and no word of later items alone
    images = dict(zip(*(given.modalities["image"][c].to_pylist() for c in ("item_id", "vector")), strict=True))
    found = vectors(folder)
    assert sum(v is None for v in found.values()) == facts["missing_all"] > 0
    tfidf = TfidfVectorizer(sublinear_tf=True, vocabulary=terms(folder))
    tfidf.idf_ = fit["text.idf"]
    for item, text in zip(given.items["item_id"].to_pylist(), given.items["text"].to_pylist(), strict=True):
        told = {"image": np.array(images[item]) if item in images else None}
        told["text"] = None if text is None else (tfidf.transform([text]) @ fit["text.svd"].T)[0]
        if found[item] is None:
            assert set(told.values()) == {None}
        else:
            np.testing.assert_allclose(found[item], by_hand(fit, told), atol=1e-5)
    assert folder_hash(run(given, tmp_path / "again")) == folder_hash(folder)


def test_text_vectors_go_before_texts(raw: RawTables, embedded: Path, tmp_path: Path) -> None:
    given = replace(with_texts(raw), modalities=raw.modalities)
    folder = run(given, tmp_path)
    assert (folder / "fit.safetensors").read_bytes() == (embedded / "fit.safetensors").read_bytes()


@pytest.mark.parametrize("texts", ["the and of", "gambit {i}"], ids=["stop words", "no word twice"])
def test_texts_that_say_too_little(texts: str, raw: RawTables, tmp_path: Path) -> None:
    ids = raw.items["item_id"].to_pylist()
    given = [texts.format(i=f"w{i}") if i != ids[5] else None for i in ids]
    with pytest.raises(ValueError, match=r"texts share [01] term\(s\), \d+ items have a text; .* longer texts"):
        run(replace(raw, items=with_column(raw.items, "text", given), modalities={}), tmp_path)


def test_texts_are_embedded_by_an_earlier_fit(raw: RawTables, tmp_path: Path) -> None:
    given = with_texts(raw)
    first = run(given, tmp_path / "first", replace(CONFIG, dim=3))
    again = run(given, tmp_path / "again", replace(CONFIG, dim=3, fit=str(first)))
    assert folder_hash(first) == folder_hash(again)


def test_the_version_tells_the_words(raw: RawTables, tmp_path: Path) -> None:
    """Two fits of the same numbers, and another word for one of them: no vector of the one is one of the other."""
    given = with_texts(raw)
    other = [None if text is None else text.replace("rook", "rool") for text in given.items["text"].to_pylist()]
    folders = [
        run(tables, tmp_path / name, replace(CONFIG, dim=3))
        for name, tables in (("rook", given), ("rool", replace(given, items=with_column(given.items, "text", other))))
    ]
    arrays = [load_file(folder / "fit.safetensors") for folder in folders]
    assert all(np.array_equal(values, arrays[1][name]) for name, values in arrays[0].items())
    assert version(folders[0]) != version(folders[1])


def with_titles(raw: RawTables) -> RawTables:
    """As a user's items.csv with titles and tags: no text, no vectors; every ninth item has its id for a title."""
    ids, texts = raw.items["item_id"].to_pylist(), with_texts(raw).items["text"].to_pylist()
    titles = [str(item) if text is None else text for item, text in zip(ids, texts, strict=True)]
    return replace(raw, items=with_column(raw.items, "title", titles), modalities={})


def test_titles_are_embedded_if_no_item_has_a_text(raw: RawTables, tmp_path: Path) -> None:
    """As texts with the same words are; the facts and what the stage prints say that it was titles."""
    folder = run(with_titles(raw), tmp_path / "titles", replace(CONFIG, dim=3))
    facts, items = json.loads((folder / "fit.json").read_text()), len(raw.items)
    assert (facts["dim"], facts["encoders"], facts["modalities"]) == (3, {"text": "TF-IDF of titles"}, ["text"])
    missing = facts["missing"]["text"]
    assert missing == with_texts(raw).items["text"].null_count == facts["missing_all"] > 0
    assert embed.summary(facts)["text"] == f"TF-IDF of titles, {items - missing} of {items} items"
    texts = run(with_texts(raw), tmp_path / "texts", replace(CONFIG, dim=3))
    assert version(folder) != version(texts)
    for item, vector in vectors(texts).items():
        np.testing.assert_array_equal(vectors(folder)[item], vector)
    with pytest.raises(ValueError, match=r"fitted on text by TF-IDF of titles, now it is text by TF-IDF; set"):
        run(with_texts(raw), tmp_path / "mixed", replace(CONFIG, dim=3, fit=str(folder)))


def test_a_title_is_not_embedded_if_items_have_texts(raw: RawTables, tmp_path: Path) -> None:
    texts = with_texts(raw)
    titled = replace(texts, items=with_column(texts.items, "title", with_titles(raw).items["title"].to_pylist()))
    folders = [run(tables, tmp_path / name, replace(CONFIG, dim=3)) for name, tables in (("a", texts), ("b", titled))]
    assert folder_hash(folders[0]) == folder_hash(folders[1])


def test_titles_are_embedded_by_an_earlier_fit(raw: RawTables, tmp_path: Path) -> None:
    """If it was made of titles. A fit that was made without any embeds no titles later."""
    given = with_titles(raw)
    first = run(given, tmp_path / "first", replace(CONFIG, dim=3))
    again = run(given, tmp_path / "again", replace(CONFIG, dim=3, fit=str(first)))
    assert folder_hash(first) == folder_hash(again)
    images = replace(given, modalities={"image": raw.modalities["image"]})
    before = run(untitled(images), tmp_path / "before", replace(CONFIG, dim=3))
    after = run(images, tmp_path / "after", replace(CONFIG, dim=3, fit=str(before)))
    assert folder_hash(before) == folder_hash(after)


# ---- encoders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_model(tmp_path_factory.mktemp("sentences"))


def test_texts_go_through_an_encoder(raw: RawTables, sentences: Path, tmp_path: Path, monkeypatch) -> None:
    """By an earlier fit too, in batches of any size; the vectors follow from the fit's numbers and the encoder's."""
    given = with_texts(raw, image=True)
    config = replace(CONFIG, text_encoder=str(sentences))
    folder = run(given, tmp_path / "first", config)
    encoder = text_encoder(str(sentences))
    facts = json.loads((folder / "fit.json").read_text())
    assert facts["encoders"] == {"image": "vectors of the source", "text": encoder.name}
    texts = dict(zip(given.items["item_id"].to_pylist(), given.items["text"].to_pylist(), strict=True))
    assert facts["missing"]["text"] == list(texts.values()).count(None) > 0
    image = given.modalities["image"]
    images = dict(zip(image["item_id"].to_pylist(), image["vector"].to_pylist(), strict=True))
    fit, found = load_file(folder / "fit.safetensors"), vectors(folder)
    assert not any(name in fit for name in ("text.idf", "text.svd")) and terms(folder) == []
    for item, text in texts.items():
        told = {"image": np.array(images[item]) if item in images else None}
        told["text"] = None if text is None else encoder.encode([text])[0]
        if found[item] is None:
            assert set(told.values()) == {None}
        else:
            np.testing.assert_allclose(found[item], by_hand(fit, told), atol=1e-3)
    monkeypatch.setattr(embed, "TEXT_BATCH", 7)
    again = run(given, tmp_path / "again", replace(config, fit=str(folder)))
    assert version(again) == version(folder)
    for item, vector in vectors(again).items():
        np.testing.assert_allclose(vector, found[item], atol=1e-3) if vector is not None else None


def test_vectors_of_two_encoders_never_meet(raw: RawTables, sentences: Path, tmp_path: Path) -> None:
    """Other weights are another version, and no fit of the one embeds by the other."""
    given = with_texts(raw)
    (tmp_path / "other").mkdir()
    configs = {
        "counted": replace(CONFIG, dim=3),
        "encoded": replace(CONFIG, dim=3, text_encoder=str(sentences)),
        "other weights": replace(CONFIG, dim=3, text_encoder=str(sentence_model(tmp_path / "other", seed=1))),
    }
    folders = {name: run(given, tmp_path / name, config) for name, config in configs.items()}
    assert len({version(folder) for folder in folders.values()}) == 3
    names = {name: json.loads((f / "fit.json").read_text())["encoders"]["text"] for name, f in folders.items()}
    for fitted, folder in folders.items():
        for name, config in configs.items():
            if name != fitted:
                told = f"fitted on text by {names[fitted]}, now it is text by {names[name]}; set embed.fit to null"
                with pytest.raises(ValueError, match=told):
                    run(given, tmp_path / f"{fitted}-{name}", replace(config, fit=str(folder)))


def test_an_encoder_that_has_nothing_to_encode(raw: RawTables, sentences: Path, tmp_path: Path) -> None:
    told = r"embed\.{0}_encoder is .*, but .* has no {0} to encode, or {0} vectors already; set it to null"
    with pytest.raises(ValueError, match=told.format("text")):  # its texts have vectors
        run(replace(with_texts(raw), modalities=raw.modalities), tmp_path / "1", replace(CONFIG, text_encoder="any"))
    with pytest.raises(ValueError, match=told.format("text")):  # it has no texts
        run(replace(untitled(raw), modalities={}), tmp_path / "2", replace(CONFIG, text_encoder=str(sentences)))
    with pytest.raises(ValueError, match=told.format("image")):
        run(raw, tmp_path / "3", replace(CONFIG, image_encoder="any"))


# ---- pictures ---------------------------------------------------------------------------------------------------


def with_pictures(raw: RawTables, folder: Path, more: dict[int, Image.Image] | None = None) -> RawTables:
    """Pictures of noise for some items, no vectors, no titles; and `more` items, with pictures of their own."""
    folder.mkdir(parents=True)
    raw = untitled(raw)
    rng = np.random.default_rng(0)
    ids = raw.items["item_id"].to_pylist()
    drawn = {i: Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)) for i in ids[1::10] + ids[2::3]}
    items = raw.items
    for item, picture in (more or {}).items():
        new = {**items.to_pylist()[-1], "item_id": item}
        items = pa.concat_tables([items, pa.Table.from_pylist([new], items.schema)])
        drawn[item] = picture
    for item, picture in drawn.items():
        picture.save(folder / f"{item}.png")
    places = [str(folder / f"{item}.png") if item in drawn else None for item in items["item_id"].to_pylist()]
    return replace(raw, items=items.append_column("image", pa.array(places)), modalities={})


def test_pictures_are_described_and_can_be_by_hand(raw: RawTables, tmp_path: Path) -> None:
    given = with_pictures(raw, tmp_path / "pictures")
    folder = run(given, tmp_path)
    facts, fit, found = (
        json.loads((folder / "fit.json").read_text()), load_file(folder / "fit.safetensors"), vectors(folder),
    )  # fmt: skip
    assert facts["encoders"] == {"image": "descriptors 1"}
    places = dict(zip(given.items["item_id"].to_pylist(), given.items["image"].to_pylist(), strict=True))
    assert facts["missing"] == {"image": list(places.values()).count(None)} and None in places.values()
    for item, place in places.items():
        if place is None:
            assert found[item] is None
        else:
            (vector,) = image_encoder(None).encode([Image.open(place)])
            np.testing.assert_allclose(found[item], by_hand(fit, {"image": vector}), atol=1e-4)
    assert folder_hash(run(given, tmp_path / "again")) == folder_hash(folder)


def test_new_pictures_are_embedded_without_a_refit(raw: RawTables, tmp_path: Path) -> None:
    """The old items keep their vectors to the byte, in batches of another size; a refit is another version."""
    first = run(with_pictures(raw, tmp_path / "a"), tmp_path / "first")
    new = Image.new("RGB", (50, 50), "orange")
    grown = with_pictures(raw, tmp_path / "b", {999_999: new})
    events = with_column(grown.events, "item_id", [999_999, *grown.events["item_id"].to_pylist()[1:]])
    grown = replace(grown, events=events)
    kept = run(grown, tmp_path / "kept", replace(CONFIG, fit=str(first)))
    refit = run(grown, tmp_path / "refit")
    assert version(kept) == version(first) != version(refit)
    before, after = vectors(first), vectors(kept)
    for item, vector in before.items():
        assert np.array_equal(vector, after[item]) if vector is not None else after[item] is None
    (described,) = image_encoder(None).encode([new])
    fit = load_file(first / "fit.safetensors")
    np.testing.assert_allclose(after[999_999], by_hand(fit, {"image": described}), atol=1e-4)
    given = replace(raw, modalities={"image": raw.modalities["image"]})
    with pytest.raises(ValueError, match=r"fitted on image by descriptors 1, now it is image by vectors of the source"):
        run(given, tmp_path / "no", replace(CONFIG, fit=str(first)))


@pytest.mark.parametrize("model", [None, "clip"])
def test_one_decoded_picture_is_in_memory_at_once(
    model: str | None, raw: RawTables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the next is decoded, the one before is gone, by either encoder."""
    given = with_pictures(raw, tmp_path / "pictures")
    seen: list[weakref.ref[Image.Image]] = []
    held = []

    def watched(picture: bytes, side: int | None = None) -> Image.Image:
        held.append(sum(earlier() is not None for earlier in seen))
        decoded = pictures.decode(picture, side)
        seen.append(weakref.ref(decoded))
        return decoded

    monkeypatch.setattr(embed, "decode", watched)
    run(given, tmp_path, replace(CONFIG, image_encoder=model and str(clip_model(tmp_path / model))))
    assert len(held) == len(given.items) - given.items["image"].null_count > 20
    assert max(held) == 0


def test_pictures_go_through_an_encoder(raw: RawTables, tmp_path: Path) -> None:
    clip = clip_model(tmp_path / "clip")
    given, config = with_pictures(raw, tmp_path / "pictures"), replace(CONFIG, image_encoder=str(clip))
    folder, described = run(given, tmp_path / "encoded", config), run(given, tmp_path / "described")
    encoder = image_encoder(str(clip))
    assert json.loads((folder / "fit.json").read_text())["encoders"] == {"image": encoder.name}
    fit, found = load_file(folder / "fit.safetensors"), vectors(folder)
    for item, place in zip(given.items["item_id"].to_pylist(), given.items["image"].to_pylist(), strict=True):
        if place is not None:
            (vector,) = encoder.encode([Image.open(place)])
            # drawn weights tell pictures little apart, and standardising makes the rounding of a batch large
            np.testing.assert_allclose(found[item], by_hand(fit, {"image": vector}), atol=0.02)
    assert version(folder) != version(described)
    with pytest.raises(ValueError, match=r"fitted on image by descriptors 1, now it is image by open_clip clip "):
        run(given, tmp_path / "mixed", replace(config, fit=str(described)))
