"""A comparison of models as a Markdown page with pictures."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.tasks.language_modelling.comparison_table import Table


def write_comparison(folder: Path, table: Table, samples: dict[str, str], load_LH: Tensor, seconds: float) -> Path:
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


def plot_perplexity(table: Table, file: Path) -> None:
    """A bar for every row; published recipes can be so far off that the axis is logarithmic."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 0.6 * len(table.rows) + 1.2), layout="constrained")
    names = [f"{row.name}\n{row.heads_active}" for row in table.rows]
    values = [row.perplexity.perplexity for row in table.rows]
    colours = ["#888888" if row.original else "#2a6f97" for row in table.rows]
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(values), 1.4 * max(values))
    axes.invert_yaxis()
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
