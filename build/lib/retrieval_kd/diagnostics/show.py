"""A diagnosis to look at: rows of tables, and a figure of histograms and agreement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.diagnostics.teachers import END, Agreement, TeacherStats, coarse
from retrieval_kd.figures import ABSENT
from retrieval_kd.files import atomic

BARS = 64  # of a histogram in the figure
OF_DOCUMENTS = (("relevant", "C2"), ("judged not relevant", "C3"), ("not judged", "0.55"))


def teacher_rows(teachers: Mapping[str, TeacherStats]) -> list[list[str]]:
    """The table of teachers: a row a measure, a column a teacher; measures that none has are left out."""
    at: dict[str, Callable[[TeacherStats], str]] = {
        "pairs": lambda s: f"{s.pairs:,}",
        "asked in vain (NaN)": lambda s: f"{s.pairs - s.answered:,}",
        "queries": lambda s: f"{s.queries:,}",
        "queries covered": lambda s: _share(s.coverage),
        "relevant documents scored": lambda s: (
            ABSENT if s.relevant is None else f"{s.relevant_scored:,} of {s.relevant:,}"
        ),
        "documents a query, min / median / max": lambda s: (
            f"{s.documents_min:,} / {s.documents_median:,g} / {s.documents_max:,}"
        ),
        "min / max": lambda s: f"{_number(s.min)} / {_number(s.max)}",
        "5 / 25 / 50 / 75 / 95 %": lambda s: " / ".join(map(_number, s.quantiles.values())),
        "mean, std": lambda s: f"{_number(s.mean)}, {_number(s.std)}",
        f"saturated (within {END:.1%} of an end)": lambda s: _share(s.saturated_low + s.saturated_high),
        "tied pairs in lists": lambda s: _share(s.tied),
        "AUC, relevant over others": lambda s: _number(s.auc),
        "mean margin, relevant over others": lambda s: _number(s.margin),
        "nDCG@10 of its order": lambda s: _number(s.ndcg),
        "softmax at 1: nats, share of the list": lambda s: f"{_number(s.entropy)}, {_share(s.effective)}",
        "suggested scale (margins within 1)": lambda s: _number(s.scale),
        "suggested teacher_temperature": lambda s: _number(s.temperature),
    }
    rows = [[measure, *(cell(stats) for stats in teachers.values())] for measure, cell in at.items()]
    return [row for row in rows if set(row[1:]) != {ABSENT}]


def agreement_rows(agreements: Sequence[Agreement]) -> list[list[str]]:
    """The table of each two teachers: their names, shared pairs and queries, tau, overlap."""
    return [
        [" / ".join(one.teachers), f"{one.pairs:,}", f"{one.queries:,}", _number(one.kendall_tau), _share(one.overlap)]
        for one in agreements
    ]


def parity_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table of two engines: what `Parity.facts` says, a row a measure."""
    ndcg = found["ndcg"]
    return [
        ("pairs, lists", f"{found['pairs']:,}, {found['lists']:,}"),
        ("answered by one alone", f"{found['unanswered']:,}"),
        ("spread of the first's scores", f"{found['spread']:.4g}"),
        ("largest error", f"{found['max_error']:.4g}"),
        ("mean error", f"{found['mean_error']:.4g}"),
        ("Kendall's tau, mean of the lists", _tau(found["kendall_tau"])),
        ("the worst list's", _tau(found["worst_tau"])),
        ("nDCG@10", f"{ndcg[0]:.4f} -> {ndcg[1]:.4f} ({found['ndcg_change']:+.4f})" if ndcg else "no qrels"),
    ]


def plot(
    path: Path,
    teachers: Mapping[str, TeacherStats],
    agreements: Sequence[Agreement],
    counts: Mapping[str, NDArray[np.int64]],
    title: str,
) -> None:
    """Write a PNG: a histogram of each teacher's scores, by what the qrels say, and Kendall's tau of each two.

    Every histogram has its own area of 1, so that few relevant documents can be seen beside many others.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len(teachers) + bool(agreements)
    across = 2 if panels == 4 else min(panels, 3)
    down = -(-panels // across)
    figure = Figure(figsize=(4.4 * across, 3.6 * down), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for place, (name, stats) in enumerate(teachers.items()):
        axes = figure.add_subplot(down, across, place + 1)
        edges = np.linspace(stats.min, stats.max if stats.max > stats.min else stats.min + 1, BARS + 1)
        for (kind, colour), bars in zip(OF_DOCUMENTS, coarse(counts[name], BARS), strict=True):
            if bars.sum():
                density = bars / bars.sum() / (edges[1] - edges[0])
                axes.stairs(density, edges, fill=True, alpha=0.4, color=colour, label=f"{kind} ({bars.sum():,})")
                axes.stairs(density, edges, color=colour)
        auc = "" if stats.auc is None else f", AUC {stats.auc:.2f}"
        axes.set(title=f"{name}{auc}", xlabel="score", ylabel="density")
        axes.legend(fontsize=7)
    if agreements:
        axes = figure.add_subplot(down, across, panels)
        names = list(teachers)
        taus = np.full((len(names), len(names)), np.nan)
        np.fill_diagonal(taus, 1)
        for one in agreements:
            left, right = (names.index(name) for name in one.teachers)
            taus[left, right] = taus[right, left] = np.nan if one.kendall_tau is None else one.kendall_tau
        axes.imshow(taus, vmin=-1, vmax=1, cmap="RdBu")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        for row, column in np.ndindex(*taus.shape):
            tau = taus[row, column]
            text = ABSENT if np.isnan(tau) else f"{tau:.2f}"
            dark = abs(tau) > 0.6  # False for NaN
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
        axes.set_title("Kendall's tau in lists")
    with atomic(path) as scratch:
        figure.savefig(scratch, format="png")


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def _tau(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    """Three digits that matter, the sign kept, without an exponent where it can be."""
    return ABSENT if value is None else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
