"""Raw values become indices, ids become catalog rows, and ranges of the click log become histories."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.schema import (
    PADDING,
    UNKNOWN,
    Catalog,
    Encoder,
    Feature,
    Schema,
    history_rows,
    schema_hash,
)

COLOUR = Feature(name="colour", owner="impression", kind="categorical", size=4, origin="user", vocab=("red", "grün"))
AGE = Feature(name="age", owner="impression", kind="categorical", size=5)
NUMBER = Feature(
    name="price", owner="impression", kind="categorical", size=4, origin="context", vocab=("1", "7"), numeric=True
)
ITEM = Feature(name="item_id", owner="item", kind="categorical", size=4)
TAGS = Feature(name="tags", owner="item", kind="multi", size=6, length=3)
VECTOR = Feature(name="vector", owner="item", kind="vector", size=2)
SCHEMA = Schema(features=(COLOUR, ITEM, TAGS, AGE, VECTOR), history_length=3, embedding_version="v7")
LOWEST = torch.iinfo(torch.int64).min


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(SCHEMA, {"age": torch.tensor([-5, 18, 40])})


def make_catalog() -> Catalog:
    return Catalog(
        torch.tensor([LOWEST, LOWEST, 7, 30]),
        torch.tensor([[0], [1], [2], [3]], dtype=torch.int32),
        {"tags": torch.tensor([[0, 0, 0], [1, 0, 0], [2, 3, 0], [4, 5, 2]])},
        torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]),
    )


class TestEncoder:
    def test_strings(self, encoder):
        assert encoder.encode("colour", ["grün", "red", "blue", None, ""]).tolist() == [3, 2, UNKNOWN, PADDING, UNKNOWN]

    def test_integers(self, encoder):
        values = [40, -5, 18, 19, None, 0, 10**12, LOWEST]
        wanted = [4, 2, 3, UNKNOWN, PADDING, UNKNOWN, UNKNOWN, UNKNOWN]
        assert encoder.encode("age", values).tolist() == wanted

    def test_no_values(self, encoder):
        for name in ("colour", "age"):
            found = encoder.encode(name, [])
            assert found.shape == (0,)
            assert found.dtype == torch.int64

    def test_numbers_where_strings_are_known(self, encoder):
        assert encoder.encode("colour", [3]).tolist() == [UNKNOWN]

    @pytest.mark.parametrize("value", ["forty", [1], 2**63])
    def test_refuses_values_of_another_type(self, encoder, value):
        with pytest.raises(ValueError, match=r"age: .*integers that fit 64 bits"):
            encoder.encode("age", [40, value])

    def test_refuses_features_it_cannot_encode(self, encoder):
        for name in ("vector", "shoe size"):
            with pytest.raises(ValueError, match=f"no feature '{name}' to encode"):
                encoder.encode(name, ["x"])


class TestCatalog:
    def test_rows(self):
        ids = torch.tensor([[30, 7], [8, LOWEST], [10**15, -1]])
        assert make_catalog().rows(ids).tolist() == [[3, 2], [UNKNOWN, UNKNOWN], [UNKNOWN, UNKNOWN]]

    def test_rows_of_a_catalog_without_items(self):
        empty = Catalog(torch.full((2,), LOWEST), torch.zeros(2, 0, dtype=torch.int64), {}, None)
        assert empty.rows(torch.tensor([7, 30])).tolist() == [UNKNOWN, UNKNOWN]

    @pytest.mark.parametrize("without_vector", [False, True])
    def test_tensors_round_trip(self, without_vector):
        catalog = make_catalog()
        if without_vector:
            catalog = Catalog(catalog.item_ids_I, catalog.categorical_IG, catalog.sets, None)
        again = Catalog.from_tensors(catalog.tensors())
        assert schema_hash(SCHEMA, {}, again) == schema_hash(SCHEMA, {}, catalog)
        assert (again.vector_IE is None) == without_vector


class TestHistoryRows:
    clicks_C = torch.tensor([11, 12, 13, 14, 15], dtype=torch.int32)

    @pytest.mark.parametrize(
        ("start", "end", "wanted"),
        [
            (0, 0, [0, 0, 0]),
            (4, 4, [0, 0, 0]),
            (5, 5, [0, 0, 0]),
            (0, 1, [0, 0, 11]),
            (3, 5, [0, 14, 15]),
            (1, 4, [12, 13, 14]),
            (0, 5, [13, 14, 15]),
        ],
    )
    def test_is_the_last_clicks_of_the_range_padded_in_front(self, start, end, wanted):
        found_BL = history_rows(self.clicks_C, torch.tensor([start]), torch.tensor([end]), 3)
        assert found_BL.tolist() == [wanted]
        assert found_BL.dtype == torch.int64

    def test_rows_do_not_reach_into_each_other(self):
        found_BL = history_rows(self.clicks_C, torch.tensor([0, 2, 4]), torch.tensor([2, 4, 5]), 3)
        assert found_BL.tolist() == [[0, 11, 12], [0, 13, 14], [0, 0, 15]]

    def test_an_empty_log_is_padding(self):
        found_BL = history_rows(self.clicks_C[:0], torch.zeros(2, dtype=torch.int32), torch.zeros(2).int(), 3)
        assert found_BL.tolist() == [[PADDING] * 3] * 2


class TestSchema:
    def test_json_round_trip(self):
        for schema in (SCHEMA, Schema(features=(NUMBER,), history_length=0)):
            assert Schema.from_json(schema.to_json()) == schema

    def test_views(self):
        assert [f.name for f in SCHEMA.impression_fields] == ["colour", "age"]
        assert [f.name for f in SCHEMA.item_fields] == ["item_id"]
        assert [f.name for f in SCHEMA.item_sets] == ["tags"]
        assert SCHEMA.vector == VECTOR

    def test_without(self):
        left = SCHEMA.without(["vector", "colour"])
        assert [f.name for f in left.features] == ["item_id", "tags", "age"]
        assert left.vector is None
        assert left.history_length == 3
        with pytest.raises(ValueError, match=r"no feature \['colr'\] in the schema"):
            SCHEMA.without(["colr", "age"])

    def test_without_an_id_that_is_no_feature(self):
        assert SCHEMA.without(["user_id"]) == SCHEMA
        nothing = Schema(features=(AGE,), history_length=0)
        assert nothing.without(["item_id", "user_id"]) == nothing

    def test_refuses_features_that_repeat_and_two_vectors(self):
        with pytest.raises(ValueError, match="repeat"):
            Schema(features=(AGE, AGE), history_length=0)
        second = Feature(name="image", owner="item", kind="vector", size=2)
        with pytest.raises(ValueError, match="fuse the modalities"):
            Schema(features=(VECTOR, second), history_length=0)


class TestSchemaHash:
    def test_does_not_depend_on_the_order_of_names(self):
        age, zip_code = torch.tensor([1]), torch.tensor([2])
        one = schema_hash(SCHEMA, {"age": age, "zip": zip_code}, make_catalog())
        assert one == schema_hash(SCHEMA, {"zip": zip_code, "age": age}, make_catalog())

    def test_is_that_of_the_checkpoints_there_are(self):
        """Taken before features could be numeric: where it changes, every checkpoint is refused."""
        found = schema_hash(SCHEMA, {"age": torch.tensor([-5, 18, 40])}, make_catalog())
        assert found == "25852bca85ad81352596e014d24fbcd702e92c04818df61b86b521a52764a3a7"

    def test_sees_every_change_of_meaning(self):
        catalog, integers = make_catalog(), {"age": torch.tensor([-5, 18, 40])}
        hashes = [schema_hash(SCHEMA, integers, catalog)]
        hashes.append(schema_hash(SCHEMA, {"age": torch.tensor([-5, 18, 41])}, catalog))
        hashes.append(schema_hash(SCHEMA.without(["age"]), integers, catalog))
        hashes.append(schema_hash(Schema(features=(NUMBER,), history_length=0), integers, catalog))
        as_text = replace(NUMBER, numeric=False)
        hashes.append(schema_hash(Schema(features=(as_text,), history_length=0), integers, catalog))
        for tensor in (catalog.item_ids_I, catalog.categorical_IG, catalog.sets["tags"], catalog.vector_IE):
            tensor[-1] += 1
            hashes.append(schema_hash(SCHEMA, integers, catalog))
        assert len(set(hashes)) == len(hashes)
