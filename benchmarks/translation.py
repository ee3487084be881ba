"""English-German with MoA, a Transformer of the same parameters, and one of the same multiply-accumulates.

    python benchmarks/translation.py [--runs runs/translation] [--seeds 0 1 2] [--arms moa same-compute same-parameters]
                                     [key=value ...]

Every arm is the recipe `moa-en-de` with another attention; data, vocabulary, steps and learning rate are the same. Runs
that are complete are not made again, those that were stopped go on. After each run the table of all that are complete
is written to benchmarks/results/translation.md and translation.json.
"""

from typing import ClassVar

import torch
from moa_arms import DENSE, Comparison, Row, mean, name_of, size_cells, size_of

from mixhead.models.moa import MoATransformerConfig, MoATransformerForConditionalGeneration
from mixhead.tasks.moa_training import model_config
from mixhead.training.recipes import Recipe

LENGTH = 20  # tokens of source and target in the count of multiply-accumulates


class Translation(Comparison):
    title, name, recipe = "English-German", "translation", "moa-en-de"
    packages = ("torch", "transformers", "sacrebleu")
    # The projections of 3 experts of 64 cost as much as those of 4 heads of 32; the scores of the experts and the
    # router cost a little more, for which the feed-forward layers of the Transformer are wider than 512.
    arms: ClassVar = {
        "moa": {},
        "same-compute": {**DENSE, "num_heads": 4, "intermediate_size": 536},
        "same-parameters": {**DENSE, "num_heads": 9},
    }

    def count(self, arm: str, recipe: Recipe) -> Row:
        torch.manual_seed(0)
        sizes = model_config(MoATransformerConfig, recipe.values["model"], recipe.values["vocabulary"])
        model = MoATransformerForConditionalGeneration(sizes)
        ids = torch.randint(4, sizes.vocab_size, (1, LENGTH))
        return {
            "name": name_of(sizes, f"Transformer of the {arm.replace('-', ' ')}"),
            **size_of(model, LENGTH, input_ids=ids, decoder_input_ids=ids),
        }

    def columns(self, metrics: Row) -> list[str]:
        columns = ["model", "seeds", "parameters (and embeddings)", "MACs per target token"]
        for test in tests(metrics):
            columns += [f"{test}: sacreBLEU", "chrF", "compound-split BLEU", "sentences per CPU second"]
        return columns

    def cells(self, rows: list[Row]) -> list[str]:
        cells = [rows[0]["name"], str(len(rows)), *size_cells(rows[0])]
        metrics = [row["metrics"] for row in rows]
        for test in tests(metrics[0]):
            for score in ("sacreBLEU", "chrF", "compound-split BLEU"):
                cells.append(mean(m[f"{test}: {score}"] for m in metrics))
            cells.append(mean(m[f"{test}: sentences"] / m[f"{test}: CPU seconds"] for m in metrics))
        return cells

    def data(self, metrics: Row) -> str:
        return f"{metrics['training pairs']:,} training pairs, {metrics['rounds']:.1f} rounds"

    def notes(self, metrics: Row) -> list[str]:
        return [
            "All arms have the learning rate of the recipe, or that of the command. What another one does for the "
            "Transformers, which changes how far they are behind, stands in docs/translation.md.",
            f"MACs: of the matrix products of encoder, decoder and output layer, for {LENGTH} source and {LENGTH} "
            "target tokens, as executed.",
            f"sacreBLEU: `{metrics['sacreBLEU signature']}`; chrF: `{metrics['chrF signature']}`.",
        ]


def tests(metrics: Row) -> list[str]:
    """Names of the test sets."""
    return [name.partition(":")[0] for name in metrics if name.endswith(": sacreBLEU")]


if __name__ == "__main__":
    Translation().main(__doc__)
