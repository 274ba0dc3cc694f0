"""Data sets: splits, counts and leakage of those that are here; official formats made small; errors."""

import hashlib
import io
import json
import os
import pathlib
import random
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from fastkd import data
from fastkd.data import graphs
from fastkd.data.files import DamagedFile

HERE = os.environ.get("FASTKD_DATA")

# name: nodes, edges, features, classes, sparse x
COUNTS = {
    "digits": (1797, None, 64, 10, False),
    "cora": (2708, 10556, 1433, 7, True),
    "citeseer": (3327, 9104, 3703, 6, True),
    "pubmed": (19717, 88648, 500, 3, False),
    "amazon_photo": (7650, 238162, 745, 8, False),
    "coauthor_cs": (18333, 163788, 6805, 15, True),
    "proteins_inductive": (43471, 162088, 29, 3, False),
    "twitch7": (36890, 985150, 3170, 2, True),
    "hs_ppi_node2vec": (3890, 75690, 3890, 50, True),
}
SHAPES = {"digits_points": (1797, 64, 10), "shapes69": (2482, 1024, 69), "modelnet10": (4891, 1024, 10)}
FILES = {"shapes69": "shapes69_1024", "modelnet10": "modelnet10_vox24"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Every test has an empty cache of its own."""
    monkeypatch.setenv("FASTKD_OFFLINE", "1")
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path / "cache"))


_loaded = {}


def real(name):
    if name not in ("digits", "digits_points"):
        stem = FILES.get(name, name)
        if HERE is None or not list(pathlib.Path(HERE).glob(f"*/{stem}.npz")):
            pytest.skip(f"{stem}.npz is not in FASTKD_DATA")
    if name not in _loaded:
        _loaded.clear()  # one at a time: some are large
        _loaded[name] = data.load(name)
    return _loaded[name]


def check_graph(graph, task):
    n = graph.num_nodes
    assert isinstance(graph, Data) and graph.x.shape == (n, task.num_features) and graph.x.dtype == torch.float32
    assert graph.x.layout in (torch.strided, torch.sparse_csr)
    values = graph.x if graph.x.layout == torch.strided else graph.x.values()
    assert values.isfinite().all()
    if task.multilabel:
        assert graph.y.shape == (n, task.num_classes) and graph.y.dtype == torch.float32
        assert ((graph.y == 0) | (graph.y == 1)).all()
    else:
        assert graph.y.shape == (n,) and graph.y.dtype == torch.int64
        assert 0 <= int(graph.y.min()) <= int(graph.y.max()) < task.num_classes
    assert graph.edge_index.dtype == torch.int64 and graph.edge_index.shape[0] == 2
    assert graph.adj_t.layout == torch.sparse_csr and graph.adj_t.shape == (n, n)
    assert graph.adj_t.dtype == torch.float32 and bool((graph.adj_t.values() == 1).all())
    rows = torch.repeat_interleave(torch.arange(n), graph.adj_t.crow_indices().diff())
    key = rows * n + graph.adj_t.col_indices()
    assert torch.equal(key, torch.sort(graph.edge_index[1] * n + graph.edge_index[0]).values)
    for part in ("train", "val", "test"):
        assert graph[f"{part}_mask"].shape == (n,) and graph[f"{part}_mask"].dtype == torch.bool


@pytest.mark.parametrize("name", COUNTS)
def test_real_graphs(name):
    task = real(name)
    nodes, edges, features, classes, sparse = COUNTS[name]
    assert (task.name, task.kind, task.num_features, task.num_classes) == (name, "nodes", features, classes)
    assert task.multilabel == (name == "hs_ppi_node2vec") and "split" in task.source
    assert name == "digits" or name in task.source
    every = list({id(g): g for of in task.graphs.values() for g in of}.values())
    for graph in every:
        check_graph(graph, task)
        assert (graph.x.layout == torch.sparse_csr) == sparse
        s, d = graph.edge_index
        assert bool((s != d).all())
        n = graph.num_nodes
        assert torch.equal(torch.sort(s * n + d).values, torch.sort(d * n + s).values), "both directions"
    assert sum(g.num_nodes for g in every) == nodes
    assert edges is None or sum(g.edge_index.shape[1] for g in every) == edges
    assert set(task.graphs) == {"train", "val", "test"} and task.points == {}
    assert task.inductive == (name in ("proteins_inductive", "twitch7"))
    if task.inductive:
        for part, of in task.graphs.items():
            for graph in of:
                assert graph[f"{part}_mask"].all()
                assert not any(graph[f"{other}_mask"].any() for other in task.graphs if other != part)
    else:
        (graph,) = every
        masks = torch.stack([graph[f"{part}_mask"] for part in task.graphs])
        assert int(masks.sum(0).max()) == 1 and masks.any(1).all()
        if not task.multilabel:
            assert len(graph.y[graph.train_mask].unique()) == classes


def test_splits_of_the_readme():
    for name, sizes in {
        "cora": (140, 500, 1000),
        "digits": (200, 500, 1097),
        "coauthor_cs": (300, 450, 17583),
        "hs_ppi_node2vec": (2334, 778, 778),
    }.items():
        (graph,) = real(name).graphs["train"]
        assert tuple(int(graph[f"{part}_mask"].sum()) for part in ("train", "val", "test")) == sizes


def test_downloads_would_be_split_as_the_files_are():
    for name in ("coauthor_cs", "amazon_photo"):
        (graph,) = real(name).graphs["train"]
        for key, nodes in graphs._drawn(graph.y.numpy()).items():
            mask = graph[key.replace("idx", "mask")]
            assert np.array_equal(np.sort(nodes), mask.nonzero()[:, 0].numpy()), (name, key)
    real("proteins_inductive")
    with np.load(pathlib.Path(HERE) / "graphs" / "proteins_inductive.npz") as file:
        for part, chosen in graphs._tenths(1113).items():
            assert np.array_equal(np.sort(chosen), np.sort(file[f"{part}_graphs"]))


def test_proteins_are_one_union_per_part_and_standardised_by_the_training_part():
    task = real("proteins_inductive")
    assert [len(of) for of in task.graphs.values()] == [1, 1, 1]
    counts = [int(task.graphs[part][0].batch.max()) + 1 for part in ("train", "val", "test")]
    assert counts == [891, 111, 111]
    for (graph,) in task.graphs.values():
        assert torch.equal(graph.batch[graph.edge_index[0]], graph.batch[graph.edge_index[1]])
    x = task.graphs["train"][0].x
    assert x.mean(0).abs().max() < 1e-3
    deviation = x.std(0, correction=0)
    assert bool(((deviation - 1).abs() < 1e-3).logical_or(deviation < 1e-3).all())
    assert task.graphs["test"][0].x.mean(0).abs().max() > 1e-2, "the test part has its own mean: no leakage"


def test_twitch_by_country():
    assert [len(of) for of in real("twitch7").graphs.values()] == [1, 1, 5]
    loader = DataLoader(real("twitch7").graphs["test"], 2)
    batch = next(iter(loader))
    first, second = real("twitch7").graphs["test"][:2]
    assert batch.adj_t.shape[0] == batch.x.shape[0] == first.num_nodes + second.num_nodes
    assert torch.equal(batch.x.values(), torch.cat((first.x.values(), second.x.values())))


@pytest.mark.parametrize("name, power", [("cora", 1), ("pubmed", 1), ("amazon_photo", 2), ("twitch7", 2)])
def test_bags_of_words_are_normalised_by_row(name, power):
    x = real(name).graphs["train"][0].x
    norm = x.to_dense().norm(p=power, dim=1)
    assert bool(((norm - 1).abs() < 1e-5).logical_or(norm == 0).all())


def test_coauthor_counts_are_set_to_one():
    x = real("coauthor_cs").graphs["train"][0].x
    length = x.crow_indices().diff()
    row = torch.repeat_interleave(torch.arange(x.shape[0]), length)
    torch.testing.assert_close(x.values(), length.float().rsqrt()[row])


def test_identity_features():
    x = real("hs_ppi_node2vec").graphs["train"][0].x
    assert torch.equal(x.col_indices(), torch.arange(3890)) and bool((x.values() == 1).all())


# --- shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes(name):
    task = real(name)
    count, size, classes = SHAPES[name]
    assert (task.kind, task.num_features, task.num_classes, task.graphs) == ("shapes", 3, classes, {})
    assert sum(len(p) for p in task.points.values()) == count
    for part in ("train", "val", "test"):
        points, labels = task.points[part], task.labels[part]
        assert points.shape == (len(labels), size, 3) and points.dtype == torch.float32 and points.isfinite().all()
        assert labels.dtype == torch.int64 and 0 <= int(labels.min()) <= int(labels.max()) < classes
        if name != "digits_points":
            assert float(points.norm(dim=2).max()) < 1.01
    train, val = (
        torch.bincount(task.labels["train"], minlength=classes),
        torch.bincount(task.labels["val"], minlength=classes),
    )
    share = val / (train + val)
    assert 0.08 < len(task.labels["val"]) / int((train + val).sum()) < 0.12
    assert bool((share[(train + val) >= 10] > 0.04).all()), "of every class"
    hashes = [hashlib.sha256(p.numpy().tobytes()).digest() for of in task.points.values() for p in of]
    if name != "shapes69":  # holds meshes that are there twice
        assert len(set(hashes)) == len(hashes)


def test_the_official_test_part_is_untouched():
    task = real("shapes69")
    with np.load(pathlib.Path(HERE) / "shapes" / "shapes69_1024.npz") as file:
        test = file["split"] == 1
        assert np.array_equal(task.labels["test"].numpy(), file["label"][test])
        assert np.array_equal(task.points["test"].numpy(), file["points"][test].astype(np.float32))
    task = real("modelnet10")
    with np.load(pathlib.Path(HERE) / "shapes" / "modelnet10_vox24.npz") as file:
        kept = file["valid"] & (file["split"] == 1)
        assert np.array_equal(task.labels["test"].numpy(), file["label"][kept])


def test_same_every_time():
    for name in ("digits", "digits_points"):
        a, b = data.load(name), data.load(name)
        if a.points:
            assert all(torch.equal(a.points[part], b.points[part]) for part in a.points)
        else:
            assert torch.equal(a.graphs["train"][0].train_mask, b.graphs["train"][0].train_mask)


def test_digit_points_are_the_bright_pixels():
    from sklearn.datasets import load_digits

    task = data.load("digits_points")
    images = load_digits().images
    wanted = {tuple(np.unique(image[image > 0] / 16)) for image in images}
    for cloud in task.points["val"][:20]:
        assert tuple(cloud[:, 2].unique().double().tolist()) in wanted
        assert float(cloud[:, :2].abs().max()) <= 1


def test_augment():
    points = torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(0))
    kept = points.clone()
    out = data.augment(points, torch.Generator().manual_seed(1))
    assert torch.equal(points, kept) and out.shape == points.shape
    assert torch.equal(out, data.augment(points, torch.Generator().manual_seed(1)))
    # One factor and one summand per shape and axis.
    factor = (out[:, 1:] - out[:, :1]) / (points[:, 1:] - points[:, :1])
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-3, atol=1e-3)
    assert bool(((factor > 0.66) & (factor < 1.51)).all())
    assert float((out - factor[:, :1] * points).abs().max()) < 0.21
    many = data.augment(torch.ones(2000, 1, 3), shift=0)
    assert 0.66 < float(many.min()) < 0.7 and 1.45 < float(many.max()) < 1.51
    same = data.augment(points, scale=1, shift=0, drop=0.5)
    changed = (same != points).any(2)
    assert changed.any() and torch.equal(same[changed], points[:, :1].expand_as(points)[changed])
    assert 0 < float((data.augment(points, scale=1, shift=0, jitter=0.01) - points).abs().max()) <= 0.051
    for bad in ({"scale": 0.5}, {"drop": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            data.augment(points, **bad)
    with pytest.raises(ValueError, match=r"\[n, P, 3\]"):
        data.augment(points[0])


# --- official formats, made small ---------------------------------------------------------------------


def make_ppi(raw):
    """train: graphs 1 and 2; valid: 3; test: 4. As in GraphSAGE's zip: node ids count through a part."""
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, ids in {"train": [1, 2], "valid": [3], "test": [4]}.items():
        n = 6 * len(ids)
        links = [{"source": 6 * g + i, "target": 6 * g + (i + 1) % 6} for g in range(len(ids)) for i in range(6)]
        links.append({"source": 0, "target": 0})
        graph = {
            "directed": False,
            "multigraph": False,
            "graph": {},
            "nodes": [{"id": i} for i in range(n)],
            "links": links,
        }
        (raw / f"{part}_graph.json").write_text(json.dumps(graph))
        np.save(raw / f"{part}_feats.npy", rng.normal(size=(n, 50)))
        np.save(raw / f"{part}_labels.npy", rng.integers(0, 2, (n, 121)))
        np.save(raw / f"{part}_graph_id.npy", np.repeat(ids, 6))


def test_ppi_format(tmp_path):
    raw = tmp_path / "cache" / "ppi" / "raw"
    make_ppi(raw)
    task = data.load("ppi", root=tmp_path)
    assert (task.num_features, task.num_classes, task.multilabel, task.inductive) == (50, 121, True, True)
    assert [len(of) for of in task.graphs.values()] == [2, 1, 1]
    for part, of in task.graphs.items():
        for graph in of:
            check_graph(graph, task)
            assert graph.num_nodes == 6 and graph.edge_index.shape[1] == 12, part
    feats = torch.from_numpy(np.load(raw / "train_feats.npy")).float()
    torch.testing.assert_close(torch.cat([g.x for g in task.graphs["train"]]), feats)
    # From now on from the cache, with its checksum; the raw files are not needed.
    for file in raw.iterdir():
        file.unlink()
    again = data.load("ppi", root=tmp_path)
    assert torch.equal(again.graphs["test"][0].y, task.graphs["test"][0].y) and "ppi.npz" in again.source
    (tmp_path / "cache" / "ppi.npz").write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256"):
        data.load("ppi", root=tmp_path)
    assert (tmp_path / "cache" / "ppi.npz").read_bytes() == b"other"


def make_tu(raw, name, attributes=True, count=20):
    """count graphs of 4 nodes in a ring, with labels 0, 1, 2, 1."""
    raw.mkdir(parents=True)
    edges = [(4 * g + i + 1, 4 * g + (i + s) % 4 + 1) for g in range(count) for i in range(4) for s in (1, 3)]
    write = lambda key, rows: (raw / f"{name}_{key}.txt").write_text("\n".join(rows) + "\n")
    write("A", [f"{a}, {b}" for a, b in edges])
    write("graph_indicator", [str(g + 1) for g in range(count) for _ in range(4)])
    write("graph_labels", [str(g % 2) for g in range(count)])
    write("node_labels", [str(c) for _ in range(count) for c in (0, 1, 2, 1)])
    if attributes:
        rng = np.random.default_rng(0)
        write("node_attributes", [", ".join(f"{v:.6f}" for v in rng.normal(3, 2, 5)) for _ in range(4 * count)])


@pytest.mark.parametrize("attributes", [True, False])
def test_tu_format(tmp_path, attributes):
    make_tu(tmp_path / "cache" / "tu_RINGS" / "RINGS" / "raw", "RINGS", attributes)
    task = data.load("tu:RINGS", root=tmp_path)
    assert (task.num_features, task.num_classes, task.multilabel) == (5 if attributes else 32, 3, False)
    assert [of[0].num_nodes for of in task.graphs.values()] == [64, 8, 8]
    for (graph,) in task.graphs.values():
        check_graph(graph, task)
        assert (
            graph.y.tolist() == [0, 1, 2, 1] * (graph.num_nodes // 4)
            and graph.edge_index.shape[1] == 2 * graph.num_nodes
        )
    if attributes:
        assert task.graphs["train"][0].x.mean(0).abs().max() < 1e-5


def test_proteins_from_tu_files(tmp_path):
    make_tu(tmp_path / "cache" / "proteins_inductive" / "PROTEINS_full" / "raw", "PROTEINS_full")
    assert data.load("proteins_inductive", root=tmp_path).num_classes == 3


CATEGORIES = ("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet")


def make_modelnet(raw):
    """Ten categories of boxes; the header of some files lacks its line break, as in the official ones."""
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    quads = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
    faces = [f"3 {a} {b} {c}" for a, b, c, _ in quads] + [f"3 {a} {c} {d}" for a, _, c, d in quads]
    for label, category in enumerate(CATEGORIES):
        for part, count in (("train", 3), ("test", 1)):
            folder = raw / category / part
            folder.mkdir(parents=True)
            for i in range(count):
                vertices = corners * (1 + label, 2, 1 + i) + 100
                head = "OFF8 12 0" if i == 1 else "OFF\n8 12 0"
                lines = [head, *(" ".join(map(str, v)) for v in vertices), *faces]
                (folder / f"{category}_{i:04d}.off").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["modelnet40", "modelnet10"])
def test_modelnet_format(tmp_path, name):
    make_modelnet(tmp_path / "cache" / name / "raw")
    task = data.load(name, root=tmp_path)
    assert (task.kind, task.num_classes) == ("shapes", 10)
    assert {part: len(p) for part, p in task.points.items()} == {"train": 20, "val": 10, "test": 10}
    assert task.labels["test"].tolist() == list(range(10))
    for points in task.points.values():
        assert points.shape[1:] == (1024, 3) and float(points.mean(1).abs().max()) < 1e-5
        torch.testing.assert_close(points.norm(dim=2).amax(1), torch.ones(len(points)))
    # On the surface of the box of 1 x 2 x 1: each point lies on one of six planes.
    box = task.points["test"][0]
    low, high = box.min(0).values, box.max(0).values
    on_face = torch.minimum((box - low).abs(), (box - high).abs()).amin(1)
    assert float(on_face.max()) < 0.02
    again = data.load(name, root=tmp_path)
    assert torch.equal(again.points["test"], task.points["test"]) and f"{name}.npz" in again.source


def test_ogb_format(tmp_path, monkeypatch):
    """ogb itself is not needed: what its class returns."""

    class NodePropPredDataset:
        def __init__(self, name, root):
            assert name == "ogbn-arxiv" and str(tmp_path) in root

        def __getitem__(self, i):
            graph = {
                "edge_index": np.array([[0, 1, 2], [1, 2, 2]]),
                "num_nodes": 4,
                "node_feat": np.ones((4, 3), np.float32),
            }
            return graph, np.array([[0], [1], [1], [0]])

        def get_idx_split(self):
            return {"train": np.array([0, 1]), "valid": np.array([2]), "test": np.array([3])}

    package = types.ModuleType("ogb")
    package.nodeproppred = types.ModuleType("ogb.nodeproppred")
    package.nodeproppred.NodePropPredDataset = NodePropPredDataset
    monkeypatch.setitem(sys.modules, "ogb", package)
    monkeypatch.setitem(sys.modules, "ogb.nodeproppred", package.nodeproppred)
    task = data.load("ogbn-arxiv", root=tmp_path)
    (graph,) = task.graphs["train"]
    check_graph(graph, task)
    assert graph.edge_index.shape[1] == 4 and bool((graph.x == 1).all()) and not task.inductive


def test_ogb_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ogb", None)
    with pytest.raises(ImportError, match="pip install ogb"):
        data.load("ogbn-products", root=tmp_path)


def make_planetoid(raw, name):
    """As kimiyoung/planetoid: pickled scipy matrices; test nodes last, 1,000 of them as everywhere."""
    import pickle

    sparse = pytest.importorskip("scipy.sparse")
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labelled, known, tested = 20, 540, 60
    x = (rng.random((known + tested, 30)) < 0.1).astype(np.float32)
    y = np.eye(3, dtype=np.int32)[rng.integers(0, 3, known + tested)]
    parts = {
        "x": sparse.csr_matrix(x[:labelled]),
        "y": y[:labelled],
        "allx": sparse.csr_matrix(x[:known]),
        "ally": y[:known],
        "tx": sparse.csr_matrix(x[known:]),
        "ty": y[known:],
        "graph": {i: [(i + 1) % (known + tested), i] for i in range(known + tested)},
    }
    for key, value in parts.items():
        (raw / f"ind.{name}.{key}").write_bytes(pickle.dumps(value))
    (raw / f"ind.{name}.test.index").write_text("\n".join(str(known + i) for i in range(tested)) + "\n")
    return x, y


def test_planetoid_format(tmp_path):
    x, y = make_planetoid(tmp_path / "cache" / "cora" / "cora" / "raw", "cora")
    task = data.load("cora", root=tmp_path)
    (graph,) = task.graphs["train"]
    check_graph(graph, task)
    assert graph.edge_index.shape[1] == 2 * 600 and torch.equal(graph.y, torch.from_numpy(y.argmax(1)))
    dense = graph.x.to_dense().numpy() if graph.x.layout != torch.strided else graph.x.numpy()
    assert np.array_equal(dense > 0, x > 0)
    assert [int(graph[f"{p}_mask"].sum()) for p in ("train", "val", "test")] == [20, 500, 60]


def test_coauthor_format(tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    raw = tmp_path / "cache" / "coauthor_cs" / "CS" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    parts = {
        "attr": sparse.csr_matrix(rng.integers(0, 3, (180, 8)) * (rng.random((180, 8)) < 0.3)),
        "adj": sparse.csr_matrix(np.roll(np.eye(180), 1, 1)),
    }
    arrays = {
        f"{key}_{field}": getattr(m, field)
        for key, m in parts.items()
        for field in ("data", "indices", "indptr", "shape")
    }
    np.savez(raw / "ms_academic_cs.npz", labels=np.arange(180) % 3, **arrays)
    task = data.load("coauthor_cs", root=tmp_path)
    (graph,) = task.graphs["train"]
    check_graph(graph, task)
    assert [int(graph[f"{p}_mask"].sum()) for p in ("train", "val", "test")] == [60, 90, 30]
    assert graph.edge_index.shape[1] == 360


# --- errors -----------------------------------------------------------------------------------------


def tiny(**changes):
    """A graph file of 4 nodes."""
    arrays = {
        "edge_index": np.array([[0, 1, 2, 3], [1, 0, 3, 2]], np.int32),
        "x": np.eye(4, 3, dtype=np.float32),
        "y": np.array([0, 1, 0, 1]),
        "train_idx": np.array([0]),
        "val_idx": np.array([1]),
        "test_idx": np.array([2, 3]),
    }
    arrays.update(changes)
    return {k: v for k, v in arrays.items() if v is not None}


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "graphs").mkdir()
    np.savez(tmp_path / "graphs" / "cora.npz", **tiny())
    task = data.load("cora", root=tmp_path)
    check_graph(task.graphs["val"][0], task)
    assert task.num_classes == 2 and str(tmp_path) in task.source


def test_direction_of_adj_t(tmp_path):
    np.savez(tmp_path / "cora.npz", **tiny(edge_index=np.array([[0], [1]])))
    (graph,) = data.load("cora", root=tmp_path).graphs["train"]
    assert graph.adj_t.to_dense().nonzero().tolist() == [[1, 0]], "row = destination"


@pytest.mark.parametrize(
    "arrays, told",
    [
        (tiny(y=None), ["cora.npz", "has no y", "needed are edge_index, y, train_idx"]),
        (tiny(train_idx=None), ["has no train_idx"]),
        (tiny(x=None), ["has no x"]),
        (tiny(test_idx=np.array([1, 2])), ["train_idx, val_idx, test_idx overlap"]),
        (tiny(test_idx=np.array([4])), ["[0, 4)"]),
        (tiny(edge_index=np.array([[0], [4]])), ["edge_index", "[0, 4)"]),
        (tiny(x=np.eye(3)), ["x must have shape [4, F]", "(3, 3)"]),
        (tiny(y=np.array([0, -1, 0, 1])), ["y must be"]),
        (tiny(y=np.array([{}], object)), ["cora.npz", "unpickles nothing"]),
        (tiny(graph_ptr=np.array([0, 2, 4])), ["has no train_graphs"]),
        (
            tiny(
                graph_ptr=np.array([0, 1, 4]),
                train_graphs=np.array([0]),
                val_graphs=np.array([1]),
                test_graphs=np.array([], int),
            ),
            ["joins nodes of two graphs"],
        ),
    ],
)
def test_a_file_that_lacks_something(tmp_path, arrays, told):
    np.savez(tmp_path / "cora.npz", **arrays)
    with pytest.raises(ValueError) as caught:
        data.load("cora", root=tmp_path)
    for part in told:
        assert part in str(caught.value)


def several(**changes):
    """Two graphs of 4 nodes for each part."""
    edges = np.concatenate([tiny()["edge_index"] + 4 * g for g in range(6)], 1)
    parts = {f"{part}_graphs": np.array([2 * i, 2 * i + 1]) for i, part in enumerate(("train", "val", "test"))}
    arrays = {
        "edge_index": edges,
        "x": np.eye(24, 3),
        "y": np.arange(24) % 2,
        "graph_ptr": np.arange(0, 25, 4),
        **parts,
    }
    return {**arrays, **changes}


def bag(**changes):
    csr = {
        "x_data": np.ones(4, np.uint8),
        "x_indices": np.array([0, 1, 2, 0]),
        "x_indptr": np.arange(5),
        "x_shape": np.array([4, 3]),
    }
    return {**tiny(x=None), **csr, **changes}


LIES = np.array([0, 2**63 - 1, -2, 4, 4])  # the differences wrap


@pytest.mark.parametrize(
    "arrays, words",
    [
        (tiny(y=np.array(["a", "b", "a", "b"])), "y must have shape [N] of integers in [0, 1048576), got (4,) of <U1"),
        (tiny(y=np.array([0, 1, 0, 2**62])), "y must be in [0, 1048576), got 4611686018427387904"),
        (tiny(y=np.array(3)), "y must have shape [N]"),
        (tiny(y=np.array([0.0, np.nan, 1.0, 0.0])), "got (4,) of float64"),
        (tiny(y=np.zeros(0, int)), "y must have one class or more, got none"),
        (tiny(y=np.full((4, 2), 0.5)), "y must be 0 or 1 for each of N nodes and L labels, got shape (4, 2)"),
        (tiny(y=np.zeros((4, 0))), "y must be 0 or 1"),
        (
            tiny(edge_index=np.zeros((2, 3))),
            "edge_index must have shape [2, E] of integers in [0, 4), got (2, 3) of float64",
        ),
        (tiny(edge_index=np.zeros((3, 2), int)), "got (3, 2) of int64"),
        (
            tiny(edge_index=np.full((2, 1), 2**64 - 1, np.uint64)),
            "edge_index must be in [0, 4), got 18446744073709551615",
        ),
        (tiny(x=np.full((4, 3), np.nan)), "x[0, 0] must be finite in float32, got nan"),
        (tiny(x=np.full((4, 3), 1e300)), "x[0, 0] must be finite in float32, got 1e+300"),
        (tiny(x=np.zeros((4, 0))), "x must have one feature or more per node"),
        (tiny(x=np.zeros((4, 3), complex)), "x must have shape [4, F] of numbers, got (4, 3) of complex128"),
        (tiny(train_idx=np.zeros((1, 1), int)), "train_idx must have shape [n] of integers in [0, 4), got (1, 1)"),
        (tiny(val_idx=np.zeros(0, int)), "val_idx must hold one or more with nodes, got none"),
        (several(graph_ptr=np.array([0, 2**63 - 1, -2, 24, 24, 24, 24])), "graph_ptr must be in [0, 25), got -2"),
        (several(graph_ptr=np.array([0, 20, 4, 12, 16, 20, 24])), "graph_ptr must run from 0 to 24 and never decrease"),
        (several(graph_ptr=np.zeros(0, int)), "graph_ptr must run from 0 to 24"),
        (several(test_graphs=np.zeros(0, int)), "test_graphs must hold one or more with nodes, got none"),
        (bag(x_indptr=LIES), "x_indptr must be in [0, 5), got -2"),
        (bag(x_indptr=np.array([0, 3, 1, 4, 4])), "x_indptr must run from 0 to 4 and never decrease"),
        (bag(x_indptr=np.arange(4)), "x_indptr must have shape [5]"),
        (bag(x_indices=np.array([0, 1, 2, 3])), "x_indices must be in [0, 3), got 3"),
        (bag(x_indices=np.array([0, 1])), "x_indices must have shape [4]"),
        (bag(x_shape=np.array([4, 2**40])), "x_shape must be in [1, 2147483648), got 1099511627776"),
        (bag(x_shape=np.array([5, 3])), "x has 5 rows, but y has 4"),
        (bag(x_data=np.array([1.0, np.inf, 0, 1])), "x_data[1] must be finite"),
    ],
)
def test_a_file_with_something_wrong_in_it(tmp_path, arrays, words):
    name = "ppi" if "graph_ptr" in arrays else "cora"
    np.savez(tmp_path / f"{name}.npz", **arrays)
    with pytest.raises(DamagedFile) as caught:
        data.load(name, root=tmp_path)
    assert f"{tmp_path / name}.npz: " in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


def shape_arrays(**changes):
    return {"points": np.zeros((4, 5, 3)), "label": np.array([0, 1, 0, 1]), "split": np.array([0, 0, 1, 1]), **changes}


@pytest.mark.parametrize(
    "arrays, words",
    [
        (shape_arrays(points=np.zeros((4, 5))), "points must have shape [n, P, 3] of numbers, got (4, 5)"),
        (shape_arrays(points=np.full((4, 5, 3), np.inf)), "points[0, 0, 0] must be finite"),
        (shape_arrays(points=np.zeros((4, 0, 3))), "points must have one point or more"),
        (shape_arrays(label=np.array([0, 1, 0, 2**40])), "label must be in [0, 1048576), got 1099511627776"),
        (shape_arrays(label=np.array([0, 1])), "label must have shape [4]"),
        (shape_arrays(split=np.array(["a"] * 4)), "split must have shape [4] of integers"),
        (shape_arrays(surface_ijk=np.zeros((4, 5, 2))), "surface_ijk must have shape [4, P, 3]"),
        (shape_arrays(surface_ijk=np.zeros((4, 5, 3)), valid=np.ones(4)), "valid must be bool [4], got float64 [4]"),
    ],
)
def test_a_shape_file_with_something_wrong_in_it(tmp_path, arrays, words):
    np.savez(tmp_path / "modelnet40.npz", **arrays)
    with pytest.raises(DamagedFile) as caught:
        data.load("modelnet40", root=tmp_path)
    assert f"{tmp_path / 'modelnet40.npz'}: " in str(caught.value) and words in str(caught.value)


def changed(content, rng, kind):
    """One way in which bytes are damaged."""
    content, at = bytearray(content), rng.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "head":
        del content[: at + 1]
    else:
        content[at : at + 40] = rng.randbytes(40)
    return bytes(content)


@pytest.mark.parametrize("kind", ["flip", "cut", "head", "noise"])
@pytest.mark.parametrize("inside", [False, True])
def test_damaged_bytes_are_refused_in_one_line_or_change_nothing(tmp_path, kind, inside):
    """Of the file, or of one of the arrays in it, in which case the checksums of the zip are right."""
    rng, path = random.Random(0), tmp_path / "cora.npz"
    refused = 0
    for _ in range(40):
        buffer = io.BytesIO()
        rng.choice((np.savez, np.savez_compressed))(buffer, **bag())
        content = buffer.getvalue()
        if inside:
            with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer := io.BytesIO(), "w") as new:
                victim = rng.choice(old.namelist())
                for name in old.namelist():
                    part = old.read(name)
                    new.writestr(name, changed(part, rng, kind) if name == victim else part)
            content = buffer.getvalue()
        else:
            content = changed(content, rng, kind)
        path.write_bytes(content)
        try:
            data.load("cora", root=tmp_path)
        except DamagedFile as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        assert path.read_bytes() == content
    assert refused > 20


def test_checksums_that_are_no_text(tmp_path):
    np.savez(tmp_path / "cora.npz", **tiny())
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\xfe\x00" * 40)
    data.load("cora", root=tmp_path)


def task_of(graph, **changes):
    return data.Task(
        "own", "nodes", 3, 2, False, False, dict.fromkeys(("train", "val", "test"), (graph,)) | changes, "here"
    )


@pytest.mark.parametrize("key", ["x", "y", "adj_t", "train_mask", "test_mask"])
def test_a_graph_of_ones_own_that_lacks_something(tmp_path, key):
    np.savez(tmp_path / "cora.npz", **tiny())
    (graph,) = data.load("cora", root=tmp_path).graphs["train"]
    task_of(graph)
    del graph[key]
    with pytest.raises(
        ValueError, match=rf"own: a graph of the part '(train|test)' has no {key}: needed are x, y, edge_index"
    ):
        task_of(graph)


def test_a_task_of_ones_own_without_a_part(tmp_path):
    np.savez(tmp_path / "cora.npz", **tiny())
    (graph,) = data.load("cora", root=tmp_path).graphs["train"]
    with pytest.raises(ValueError, match=r"graphs must have one or more .* none under 'val'"):
        task_of(graph, val=[])
    graph.val_mask = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="val_mask holds no node"):
        task_of(graph)
    points = {part: torch.zeros(2, 5, 3) for part in ("train", "val", "test")}
    labels = {"train": torch.zeros(2), "val": torch.zeros(2)}
    with pytest.raises(ValueError, match="2 shapes and 0 labels for 'test'"):
        data.Task("own", "shapes", 3, 2, False, True, {}, "here", points, labels)


def test_a_shape_file_that_lacks_something(tmp_path):
    np.savez(tmp_path / "modelnet40.npz", points=np.zeros((2, 5, 3)), split=np.array([0, 1]))
    with pytest.raises(ValueError, match="has no label"):
        data.load("modelnet40", root=tmp_path)
    np.savez(tmp_path / "modelnet40.npz", points=np.zeros((2, 5, 3)), split=np.array([0, 2]), label=np.array([0, 1]))
    with pytest.raises(ValueError, match="split must be 0"):
        data.load("modelnet40", root=tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_checksum(tmp_path, beside):
    folder = tmp_path / "graphs"
    folder.mkdir()
    path = folder / "cora.npz"
    np.savez(path, **tiny())
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    sums = (folder if beside else tmp_path) / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  other.npz\n{right}  {path.relative_to(sums.parent)}\n")
    data.load("cora", root=tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    actual = hashlib.sha256(whole[:-100]).hexdigest()
    with pytest.raises(ValueError) as caught:
        data.load("cora", root=tmp_path)
    assert right in str(caught.value) and actual in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == whole[:-100], "left as it was"


@pytest.mark.parametrize("content", ["truncated", "empty", "text"])
def test_a_damaged_file_without_checksum(tmp_path, content):
    path = tmp_path / "cora.npz"
    np.savez(path, **tiny())
    damaged = {"truncated": path.read_bytes()[:-100], "empty": b"", "text": b"no zip"}[content]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="not a complete npz"):
        data.load("cora", root=tmp_path)
    assert path.read_bytes() == damaged


def test_a_full_disk_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    from fastkd.data import files

    path = tmp_path / "cora.npz"
    files.write(path, tiny())
    kept = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(kept) == {path, tmp_path / "SHA256SUMS"}

    def full(file, **arrays):
        pathlib.Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.np, "savez_compressed", full)
    with pytest.raises(OSError, match=r"cora.npz could not be written \(No space left.*FASTKD_CACHE"):
        files.write(path, tiny(x=np.ones((4, 3))))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("name", ["cora", "modelnet40", "twitch7", "tu:MUTAG", "hs_ppi_node2vec", "shapes69"])
def test_not_found(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FASTKD_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name)
    told = str(caught.value)
    assert str(tmp_path / "data") in told and str(tmp_path / "cache") in told and "FASTKD_DATA" in told
    assert ("no download" if name in ("hs_ppi_node2vec", "shapes69") else "FASTKD_OFFLINE") in told


def test_unknown_names():
    with pytest.raises(ValueError, match=r"cora, citeseer.*tu:<NAME>.*got 'coraa' \(did you mean 'cora'\?\)"):
        data.load("coraa")
    with pytest.raises(ValueError, match="name must be one of"):
        data.load("tu:<NAME>")
    for name in ("tu:", "tu:../../x", "tu:/etc/x", "tu:a b", 5):
        with pytest.raises(ValueError, match=r"name must be one of .*got "):
            data.load(name)
    with pytest.raises(FileNotFoundError, match="root must be a folder"):
        data.load("cora", root="/nowhere")
    assert {"digits", "shapes69", "ogbn-arxiv", "ppi"} <= set(data.names())
