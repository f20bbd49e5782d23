"""The search tool: BM25 over a local corpus, ranked by the package bm25s."""

from pathlib import Path

import numpy as np

from gtpo.tools.corpus import read_passages
from gtpo.tools.function import FunctionTool
from gtpo.tools.source import ToolSource, optional_package, shared
from gtpo.tools.words import words_of


class PassageIndex:
    """Ranks `passages` by BM25 (Lucene's form, k1 1.5, b 0.75) over `words_of`; ties keep the order.

    Source: arXiv 2407.03618 (bm25s).
    """

    def __init__(self, passages: list[str]) -> None:
        bm25s = optional_package("bm25s", tool="search")
        self._stop_words = frozenset(bm25s.stopwords.STOPWORDS_EN)
        self._passages = passages
        self._ranking = bm25s.BM25()
        self._ranking.index([words_of(passage) for passage in passages], show_progress=False)

    def best(self, query: str, *, num: int) -> list[str]:
        """At most `num` passages that share a word with `query`, best first. English words such as "the" count where
        the query has no others that some passage has."""
        known = [word for word in words_of(query) if word in self._ranking.vocab_dict]
        words = [word for word in known if word not in self._stop_words] or known
        if not words:
            return []
        scores = self._ranking.get_scores(words)
        num = min(num, len(scores))
        # only the candidates are sorted: a corpus may have millions of passages
        least = np.partition(scores, len(scores) - num)[len(scores) - num]
        candidates = np.flatnonzero((scores >= least) & (scores > 0))
        order = candidates[np.argsort(-scores[candidates], kind="stable")][:num]
        return [self._passages[i] for i in order]


def search_source(
    name: str,
    *,
    corpus: Path,
    description: str = "Search a collection of texts for passages that share words with a query.",
    fields: tuple[str, ...] = ("text",),
    num_results: int = 3,
    max_passage_chars: int = 500,
    timeout_s: float = 10.0,
) -> ToolSource:
    """A tool of kind "search". The corpus is read and indexed here, before the run starts.

    corpus and fields: as `read_passages` takes them. num_results: passages that a call returns at most.
    """
    for key, value, least in (("num_results", num_results, 1), ("max_passage_chars", max_passage_chars, 20)):
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    if not fields:
        raise ValueError("fields must name at least one field, got none")
    index = PassageIndex(read_passages(corpus, fields=fields, max_chars=max_passage_chars))

    def search(query: str) -> str:
        """Search.

        Args:
            query: Words to look for.
        """
        found = index.best(query, num=num_results)
        if not found:
            return "No passage has a word of the query. Try other words."
        return "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(found, start=1))

    # bounded already: each passage with its number and the blank line behind it
    max_chars = num_results * (max_passage_chars + 20)
    return shared(FunctionTool(search, name=name, description=description, timeout_s=timeout_s, max_chars=max_chars))
