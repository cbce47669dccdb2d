"""Whether a model tells sets of text apart: embeddings of samples, their map, and two numbers.

Source: figure 2 of arXiv 2406.12397, where the last hidden states of synthetic and real text, brought to two
dimensions by t-SNE, lie in different regions. A map shows that but does not measure it; the accuracy of a
linear classifier and the overlap of neighbourhoods, both in the full space, do.

Legend: N samples, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FOLDS = 5
NEIGHBOURS = 10
# Fewer samples than this leave a fold, or a neighbourhood, without any.
MIN_SAMPLES = 20
# Dimensions that t-SNE is given (by PCA), as its authors do; in 2,000 the distances are noise and slow.
_PCA = 50


@dataclass(frozen=True)
class Separation:
    """How far apart two sets lie.

    Attributes:
        accuracy: share of the samples, averaged over both sets, that a linear classifier puts right which
            was fitted without them. 0.5 is chance, 1 is complete separation.
        accuracy_deviation: standard deviation over the folds.
        overlap: share of a sample's 10 nearest neighbours that are of the other set, over the share there
            would be if the sets were mixed: 0 for sets apart, 1 for mixed ones.
    """

    accuracy: float
    accuracy_deviation: float
    overlap: float


def separation(first: np.ndarray, second: np.ndarray, *, seed: int) -> Separation:
    """Measure how far apart two sets of embeddings lie.

    Args:
        first: ``[N1, H]``.
        second: ``[N2, H]``.
        seed: of the folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    points = np.concatenate((first, second)).astype(np.float64)
    labels = np.repeat((0, 1), (len(first), len(second)))
    # Equal texts go into one fold. Apart, the classifier would have seen the answer, or its opposite.
    _, twins = np.unique(points, axis=0, return_inverse=True)
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    scores = cross_val_score(
        classifier,
        points,
        labels,
        groups=twins.ravel(),
        cv=StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed),
        scoring="balanced_accuracy",
    )
    return Separation(
        accuracy=float(scores.mean()),
        accuracy_deviation=float(scores.std()),
        overlap=_overlap(StandardScaler().fit_transform(points), labels),
    )


def _overlap(points: np.ndarray, labels: np.ndarray) -> float:
    """Share of neighbours from the other set, over the share in a mixture; averaged over both sets."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(points)
    # Asked without points, a sample is not among its own neighbours.
    neighbours = nearest.kneighbors(return_distance=False)
    other = (labels[neighbours] != labels[:, None]).mean(axis=1)
    parts = []
    for label in (0, 1):
        others = (labels != label).sum()
        parts.append(other[labels == label].mean() / (others / (len(labels) - 1)))
    return float(np.mean(parts))


def map_to_plane(points: np.ndarray, *, seed: int) -> np.ndarray:
    """t-SNE of embeddings.

    Args:
        points: ``[N, H]``.
        seed: of its start.

    Returns:
        fp32 ``[N, 2]``. Only who is near whom means something there: not distances, not sizes.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit_transform(points)
    size = min(_PCA, *scaled.shape)
    reduced = PCA(size, random_state=seed).fit_transform(scaled)
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
