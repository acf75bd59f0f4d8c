"""Every loss by name, with its options and what it needs. The table in docs/losses.md is made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fastpref.checks import check_choice, describe
from fastpref.losses import formulas, margin
from fastpref.losses.mix import mixed
from fastpref.losses.spec import LossOption, LossSpec, MarginForm, PairLogps

MARGIN_CLIP = LossOption(
    "margin_clip",
    None,
    "bounds the argument of the sigmoid to [-margin_clip, margin_clip]; the gradient outside is zero",
    minimum=0.0,
    open_minimum=True,
)


def _label_smoothing(default: float, help: str, *, open_minimum: bool = False) -> LossOption:
    return LossOption(
        "label_smoothing",
        default,
        help,
        minimum=0.0,
        maximum=0.5,
        open_minimum=open_minimum,
        open_maximum=True,
    )


def _margin_spec(name: str, form: Callable[..., MarginForm], **fields: Any) -> LossSpec:
    def formula(pairs: PairLogps, beta: float, **options: Any) -> Tensor:
        return margin.margin_losses(pairs, form(beta, **options))

    formula.__doc__ = form.__doc__
    return LossSpec(name, formula=formula, margin=form, **fields)


_SPECS = (
    _margin_spec(
        "sigmoid",
        margin.sigmoid,
        formula_text="−log σ(β·(c − r))",
        paper="DPO, Rafailov et al. 2023, arXiv:2305.18290",
        options=(MARGIN_CLIP,),
        aliases=("dpo",),
    ),
    _margin_spec(
        "dpop",
        margin.dpop,
        formula_text="−log σ(β·(c − r − λ·max(0, −c)))",
        paper="DPO-Positive, Pal et al. 2024, arXiv:2402.13228",
        options=(
            LossOption("lam", 50.0, "λ, the weight of a fall of the chosen log-prob; 0 is DPO", minimum=0.0),
            MARGIN_CLIP,
        ),
        penalty=margin.dpop_penalty,
    ),
    _margin_spec(
        "cdpo",
        margin.cdpo,
        formula_text="−(1−ε)·log σ(β·(c − r)) − ε·log σ(−β·(c − r))",
        paper="conservative DPO, Mitchell 2023, ericmitchell.ai/cdpo.pdf",
        options=(_label_smoothing(0.1, "ε, the share of labels thought flipped; 0 is DPO"), MARGIN_CLIP),
    ),
    _margin_spec(
        "robust",
        margin.robust,
        formula_text="(−(1−ε)·log σ(β·(c − r)) + ε·log σ(−β·(c − r))) / (1−2ε)",
        paper="robust DPO, Chowdhury et al. 2024, arXiv:2403.00409",
        options=(_label_smoothing(0.0, "ε, the share of labels flipped; 0 is DPO"), MARGIN_CLIP),
    ),
    _margin_spec(
        "hinge",
        margin.hinge,
        formula_text="max(0, 1 − β·(c − r))",
        paper="SLiC-HF, Zhao et al. 2023, arXiv:2305.10425",
    ),
    _margin_spec(
        "ipo",
        margin.ipo,
        formula_text="(c − r − 1/(2β))²",
        paper="IPO, Azar et al. 2023, arXiv:2310.12036",
        reduction="mean",
    ),
    _margin_spec(
        "sigmoid_norm",
        margin.sigmoid_norm,
        formula_text="−log σ(β·(c − r))",
        paper="length-normalised DPO, Lambert et al. 2024 (Tülu 3), arXiv:2411.15124",
        reduction="mean",
        options=(MARGIN_CLIP,),
    ),
    LossSpec(
        "exo_pair",
        formula=formulas.exo_pair,
        formula_text="σ(u)·log(σ(u)/(1−ε)) + σ(−u)·log(σ(−u)/ε), u = β·(c − r)",
        paper="EXO, Ji et al. 2024, arXiv:2402.00856",
        options=(
            _label_smoothing(1e-3, "ε, the target weight of the rejected response", open_minimum=True),
            MARGIN_CLIP,
        ),
    ),
    LossSpec(
        "nca_pair",
        formula=formulas.nca_pair,
        formula_text="−log σ(β·c) − ½·log σ(−β·c) − ½·log σ(−β·r)",
        paper="NCA, Chen et al. 2024, arXiv:2402.05369",
    ),
    LossSpec(
        "bco_pair",
        formula=formulas.bco_pair,
        formula_text="−log σ(β·c − δ) − log σ(δ − β·r)",
        paper="BCO, Jung et al. 2024, arXiv:2404.04656",
        options=(LossOption("delta", 0.0, "δ, the reward shift: the caller's running mean of the rewards"),),
    ),
    LossSpec(
        "sppo_hard",
        formula=formulas.sppo_hard,
        formula_text="(c − 1/(2β))² + (r + 1/(2β))²",
        paper="SPPO, Wu et al. 2024, arXiv:2405.00675",
    ),
    LossSpec(
        "aot",
        formula=formulas.aot,
        formula_text="−(1−ε)·log σ(d) − ε·log σ(−d), d = β·(sort(π_w − π_l) − sort(ref_w − ref_l))",
        paper="AOT paired, Melnyk et al. 2024, arXiv:2406.05882",
        separable=False,
        options=(_label_smoothing(0.0, "ε, the share of labels thought flipped"), MARGIN_CLIP),
    ),
    LossSpec(
        "aot_unpaired",
        formula=formulas.aot_unpaired,
        formula_text="−(1−ε)·log σ(d) − ε·log σ(−d), d = β·(sort(c) − sort(r))",
        paper="AOT unpaired, Melnyk et al. 2024, arXiv:2406.05882",
        separable=False,
        options=(_label_smoothing(0.0, "ε, the share of labels thought flipped"), MARGIN_CLIP),
    ),
    LossSpec(
        "apo_zero",
        formula=formulas.apo_zero,
        formula_text="σ(−β·c) + σ(β·r)",
        paper="APO-zero, D'Oosterlinck et al. 2024, arXiv:2408.06266",
    ),
    LossSpec(
        "apo_down",
        formula=formulas.apo_down,
        formula_text="σ(β·c) + σ(−β·(c − r))",
        paper="APO-down, D'Oosterlinck et al. 2024, arXiv:2408.06266",
    ),
    LossSpec(
        "discopop",
        formula=formulas.discopop,
        formula_text="−σ(−u/τ)·log σ(u) + σ(u/τ)·exp(−u), u = β·(c − r)",
        paper="DiscoPOP, Lu et al. 2024, arXiv:2406.08414",
        options=(
            LossOption("tau", 0.05, "τ, the temperature of the blend", minimum=0.0, maximum=1.0, open_minimum=True),
            MARGIN_CLIP,
        ),
    ),
    LossSpec(
        "simpo",
        formula=formulas.simpo,
        formula_text="−log σ(β·(π_w − π_l) − γ)",
        paper="SimPO, Meng et al. 2024, arXiv:2405.14734",
        reduction="mean",
        needs_reference=False,
        options=(LossOption("gamma", 0.5, "γ, the target reward margin", minimum=0.0), MARGIN_CLIP),
    ),
    LossSpec(
        "orpo",
        formula=formulas.orpo,
        formula_text="−π_w − β·log σ(o_w − o_l), o = π − log(1 − exp(π))",
        paper="ORPO, Hong et al. 2024, arXiv:2403.07691",
        reduction="mean",
        needs_reference=False,
        options=(MARGIN_CLIP,),
    ),
    LossSpec(
        "cpo",
        formula=formulas.cpo,
        formula_text="−log σ(β·(π_w − π_l)) − α·π_w",
        paper="CPO, Xu et al. 2024, arXiv:2401.08417",
        needs_reference=False,
        options=(LossOption("alpha", 1.0, "α, the weight of the SFT term", minimum=0.0), MARGIN_CLIP),
    ),
    LossSpec(
        "sft",
        formula=formulas.sft,
        formula_text="−π_w",
        paper="supervised fine-tuning on the chosen response",
        reduction="mean",
        needs_reference=False,
    ),
    LossSpec(
        "kl_sft",
        formula=formulas.kl_sft,
        formula_text="−π_w + (α/2)·c²",
        paper="SFT with a two-sided penalty on the drift; Schulman 2020, joschu.net/blog/kl-approx.html (k2)",
        reduction="mean",
        options=(LossOption("alpha", 1.0, "α, the weight of the squared drift", minimum=0.0),),
        penalty=formulas.kl_sft_penalty,
    ),
)

KTO = LossSpec(
    "kto",
    formula=formulas.kto,
    formula_text="w·σ(β·(z − c)) if desirable, else w·σ(β·(c − z)); z = max(0, the mean c of mismatched pairs)",
    paper="KTO, Ethayarajh et al. 2024, arXiv:2402.01306",
    unpaired=True,
    options=(
        LossOption("desirable_weight", 1.0, "w of a desirable response", minimum=0.0),
        LossOption("undesirable_weight", 1.0, "w of an undesirable response", minimum=0.0),
    ),
)

# The letters of `formula_text`, for whoever prints it.
NOTATION = (
    "π_w, π_l, ref_w, ref_l: log-probs of the chosen and the rejected response under policy and reference; "
    "c = π_w − ref_w, r = π_l − ref_l"
)

LOSSES: Mapping[str, LossSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})

_BY_NAME = {name: spec for spec in (*_SPECS, KTO) for name in (spec.name, *spec.aliases)}


def get_loss(name: str | Sequence[str], weights: Sequence[float] | None = None) -> LossSpec:
    """The loss of that name or alias, or the sum of several with these weights, by default 1 each.

    ValueError, listing all names, where there is none; or where the weights are not as many as the losses.
    """
    names = name if isinstance(name, (list, tuple)) and name else [name]
    if weights is not None and not isinstance(weights, (list, tuple)):
        raise TypeError(f"loss_weights must be a list of numbers, got {describe(weights)}")
    specs = [_BY_NAME[check_choice("loss", one, _BY_NAME)] for one in names]
    if len(specs) > 1:
        return mixed(specs, weights)
    if weights is not None:
        raise ValueError(f"loss_weights={weights} goes with several losses, and loss is {specs[0].name!r} alone")
    return specs[0]
