"""Data sets: ``load(name)`` finds the files, checks them, and gives a :class:`Task` of graphs or shapes;
``load_images(name)`` does the same for images, also of your own, and gives :class:`Images`.

Looked for, in this order: an ``.npz`` in `root` or in the folder ``$FASTKD_DATA`` (also in its
``graphs/``, ``shapes/`` and ``images/``), then in the cache (``$FASTKD_CACHE``, else ``~/.cache/fastkd``); else the
data set is downloaded by its class in PyTorch Geometric (or by ogb) into the cache and written there as
an ``.npz``. Raw files in their official format that already lie in ``<cache>/<name>/`` are used without
a download. ``FASTKD_OFFLINE=1`` forbids downloads.

Where a ``SHA256SUMS`` lies beside an ``.npz`` or in the folder that is searched, the file must have the
sum stated there. fastkd unpickles nothing; PyG's own Planetoid and Twitch classes do, when they convert
their official raw files. Nobody states sums for the downloads themselves.
"""

from __future__ import annotations

import re
from pathlib import Path

from .._text import installs, suggestion
from . import graphs, shapes
from .files import Task
from .images import Images
from .images import load as load_images
from .shapes import augment

__all__ = ["Images", "Task", "augment", "load", "load_images", "names"]


def names() -> list[str]:
    """What :func:`load` takes; ``tu:<NAME>`` stands for any TUDataset with node labels.

    >>> from fastkd import data
    >>> data.names()[:3]
    ['digits', 'cora', 'citeseer']
    """
    return [*graphs.SETS, "tu:<NAME>", *shapes.SETS]


def load(name: str, root: str | Path | None = None) -> Task:
    """A data set with its split.

    ====================  ================================================================================
    name                  what
    ====================  ================================================================================
    ``digits``            scikit-learn's 1,797 digits as a graph of 8 nearest neighbours in both directions
    ``cora``              and ``citeseer``, ``pubmed``: citations, the public split
    ``amazon_photo``      goods bought together; 20 / 30 / rest per class
    ``coauthor_cs``       authors; words are present or not; 20 / 30 / rest per class
    ``proteins_inductive``  1,113 proteins, 891 / 111 / 111; secondary structure of every node. One graph
                          per part, the disjoint union of its proteins, so that a step is one large product
    ``twitch7``           friendships in 7 countries: trained on DE, validated on ENGB, tested on the 5 others
                          (PyG's download is another edition: 6 countries, 128 features)
    ``hs_ppi_node2vec``   protein interactions, 50 labels, no features: x is the sparse identity
    ``ppi``               the 24 graphs of GraphSAGE: 20 / 2 / 2, 121 labels
    ``tu:<NAME>``         any TUDataset with node labels, 80 / 10 / 10 % of its graphs with seed 0, one
                          union per part; without attributes, x is the in-degree one-hot up to 31
    ``ogbn-arxiv``        and ``ogbn-products``: with ogb; citations are taken in both directions
    ``shapes69``          2,482 meshes of 69 classes, 1,024 surface points
    ``modelnet10``        from 24^3 voxels, each point at random in its voxel; or else from the meshes
    ``modelnet40``        1,024 points sampled on the official meshes
    ``digits_points``     the bright pixels of scikit-learn's digits as points (x, y, intensity)
    ====================  ================================================================================

    Features: bags of words (CSR in the file) have rows of sum 1 in cora, citeseer and pubmed, and of
    Euclidean length 1 elsewhere (coauthor_cs after setting counts to 1; with sums of 1, a GCN at the usual
    learning rates had learnt little of amazon_photo after 100 epochs); they are torch.sparse_csr where
    less than a tenth is not zero, else dense. Other features are standardised by mean and deviation over the
    training nodes, but those of digits, ppi and ogbn are as published. Shapes: centred, in the unit
    sphere; a tenth of each class of the official training part, drawn with seed 0, is for validation.

    Args:
        name: one of :func:`names`.
        root: folder to look in before the cache; None: ``$FASTKD_DATA``, if set.

    Raises:
        ValueError: unknown name (the message lists all), or a file that is damaged, has another checksum
            than stated, or lacks an array; it is left where it is.
        FileNotFoundError: not found and not to be downloaded; the message says where was looked and why.
        ImportError: a package is needed (torch-geometric, ogb, scikit-learn).

    >>> from fastkd import data
    >>> task = data.load("digits")
    >>> (graph,) = task.graphs["train"]
    >>> graph.x.shape, task.num_classes, int(graph.train_mask.sum())
    (torch.Size([1797, 64]), 10, 200)
    """
    try:
        import torch_geometric  # noqa: F401
    except ImportError as error:
        raise ImportError(f"fastkd.data.load needs torch-geometric: {installs('distill')}") from error
    if name in shapes.SETS:
        return shapes.load(name, root)
    # The name becomes part of paths in the cache.
    if name in graphs.SETS or re.fullmatch(r"tu:[\w-]+", str(name)):
        return graphs.load(name, root)
    raise ValueError(f"name must be one of {', '.join(names())}, got {name!r}{suggestion(name, names())}")
