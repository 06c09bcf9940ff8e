"""The user's own arrays, datasets and tables as Examples."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprior import data

ARRAYS = {
    "float64": (np.float64, torch.float32, torch.float32),
    "float32": (np.float32, torch.float32, torch.float32),
    "float16": (np.float16, torch.float32, torch.float32),
    "int64": (np.int64, torch.int64, torch.int64),
    "int32": (np.int32, torch.int64, torch.int64),
    "uint8": (np.uint8, torch.int64, torch.int64),
    "bool": (np.bool_, torch.float32, torch.int64),
}


@pytest.mark.parametrize("kind", ["numpy", "torch", "list"])
@pytest.mark.parametrize(("given_", "x_type", "y_type"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_keep_their_values(kind, given_, x_type, y_type):
    values = np.arange(12).reshape(6, 2).astype(given_)
    make = {"numpy": np.array, "torch": torch.tensor, "list": lambda a: a.tolist()}[kind]
    x, y = make(values), make(values[:, 0])
    examples = data.from_arrays(x, y, keys=list("aabbcc"))
    assert (examples.x.dtype, examples.y.dtype) == (x_type, y_type)
    assert examples.x.tolist() == values.tolist() and examples.y.tolist() == values[:, 0].tolist()
    assert len(data.by_key(examples)) == 3
    x[0], y[0] = x[1], y[1]  # the examples are a copy
    assert examples.x.tolist() == values.tolist() and examples.y.tolist() == values[:, 0].tolist()


ARRAY_ERRORS = [
    (ValueError, [[1.0, np.nan], [np.nan, np.inf]], [0, 1], "x has 3 NaN or infinite values of 4"),
    (ValueError, [[1.0], [1e300]], [0, 1], "x has 1 NaN or infinite"),
    (ValueError, [[1.0], [2.0]], [0.0, np.nan], "y has 1 NaN or infinite"),
    (ValueError, [[1.0]], [0, 1], "x has 1 examples and y has 2"),
    (ValueError, np.zeros((0, 3)), [], "x and y need examples"),
    (ValueError, 3.0, 1, "x and y need examples"),
    (TypeError, [["a"]], [1], "x must be numbers, got list of <U1"),
    (TypeError, [[1]], ["cat"], "y must be numbers"),
    (TypeError, torch.zeros(1, dtype=torch.complex64), [1], "real numbers"),
]


@pytest.mark.parametrize(("error", "x", "y", "message"), ARRAY_ERRORS)
def test_bad_arrays_say_so(error, x, y, message):
    with pytest.raises(error, match=message):
        data.from_arrays(x, y)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_datasets_are_read():
    x, y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 2, 1])
    kinds = [
        torch.utils.data.TensorDataset(x, y),
        Pairs(list(zip(x, y.tolist(), strict=True))),
        [(row.numpy(), int(label)) for row, label in zip(x, y, strict=True)],
        torch.utils.data.Subset(torch.utils.data.TensorDataset(x, y), range(4)),
    ]
    for dataset in kinds:
        examples = data.from_dataset(dataset, keys=list("abab"))
        assert torch.equal(examples.x, x) and torch.equal(examples.y, y)
        assert examples.keys == list("abab")


DATASET_ERRORS = [
    (TypeError, torch.utils.data.TensorDataset(torch.zeros(3)), "holds 1 tensors"),
    (TypeError, iter([]), r"no len\(\) and \[i\]"),
    (TypeError, [{"x": 1}], r"dataset\[0\] must be a pair \(x, y\), got dict"),
    (TypeError, [(torch.zeros(1), "cat")], r"y of dataset\[0\] must be numbers"),
    (ValueError, [(torch.zeros(1), 0), (torch.zeros(2), 0)], "differ in shape"),
    (ValueError, [], "no examples"),
]


@pytest.mark.parametrize(("error", "dataset", "message"), DATASET_ERRORS)
def test_bad_datasets_say_so(error, dataset, message):
    with pytest.raises(error, match=message):
        data.from_dataset(dataset)


TABLE = pd.DataFrame(
    {
        "id": ["007", "7", "a b", "7"],
        "height": [1.5, 2.0, -1.0, 0.25],
        "count": [3, 1, 2, 2],
        "old": [True, False, True, True],
        "kind": ["dog", "cat", "dog", "ant"],
        "word": ["x", "y", "z", "x"],
    }
)
TABLES = {
    "csv": (data.from_csv, lambda table, path: table.to_csv(path, index=False)),
    "parquet": (data.from_parquet, lambda table, path: table.to_parquet(path)),
}
every_table = pytest.mark.parametrize(("read", "write"), TABLES.values(), ids=TABLES)


@every_table
def test_a_table_round_trip(tmp_path, read, write):
    path = tmp_path / "table"
    write(TABLE.drop(columns="word"), path)
    examples = read(path, target="kind", client="id")
    assert examples.x.dtype == torch.float32
    assert examples.x.tolist() == TABLE[["height", "count", "old"]].astype(float).values.tolist()
    order = sorted(set(TABLE["kind"]))
    assert examples.y.tolist() == [order.index(kind) for kind in TABLE["kind"]]
    assert [c.name for c in data.by_key(examples)] == sorted(set(TABLE["id"]))


@every_table
def test_targets_by_type(tmp_path, read, write):
    path = tmp_path / "table"
    write(TABLE, path)
    for target, dtype in (("height", torch.float32), ("count", torch.int64), ("old", torch.int64)):
        features = ["count"] if target != "count" else ["height", "old"]
        examples = read(path, target, features=features)
        assert examples.keys is None and examples.y.dtype == dtype
        assert examples.y.tolist() == TABLE[target].tolist()
        assert examples.x.tolist() == TABLE[features].astype(float).values.tolist()
    classes = ["bee", "dog", "cat", "ant"]
    coded = read(path, "kind", features=["count"], classes=classes)
    assert [classes[code] for code in coded.y.tolist()] == TABLE["kind"].tolist()


def test_clients_of_a_csv_keep_their_leading_zeros(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("id,x,y\n007,1.0,0\n7,2.0,1\n")
    assert [c.name for c in data.by_key(data.from_csv(path, "y", client="id"))] == ["007", "7"]


TABLE_ERRORS = [
    ({"target": "kind"}, r"must be numeric, and \['id', 'word'\]"),
    ({"target": "sort"}, r"no column \['sort'\]; its columns are \['id', "),
    ({"target": "kind", "client": "who"}, r"no column \['who'\]"),
    ({"target": "kind", "features": []}, "some columns other than the target 'kind'"),
    ({"target": "count", "features": ["count"]}, "some columns other than the target"),
    ({"target": "kind", "features": ["count"], "classes": ["cat"]}, r"has \['ant', 'dog'\], which"),
]


@every_table
@pytest.mark.parametrize(("arguments", "message"), TABLE_ERRORS)
def test_bad_tables_say_so(tmp_path, read, write, arguments, message):
    path = tmp_path / "table"
    write(TABLE, path)
    with pytest.raises(ValueError, match=message):
        read(path, **arguments)


@every_table
def test_missing_values_are_counted_by_column(tmp_path, read, write):
    path = tmp_path / "table"
    write(TABLE.assign(id=["a", None, None, "b"], height=[1.0, np.nan, 2.0, 3.0]), path)
    with pytest.raises(ValueError, match=r"missing values: \{'height': 1, 'id': 2\}"):
        read(path, "kind", client="id", features=["height"])
    assert len(read(path, "kind", features=["count"])) == len(TABLE)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=40))
def test_by_key_gives_each_key_its_own_rows(rows):
    keys = [f"k{key}" for key, _ in rows]
    labels = [label for _, label in rows]
    population = data.by_key(data.from_arrays([[float(v)] for v in labels], labels, keys))
    for client in population:
        mine = [label for key, label in zip(keys, labels, strict=True) if key == client.name]
        assert sorted(client.train.y.tolist()) == sorted(mine)
