"""The words of 20 Newsgroups, and the order in which documents were posted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from hyperax.fewshot.datasets.sources import find

_FILE = "20news-bydate_py3.pkz"
_ADVICE = (
    "get it with sklearn.datasets.fetch_20newsgroups(data_home=FOLDER), which leaves it in FOLDER, and name FOLDER"
)


class Documents(NamedTuple):
    """Words of each document as tf-idf, its group, and its age.

    Fields:
        x: CSR [n, d]. y: [n].
        age: [n] in [0, 1), the place of a document among those of its group in the order in which they were posted.
    """

    x: Any
    y: np.ndarray
    age: np.ndarray


class Corpus(NamedTuple):
    """What is trained and validated on, what is tested on, and the words."""

    train: Documents
    test: Documents
    words: np.ndarray
    groups: tuple[str, ...]


def read_corpus(data_dir: str | None, split: str) -> tuple[Corpus, str]:
    """Tf-idf of the documents, from scikit-learn's file of them, and its SHA-256.

    Arguments:
        data_dir: the folder that holds `20newsgroups/`, or the file itself; else the environment variable HYPERAX_DATA.
        split: "test", or "validation": the newest fifth of the training set in place of the test set.

    Raises: `ValueError` if the file is missing or damaged.
    Cost: 8 seconds, most of them for counting words.
    """
    from sklearn.datasets import fetch_20newsgroups
    from sklearn.feature_extraction.text import TfidfVectorizer

    path = find("20newsgroups", [_FILE], data_dir, _ADVICE)
    try:
        train, test = (
            fetch_20newsgroups(data_home=path.parent, subset=side, shuffle=False, download_if_missing=False)
            for side in ("train", "test")
        )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {_ADVICE}") from error
    train, test = cast(Any, train), cast(Any, test)  # typed as pairs of arrays as well
    texts, y, age = np.array(train.data, object), np.asarray(train.target), _ages(train)
    late_texts, late_y, late_age = np.array(test.data, object), np.asarray(test.target), _ages(test)
    if split == "validation":
        old, new = age < 0.8, age >= 0.8
        late_texts, late_y, late_age = texts[new], y[new], age[new]
        texts, y, age = texts[old], y[old], age[old] / 0.8
    vectorizer = TfidfVectorizer()
    x = vectorizer.fit_transform(texts)
    corpus = Corpus(
        Documents(x, y, age),
        Documents(vectorizer.transform(late_texts), late_y, late_age),
        vectorizer.get_feature_names_out(),
        tuple(train.target_names),
    )
    return corpus, hashlib.sha256(path.read_bytes()).hexdigest()


def _ages(documents: Any) -> np.ndarray:
    """The place of each document among those of its group, by article number (the name of its file)."""
    number = np.array([int(Path(name).name) for name in documents.filenames])
    age = np.zeros(len(number))
    for group in np.unique(documents.target):
        of_group = np.flatnonzero(documents.target == group)
        age[of_group[np.argsort(number[of_group], kind="stable")]] = np.arange(len(of_group)) / len(of_group)
    return age
