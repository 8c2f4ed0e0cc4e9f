"""A few lines of every layout as it is published, and what they mean."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_kd.layouts import Record


def parquet(**columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


R = Record
PAIR = R("121352", None, ["2912791", "7282918"], None, [8.4407, -2.5], [True, False])
TEXT_PAIR = R(None, "what is x", None, ["x is y", "no"], [8.5, -2.5], [True, False])
PASSAGES = '[{"docid": "d1", "title": "A title", "text": "first"}, {"docid": "d2", "title": "", "text": "second"}]'
PROMPT = (
    "I will provide you with 3 passages, each indicated by a alphabetical identifier []. Rank the passages based on "
    "their relevance to the search query: how so?.\\n[A] one [1]\\n[B] two\\n[C] three\\n\\nSearch Query: how so?.\\n"
    "Rank the 3 passages above based on their relevance to the search query. Output e.g., [D] > [B], only."
)

# layout, file name, content, records; `None` for a layout of two files, which has its own test
PUBLISHED: list[tuple[str, str, str | bytes, list[Record]]] = [
    ("margin_mse", "train.tsv", "8.4407\t-2.5\t121352\t2912791\t7282918\n", [PAIR]),
    ("margin_mse_texts", "train.tsv", "8.5\t-2.5\twhat is x\tx is y\tno\n", [TEXT_PAIR]),
    ("splade_triples", "raw.tsv", "121352\t2912791\t7282918\t8.4407\t-2.5\n", [PAIR]),
    ("splade_triples_texts", "raw.tsv", "what is x\tx is y\tno\t8.5\t-2.5\n", [TEXT_PAIR]),
    (
        "hard_negatives",
        "new.jsonl",
        '{"qid": 571018, "pos": [7349777], "neg": {"bm25": [1, 2], "tas-b": [2, 3]}}\n',
        [R("571018", None, ["7349777", "1", "2", "3"], positive=[True, False, False, False])],
    ),
    (
        "hard_negatives",
        "old.jsonl",
        '{"qid": 5, "pos": [{"pid": 7, "ce-score": 9.5}], "neg": {"bm25": [{"pid": 8, "ce-score": -3}]}}\n',
        [R("5", None, ["7", "8"], None, [9.5, -3.0], [True, False])],
    ),
    (
        "score_pickle",
        "scores.pkl",
        pickle.dumps({571018: {7349777: 9.5, 1: -3.25}, 5: {2: 0.5}}),
        [R("571018", None, ["7349777", "1"], None, [9.5, -3.25]), R("5", None, ["2"], None, [0.5])],
    ),
    (
        "d2llm",
        "pairs.pkl",
        pickle.dumps({"why": [("because", [3.0, 1.0]), ("no", [-1.0, 0.5])]}),
        [R(None, "why", None, ["because", "no"], [2.0, -1.5])],
    ),
    (
        "colbert",
        "examples.json",
        "[571018, [7349777, 9.5], [1, -3.25], [2, 0]]\n[5, 7, 8]\n",
        [
            R("571018", None, ["7349777", "1", "2"], None, [9.5, -3.25, 0.0], [True, False, False]),
            R("5", None, ["7", "8"], positive=[True, False]),
        ],
    ),
    (
        "colbert_scorer",
        "scores.json",
        "[571018, [[9.5, 7349777], [-3.25, 1]]]\n",
        [R("571018", None, ["7349777", "1"], None, [9.5, -3.25])],
    ),
    (
        "pairdistill",
        "pairs.train.jsonl",
        f"[9, [70, -0.1, [[1, {math.log(0.5)!r}], [2, 0.0]]], [71, -0.5, []], [72, -3, [[1, {math.log(0.25)!r}]]]]\n",
        [
            R(
                "9",
                None,
                ["70", "71", "72"],
                None,
                [-0.1, -0.5, -3.0],
                preferences=[(0, 1, 0.5), (0, 2, 1.0), (2, 1, 0.25)],
            )
        ],
    ),
    (
        "pairdistill_pointwise",
        "point.tsv",
        "9\t70\t2.0\t-1.5\n9\t71\t0.0\t1.0\n8\t70\t1.0\t0.0\n",
        [R("9", None, ["70", "71"], None, [3.5, -1.0]), R("8", None, ["70"], None, [1.0])],
    ),
    (
        "pairdistill_pairwise",
        "pair.tsv",
        "9\t70\t71\t1.5\t1.5\n9\t70\t72\t800.0\t0.0\n",
        [R("9", None, ["70", "71", "72"], preferences=[(0, 1, 0.5), (0, 2, 1.0)])],
    ),
    (
        "tevatron",
        "train.jsonl",
        f'{{"query_id": "q1", "query": "why", "positive_passages": {PASSAGES}, "negative_passages": []}}\n'
        '{"query_id": 2, "query_text": "how", "positive_passages": [{"docid": 3, "text": "so", "score": 1.5}], '
        '"negative_passages": [{"docid": 4, "text": "no", "score": -1}]}\n',
        [
            R("q1", "why", ["d1", "d2"], ["A title first", "second"], None, [True, True]),
            R("2", "how", ["3", "4"], ["so", "no"], [1.5, -1.0], [True, False]),
        ],
    ),
    (
        "tevatron_megatron",
        "distil.jsonl",
        f'{{"query_id": "q1", "query": "why", "passages": {PASSAGES}, "scores": [9.25, -3]}}\n',
        [R("q1", "why", None, ["A title first", "second"], [9.25, -3.0], [True, False])],
    ),
    (
        "tevatron_run",
        "run.txt",
        "q1\td2\t3.5\nq1\td1\t1.5\nq2\td1\t0\n",
        [R("q1", None, ["d2", "d1"], None, [3.5, 1.5]), R("q2", None, ["d1"], None, [0.0])],
    ),
    (
        "pylate",
        "train.jsonl",
        '{"query_id": 1, "document_ids": "[2, 3]", "scores": "[0.9, 0.1]"}\n'
        '{"query_id": "4", "document_ids": [5], "scores": [1]}\n',
        [R("1", None, ["2", "3"], None, [0.9, 0.1]), R("4", None, ["5"], None, [1.0])],
    ),
    (
        "pylate",
        "train.parquet",
        parquet(query_id=[1, 4], document_ids=[[2, 3], [5]], scores=[[0.75, 0.5], [1.0]]),
        [R("1", None, ["2", "3"], None, [0.75, 0.5]), R("4", None, ["5"], None, [1.0])],
    ),
    (
        "flag_embedding",
        "toy.jsonl",
        '{"query": "why", "pos": ["so"], "neg": ["no", "nay"], "pos_scores": [9.5], "neg_scores": [1, -2]}\n'
        '{"query": "why", "pos": ["so"], "neg": ["no"]}\n',
        [
            R(None, "why", None, ["so", "no", "nay"], [9.5, 1.0, -2.0], [True, False, False]),
            R(None, "why", None, ["so", "no"], None, [True, False]),
        ],
    ),
    (
        "opensearch",
        "train.jsonl",
        '{"query": "1", "docs": ["2", "3"], "scores": [9.5, 1]}\n{"query": 1, "pos": 2, "negs": ["3"]}\n',
        [R("1", None, ["2", "3"], None, [9.5, 1.0]), R("1", None, ["2", "3"], positive=[True, False])],
    ),
    (
        "opensearch_texts",
        "train.jsonl",
        '{"query": "why", "docs": ["so", "no"], "scores": [9.5, 1]}\n{"query": "why", "pos": "so", "negs": ["no"]}\n',
        [R(None, "why", None, ["so", "no"], [9.5, 1.0]), R(None, "why", None, ["so", "no"], positive=[True, False])],
    ),
    (
        "opensearch_scores",
        "scores.json",
        '{"1": {"doc_id": ["2", "3"], "score": [9.5, 1]}, "4": {"doc_id": [], "score": []}}',
        [R("1", None, ["2", "3"], None, [9.5, 1.0]), R("4", None, [], None, [])],
    ),
    (
        "splade_json",
        "scores.json",
        '{"1": {"2": 9.5, "3": 1}, "4": {"5": -0.5}}',
        [R("1", None, ["2", "3"], None, [9.5, 1.0]), R("4", None, ["5"], None, [-0.5])],
    ),
    (
        "rankllm",
        "train.json",
        f'[{{"id": "1", "conversations": [{{"from": "system", "value": "You are RankLLM"}}, {{"value": "{PROMPT}"}}, '
        '{"value": "[B] > [C] > [A]"}]}]',
        [R(None, "how so?", None, ["one [1]", "two", "three"], ranking=[1, 2, 0])],
    ),
    (
        "trec",
        "run.trec",
        "q1 Q0 d2 1 3.5 x\nq1 Q0 d1 2 -1.5 x\nq2 Q0 d1 1 0 x\n",
        [R("q1", None, ["d2", "d1"], None, [3.5, -1.5]), R("q2", None, ["d1"], None, [0.0])],
    ),
    (
        "rank_distillm",
        "judged.parquet",
        parquet(qid=["1", "1", "2"], docno=["5", "6", "5"], score=[3.0, 2.0, 1.0]),
        [R("1", None, ["5", "6"], None, [3.0, 2.0]), R("2", None, ["5"], None, [1.0])],
    ),
    (
        "pairs",
        "scores.parquet",
        parquet(query_id=["1", "1", "2"], document_id=["5", "6", "5"], score=[3.0, 2.0, 1.0]),
        [R("1", None, ["5", "6"], None, [3.0, 2.0]), R("2", None, ["5"], None, [1.0])],
    ),
    ("msmarco_collection", "collection.tsv", "0\tA text.\n", [R(None, None, ["0"], ["A text."])]),
    ("msmarco_queries", "queries.dev.tsv", "1048585\twhat is x\n", [R("1048585", "what is x")]),
    (
        "msmarco_qrels",
        "qrels.dev.tsv",
        "1\t0\t2\t1\n1\t0\t3\t0\n4 0 5 3\n",
        [R("1", None, ["2", "3"], positive=[True, False]), R("4", None, ["5"], positive=[True])],
    ),
    (
        "msmarco_triples",
        "triples.train.small.tsv",
        "what is x\tx is y\tno\n",
        [R(None, "what is x", None, ["x is y", "no"], positive=[True, False])],
    ),
    (
        "msmarco_top1000",
        "top1000.dev.tsv",
        "1\t2\twhat is x\tx is y\n1\t3\twhat is x\tno\n",
        [R("1", "what is x", ["2", "3"], ["x is y", "no"])],
    ),
    (
        "msmarco_run",
        "run.tsv",
        "1\t8\t1\n1\t7\t2\n2\t7\t1\n",
        [R("1", None, ["8", "7"], ranking=[0, 1]), R("2", None, ["7"], ranking=[0])],
    ),
    (
        "fid",
        "train.json",
        '[{"id": "0", "question": "why", "answers": ["so"], "ctxs": [{"id": "12", "title": "A title", '
        '"text": "first", "score": "81.5"}]}, {"question": "how", "answers": [], "ctxs": [{"text": "x"}]}]',
        [R("0", "why", ["12"], ["A title first"], [81.5]), R(None, "how", None, ["x"])],
    ),
    (
        "fid",
        "train.jsonl",
        '{"question": "how", "ctxs": [{"title": "", "text": "x", "score": -1.5}]}\n',
        [R(None, "how", None, ["x"], [-1.5])],
    ),
    (
        "syntriever",
        "prefs.jsonl",
        '{"query": "why", "positive_passage": "so", "negative_passage": "no"}\n',
        [R(None, "why", None, ["so", "no"], preferences=[(0, 1, 1.0)])],
    ),
    (
        "prod",
        "train.json",
        '[{"query_id": "1", "query_string": "why", "pos_id": ["2"], "neg_id": ["3", "4"]}]',
        [R("1", "why", ["2", "3", "4"], positive=[True, False, False])],
    ),
    (
        "lead",
        "train.json",
        '[{"question": "why", "positive_ctxs": [2], "hard_negative_ctxs": ["3"]}]',
        [R(None, "why", ["2", "3"], positive=[True, False])],
    ),
]

# layout, a bad line of a file that is read by lines, what the error says
MALFORMED: list[tuple[str, str, str]] = [
    ("margin_mse", "1.0\t2.0\t3\t4", "4 tab-separated cells, not 5"),
    ("margin_mse", "1.0\t2.0\t3\t4\t5\t6", "6 tab-separated cells, not 5"),
    ("margin_mse", "1.0\tx\t3\t4\t5", "'x' is not a finite number"),
    ("margin_mse", "1.0\tnan\t3\t4\t5", "'nan' is not a finite number"),
    ("splade_triples", "1.0\t2.0\tq\tp\tn", "'p' is not a finite number"),  # the other order of cells
    ("margin_mse_texts", "1 2 3 4 5", "1 tab-separated cells"),
    ("splade_triples_texts", "q\tp\tn\t1", "4 tab-separated cells"),
    ("hard_negatives", '{"qid": 1, "pos": [2]}', "there is no 'neg'"),
    ("hard_negatives", '{"qid": 1, "pos": [2], "neg": [3]}', "'neg' is [3], not an object"),
    ("hard_negatives", '{"pos": [2], "neg": {}}', "None is not an id"),
    ("hard_negatives", '{"qid": 1, "pos": [{"pid": 2}], "neg": {}}', "None is not a number"),
    ("hard_negatives", '{"qid": 1, "pos": [2], "neg": {"a": [{"pid": 3, "ce-score": 1}]}}', "others have none"),
    ("colbert", "[1]", "is not a list of a query and its documents"),
    ("colbert", '{"a": 1}', "is not a list"),
    ("colbert", "[1, [2, 0.5], [3]]", "[3] is not [pid, score]"),
    ("colbert", "[1, [2, 0.5], 3]", "3 is not [pid, score]"),
    ("colbert", "[1, [[0.5, 2], [0.25, 3]]]", "read layout colbert_scorer"),
    ("colbert", "[1, [0.5, 2]]", "is not [pid, score]"),
    ("colbert", '[1, [2, "x"]]', "'x' is not a finite number"),
    ("colbert", "[1, [2, NaN]]", "nan is not a finite number"),
    ("colbert", "[1, [2, true]]", "True is not a number"),
    ("colbert", "[1.5, [2, 1]]", "1.5 is not an id"),
    ("colbert", "[1, [2, 1]", "not JSON"),
    ("colbert_scorer", "[1, [2, 0.5], [3, 0.25]]", "is not a list of a query and one list"),
    ("colbert_scorer", "[1, [2, 0.5]]", "read layout colbert"),
    ("colbert_scorer", "[1, [[0.5, 2.5]]]", "2.5 is not an id"),
    ("pairdistill", "[1, [2, 0.5]]", "is not [pid, score, pairs]"),
    ("pairdistill", "[1, [2, 0.5, [[1, -1.0]]]]", "item 0 is compared with item 1 of 1"),
    ("pairdistill", "[1, [2, 0.5, [[0, -1.0]]]]", "item 0 is compared with item 0"),
    ("pairdistill", "[1, [2, 0.5, [[1, 0.7]]], [3, 0.1, []]]", "0.7 is above 0"),
    ("pairdistill", "[1, [2, 0.5, [[1.0, -0.7]]], [3, 0.1, []]]", "is not [j, log P]"),
    ("pairdistill_pointwise", "1\t2\t3", "3 tab-separated cells, not 4"),
    ("pairdistill_pairwise", "1\t2\t3\t4\tx", "'x' is not a finite number"),
    ("tevatron", '{"query_id": "1", "query": "q", "positive_passages": []}', "there is no 'negative_passages'"),
    ("tevatron", '{"query_id": "1", "positive_passages": [], "negative_passages": []}', "None is not a text"),
    (
        "tevatron",
        '{"query_id": "1", "query": "q", "positive_passages": [{"docid": "1", "text": 1}], "negative_passages": []}',
        "'text' is 1, not a string",
    ),
    (
        "tevatron",
        '{"query_id": "1", "query": "q", "positive_passages": [{"docid": "1", "text": "a", "score": 1}], '
        '"negative_passages": [{"docid": "2", "text": "b"}]}',
        "some passages have a score, others have none",
    ),
    (
        "tevatron_megatron",
        '{"query_id": "1", "query": "q", "passages": [{"text": "a"}], "scores": [1, 2]}',
        "scores [1, 2] for 1 documents",
    ),
    ("tevatron_run", "1 2 3", "1 tab-separated cells, not 3"),
    ("pylate", '{"query_id": 1, "document_ids": "[2, 3", "scores": "[1, 2]"}', "'[2, 3' is not a list"),
    ("pylate", '{"query_id": 1, "document_ids": "exit()", "scores": "[1]"}', "malformed node"),
    ("pylate", '{"query_id": 1, "document_ids": [2, 3], "scores": [1]}', "scores [1] for 2 documents"),
    ("pylate", "[1, 2]", "is not an object"),
    ("flag_embedding", '{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1]}', "scores None for 1 documents"),
    ("flag_embedding", '{"query": "q", "pos": [1], "neg": ["b"]}', "1 is not a text"),
    ("opensearch", '{"query": "1", "docs": ["2"]}', "scores None for 1 documents"),
    ("opensearch", '{"docs": ["2"], "scores": [1]}', "is not an object with a 'query'"),
    ("opensearch", '{"query": "1"}', "None is not an id"),
    ("opensearch_texts", '{"query": "q", "docs": [2], "scores": [1]}', "2 is not a text"),
    ("rankllm", '{"id": "1"}', "there is no 'conversations'"),
    ("rankllm", '{"conversations": [{"value": "a"}, {"value": "b"}]}', "2 turns, not system, prompt and answer"),
    ("rankllm", '{"conversations": [{"value": "a"}, {"value": "b"}, {"value": "[A]"}]}', "the prompt has no"),
    (
        "rankllm",
        '{"conversations": [{"value": ""}, {"value": "[A] x\\n[C] y\\nSearch Query: q.\\nRank the "}, {"value": ""}]}',
        "labelled A, C, not one after the other",
    ),
    ("trec", "q1 Q0 d2 1 3.5", "5 fields, not 6"),
    ("trec", "q1 Q0 d2 1 inf x", "'inf' is not a finite number"),
    ("msmarco_collection", "1", "1 tab-separated cells, not 2"),
    ("msmarco_queries", "1\tq\tx", "3 tab-separated cells, not 2"),
    ("msmarco_qrels", "1\t0\t2", "3 fields, not 4"),
    ("msmarco_qrels", "1\t0\t2\tx", "invalid literal"),
    ("msmarco_triples", "a\tb", "2 tab-separated cells, not 3"),
    ("msmarco_top1000", "a\tb\tc", "3 tab-separated cells, not 4"),
    ("msmarco_run", "1\t2\tfirst", "invalid literal"),
    ("fid", '{"question": "q"}', "there is no 'ctxs'"),
    ("fid", '{"question": "q", "ctxs": ["x"]}', "'x' is not an object"),
    (
        "fid",
        '{"question": "q", "ctxs": [{"text": "a", "score": 1}, {"text": "b"}]}',
        "some contexts have a score, others have none",
    ),
    ("syntriever", '{"query": "q", "positive_passage": "a"}', "there is no 'negative_passage'"),
    ("prod", '{"query_id": "1", "query_string": "q", "pos_id": "2", "neg_id": []}', "'pos_id' is '2', not a list"),
    ("lead", '{"question": "q", "positive_ctxs": [1]}', "there is no 'hard_negative_ctxs'"),
    ("pairs", '{"query_id": "1", "document_id": "2"}', "lacks a column"),
    ("rank_distillm", '{"qid": "1", "docno": "2", "score": null}', "None is not a number"),
]
