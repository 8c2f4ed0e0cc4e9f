"""Aliases of metric names."""

import pytest

from retrieval_kd.metrics import STANDARD, Metric, parse_metric
from retrieval_kd.types import InputError

ALIASES = {
    "nDCG@10": "nDCG@10 ndcg_cut_10 ndcg_cut.10 NDCG@10 ndcg_at_10 dot_ndcg@10 cosine_ndcg@10 "
    "NanoBEIR_mean_cosine_ndcg@10",
    "MRR@10": "MRR@10 RR@10 mrr_at_10 cosine_mrr@10 NanoMSMARCO_dot_mrr@10",
    "R@100": "R@100 Recall@100 recall_100 recall.100 recall_at_100 cosine_recall@100",
    "R@1000": "R@1000 recall_1000 r@1000 R@1K",
    "MAP": "MAP map AP",
    "MAP@100": "map_cut_100 MAP@100 cosine_map@100 map_at_100",
    "MRR": "recip_rank RR mrr",
    "nDCG": "ndcg",
    "R(rel=2)@1000": "R(rel=2)@1000 recall(rel=2)@1000",
    "MRR(rel=2)@10": "RR(rel=2)@10 MRR(rel=2)@10",
    "MAP(rel=2)": "AP(rel=2)",
}
SPACED = {  # trec_eval's options
    "recip_rank -M 10": "MRR@10",
    "map -M 100 -l 2": "MAP(rel=2)@100",
    "recall_1000 -l 2": "R(rel=2)@1000",
    "recall.1000 -l 2": "R(rel=2)@1000",
}


@pytest.mark.parametrize(
    ("name", "canonical"), [(name, one) for one, names in ALIASES.items() for name in names.split()] + [*SPACED.items()]
)
def test_every_alias_prints_one_name(name: str, canonical: str) -> None:
    assert str(parse_metric(name)) == canonical
    assert str(parse_metric(canonical)) == canonical


def test_kind_and_cutoff() -> None:
    assert parse_metric("recall_1000") == Metric("R", 1000)
    assert parse_metric("recip_rank") == Metric("MRR", None)
    assert parse_metric("RR(rel=2)@10") == Metric("MRR", 10, 2)


def test_standard_is_canonical() -> None:
    assert tuple(str(parse_metric(name)) for name in STANDARD) == STANDARD


@pytest.mark.parametrize(
    ("name", "guess"),
    [("ncdg@10", "nDCG@10"), ("recal@50", "R@50"), ("mmr_10", "MRR@10"), ("mapp", "MAP"), ("ndgc_cut_20", "nDCG@20")],
)
def test_a_mistyped_name_is_guessed(name: str, guess: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{guess}'"):
        parse_metric(name)


@pytest.mark.parametrize(
    "name",
    ["precision@1", "nDCG@0", "nDCG@", "R(rel=0)@1000", "R@1000(rel=2)", "ndcg@10x", "xndcg@10", "", "my_ndcg@10"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="there is no metric"):
        parse_metric(name)


def test_recall_needs_a_cutoff() -> None:
    with pytest.raises(InputError, match="how deep"):
        parse_metric("recall")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nDCG(rel=2)@10", "gains of nDCG are the grades"),
        ("ndcg_cut_10 -l 2", "gains of nDCG are the grades"),
        ("recip_rank@5 -M 10", "two cutoffs, 5 and 10"),
        ("R(rel=2)@10 -l 1", "two relevant grades, 2 and 1"),
    ],
)
def test_contradictions_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_metric(name)
