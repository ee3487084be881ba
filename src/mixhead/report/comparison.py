"""A comparison of models as a Markdown page with pictures."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.tasks.language_modelling.comparison_table import Comparison


def write_comparison(folder: Path, table: Comparison, samples: dict[str, str], load_LH: Tensor, seconds: float) -> Path:
    """Writes report.md, perplexity.png, heads.png and table.json into `folder` and returns the page.

    Args:
        folder: made if absent.
        table: the measured rows.
        samples: texts that the models wrote, by name.
        load_LH: share of the tokens that used each head, [layers, heads].
        seconds: wall time of the whole run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot_perplexity(table, folder / "perplexity.png")
    plot_head_load(load_LH, folder / "heads.png")
    (folder / "table.json").write_text(table.to_json(), encoding="utf-8")
    texts = "\n\n".join(f"**{name}**\n\n{quote(text)}" for name, text in samples.items())
    page = (
        f"# {table.title}\n\n{table.to_markdown()}\n\n![Perplexity](perplexity.png)\n\n"
        f"## Which heads are used\n\n![Head load](heads.png)\n\n## What the models write\n\n{texts}\n\n"
        f"The whole run took {seconds / 60:.1f} minutes.\n"
    )
    report = folder / "report.md"
    report.write_text(page, encoding="utf-8")
    return report


def plot_perplexity(table: Comparison, file: Path) -> None:
    """A point for every row: bars would have to begin at 0, where perplexities never are.

    The axis is logarithmic where one model is far off, as a published recipe can be.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 0.5 * len(table.rows) + 1.1), layout="constrained")
    names = [f"{row.name}\n{row.heads_active}" for row in table.rows]
    values = [row.perplexity.perplexity for row in table.rows]
    colours = ["#666666" if row.original else "#2a6f97" for row in table.rows]
    least, most = min(values), max(values)
    room = (most / least) ** 0.12
    if most > 2 * least:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(plt.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.xaxis.set_minor_locator(plt.NullLocator())
        axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.scatter(values, range(len(values)), c=colours, s=45, zorder=3)
    for place, value in enumerate(values):
        label = axes.annotate(f"{value:.2f}", (value, place), xytext=(8, 0), textcoords="offset points", va="center")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    axes.set_xlim(least / room / 1.01, most * room * 1.06)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_yticks(range(len(values)), names)
    axes.grid(axis="both", color="#dddddd", linewidth=0.8)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("perplexity on held-out text (lower is better)")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_head_load(load_LH: Tensor, file: Path) -> None:
    """Layers x heads, coloured by the share of the tokens that use the head."""
    plt = pyplot()
    layers, heads = load_LH.shape
    figure, axes = plt.subplots(figsize=(0.3 * layers + 2, 0.3 * heads + 1.2), layout="constrained")
    image = axes.imshow(load_LH.T.numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    axes.set_xticks(range(0, layers, max(layers // 10, 1)))
    axes.set_yticks(range(heads))
    figure.colorbar(image, label="share of tokens that use the head")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def pyplot():  # type: ignore[no-untyped-def]  # matplotlib is optional and has no stubs
    """matplotlib's pyplot without a display."""
    try:
        import matplotlib
    except ImportError:
        raise MixheadError("Plots need matplotlib: pip install 'mixhead[report]'.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def quote(text: str) -> str:
    """A Markdown quotation; generated text cannot break out of it."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return "\n".join(f"> {line}" for line in escaped.splitlines())
