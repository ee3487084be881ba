"""Masked language modelling on the addresses: MoA, Transformers of the same parameters and compute, and more experts.

    python benchmarks/masked_lm.py [--runs runs/masked_lm] [--seeds 0 1 2] [--arms moa-8 ...] [key=value ...]

Every arm is the recipe `moa-mlm` with another attention; data, vocabulary, steps, masks and learning rate are the same.
The arms `moa-E` use 3 of E experts: what a token costs does not grow with E, but for the router. Runs that are complete
are not made again, those that were stopped go on. After each run the table of all that are complete is written to
benchmarks/results/masked_lm.md and masked_lm.json.
"""

from typing import ClassVar

import torch
from moa_arms import DENSE, Comparison, Row, mean, name_of, size_cells, size_of

from mixhead.models.moa import MoAEncoderConfig, MoAForMaskedLM
from mixhead.tasks.moa_training import model_config
from mixhead.training.recipes import Recipe

# By so much the feed-forward layers of a Transformer are wider, to make up for the scores and routers of the experts.
WIDER = 36


class MaskedLM(Comparison):
    title, name, recipe = "Masked language modelling", "masked_lm", "moa-mlm"
    arms: ClassVar = {
        "moa-8": {},
        "same-compute": {**DENSE, "num_heads": 4},
        "same-parameters": {**DENSE, "num_heads": 9},
        "moa-3": {"num_heads": 3},
        "moa-16": {"num_heads": 16},
        "moa-32": {"num_heads": 32},
    }

    def model(self, arm: str, model: Row) -> Row:
        model = super().model(arm, model)
        if arm == "same-compute":
            model["intermediate_size"] += WIDER
        return model

    def count(self, arm: str, recipe: Recipe) -> Row:
        del arm
        torch.manual_seed(0)
        sizes = model_config(MoAEncoderConfig, recipe.values["model"], recipe.values["vocabulary"])
        window = recipe.values["window"]
        model = MoAForMaskedLM(sizes)
        ids = torch.randint(4, sizes.vocab_size, (1, window))
        return {"name": name_of(sizes, "Transformer"), **size_of(model, window, input_ids=ids)}

    def columns(self, metrics: Row) -> list[str]:
        del metrics
        return ["arm", "model", "seeds", "parameters (and embeddings)", "MACs per token", "masked perplexity"]

    def cells(self, rows: list[Row]) -> list[str]:
        first = rows[0]
        perplexity = mean(row["metrics"]["masked perplexity"] for row in rows)
        return [first["arm"], first["name"], str(len(rows)), *size_cells(first), perplexity]

    def data(self, metrics: Row) -> str:
        return (
            f"{metrics['training tokens']:,} training tokens, {metrics['rounds']:.1f} rounds, "
            f"{metrics['test targets']:,} masked tokens of test addresses"
        )

    def notes(self, metrics: Row) -> list[str]:
        del metrics
        return ["MACs: of all matrix products, the output layer at every token, as executed."]


if __name__ == "__main__":
    MaskedLM().main(__doc__)
