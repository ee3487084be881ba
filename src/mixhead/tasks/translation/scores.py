"""Scores of translations: sacreBLEU and chrF with their signatures, and BLEU as the papers of WMT14 count it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixhead.errors import MixheadError

COMPOUND = re.compile(r"(\S)-(?=\S)")


@dataclass(frozen=True)
class TranslationScores:
    """How good translations are, all from 0 to 100.

    Attributes:
        bleu: sacreBLEU, on tokens of its own making: comparable between papers.
        bleu_signature: says how it was counted.
        chrf: F-score of character n-grams.
        chrf_signature: says how it was counted.
        compound_split_bleu: BLEU on tokens whose compounds are split at hyphens, as MoA and its baselines report it for
            WMT14; higher than sacreBLEU, and only comparable with numbers counted alike. The papers take the tokens of
            Moses, this takes those of sacreBLEU (13a).
        sentences: how many.
    """

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    compound_split_bleu: float
    sentences: int


def score_translations(translations: Sequence[str], references: Sequence[str]) -> TranslationScores:
    """Scores translations against one reference each.

    Raises:
        MixheadError: where their numbers differ, there is none, or sacrebleu is not installed.
    """
    sacrebleu = require_sacrebleu()
    if len(translations) != len(references):
        raise MixheadError(
            f"There are {len(translations):,} translations, but {len(references):,} references: line by line they must "
            "belong together."
        )
    if not references:
        raise MixheadError("There is no translation to score.")
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    bleu_score = bleu.corpus_score(list(translations), [list(references)]).score
    chrf_score = chrf.corpus_score(list(translations), [list(references)]).score
    split = sacrebleu.BLEU(tokenize="none", force=True)
    tokens = sacrebleu.BLEU(tokenize="13a").tokenizer
    split_score = split.corpus_score(
        [split_compounds(tokens(line)) for line in translations],
        [[split_compounds(tokens(line)) for line in references]],
    ).score
    return TranslationScores(
        bleu=bleu_score,
        bleu_signature=str(bleu.get_signature()),
        chrf=chrf_score,
        chrf_signature=str(chrf.get_signature()),
        compound_split_bleu=split_score,
        sentences=len(references),
    )


def split_compounds(tokens: str) -> str:
    """`E-Mail` becomes `E ##AT##-##AT## Mail`."""
    return COMPOUND.sub(r"\1 ##AT##-##AT## ", tokens)


def require_sacrebleu() -> Any:
    """sacreBLEU; raises where it is not installed: asked before long work, not after."""
    try:
        import sacrebleu
    except ImportError:
        raise MixheadError("Scores of translations need sacrebleu: pip install 'mixhead[translation]'.") from None
    return sacrebleu
