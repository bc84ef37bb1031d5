"""What a phase draws from earlier ones, and in which shares it draws from its own sources; its budget stays what it is.

foundation   its training documents, less what any phase holds out ── 0.05 ─┐
evolution    its own: a source, or several by weight or temperature ─ 0.95 ─┴ rows of the whole phase
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from phased_cpt.data.cache import Tell
from phased_cpt.data.chunks import Integers
from phased_cpt.data.composed import Part, Passes, composed, tokens_in_all, tokens_in_rows
from phased_cpt.data.index import BlockIndex, Packing, Share, block_index
from phased_cpt.data.mixing import Scores
from phased_cpt.errors import InputError
from phased_cpt.plan import PhasePlan
from phased_cpt.schedule import Prepared, batch_of

Pack = Callable[[Sequence[Share]], BlockIndex]


@dataclass(frozen=True)
class Whole:
    """The rows of a whole phase, and what they are made of."""

    index: BlockIndex
    parts: tuple[Part, ...]
    epochs: float  # of the phase's own documents


def is_composed(phase: PhasePlan) -> bool:
    """Whether its rows are more than passes over one mix of its own documents."""
    return phase.phase.replay is not None or _is_tempered(phase)


def _is_tempered(phase: PhasePlan) -> bool:
    return phase.settings.data.temperature != 1 and len(phase.phase.sources) > 1


def packer(how: Packing, cache: Path, tell: Tell) -> Pack:
    """One pass over documents, of which nothing is left over at the end: it may be little."""
    how = replace(how, packer="pad" if how.packer == "concat" else how.packer)
    return lambda shares: block_index(shares, how, cache, tell)


def whole_phase(
    phase: PhasePlan, own: Sequence[Part], old: Mapping[str, Sequence[Part]], cache: Path, tell: Tell
) -> Whole:
    """As many tokens, or steps, as the phase has without replay."""
    if not _epoch(own):
        raise InputError(f"{phase.name}: no token in it can be trained; give it longer documents")
    shares = _shares(phase, old)
    parts = [_scaled(part, 1 - math.fsum(shares.values())) for part in own]
    parts += [_scaled(part, share) for name, share in shares.items() for part in old[name]]
    if phase.budget.unit == "steps":
        tokens = tokens_in_rows(parts, int(phase.budget.amount) * _rows_of_a_step(phase))
    else:
        total = Fraction(repr(phase.budget.amount)) * (_epoch(own) if phase.budget.unit == "epochs" else 1)
        tokens = tokens_in_all(parts, max(1, round(total)))
    epochs = sum(tokens[: len(own)]) / _epoch(own)
    _require_few_repeats(phase, parts, tokens, epochs)
    return Whole(composed(parts, tokens, cache, tell), tuple(parts), round(max(epochs, 1e-3), 3))


def control_rows(
    phase: PhasePlan, epoch: Prepared, old: Mapping[str, Sequence[Part]], cache: Path, tell: Tell
) -> tuple[BlockIndex, tuple[Part, ...]]:
    """As many rows as the phase has, of earlier phases alone and in proportion, however often these are repeated."""
    rows = phase.budget.rows(epoch) or int(phase.budget.amount) * _rows_of_a_step(phase)
    sizes = {name: _epoch(parts) for name, parts in old.items()}
    parts = [_scaled(part, sizes[name] / sum(sizes.values())) for name in sizes for part in old[name]]
    return composed(parts, tokens_in_rows(parts, rows), cache, tell), tuple(parts)


# Parts --------------------------------------------------------------------------------------------------------------


def own_parts(phase: PhasePlan, shares: Sequence[Share], whole: Pack, apart: Pack) -> list[Part]:
    """The documents of a phase by source, so that the shares of these are exact; or as its epochs are packed."""
    shuffle = phase.settings.data.shuffle
    if len(shares) > 1 and (shuffle or _is_tempered(phase)):  # else the order of the sources is to be kept
        return _by_source(phase, shares, apart, ("mixture", phase.seed, phase.name), shuffle)
    return [_part(phase, shares, whole, phase.data_seed, shuffle)]


def old_parts(
    phase: PhasePlan, earlier: PhasePlan, shares: Sequence[Share], held_out: Scores, pack: Pack
) -> list[Part]:
    """The training documents of an earlier phase, as this one packs them; nothing that is held out by any phase."""
    kept = [replace(share, documents=_without(share, held_out)) for share in shares]
    if not (kept := [share for share in kept if len(share.documents)]):
        raise _nothing_to_replay(phase, earlier)
    seed = ("replay", phase.seed, phase.name, earlier.name)
    if _is_tempered(earlier) and len(kept) > 1:
        parts = _by_source(earlier, kept, pack, seed, shuffle=True)
    else:
        parts = [_part(earlier, kept, pack, seed, shuffle=True)]
    if not _epoch(parts):
        raise _nothing_to_replay(phase, earlier)
    return parts


def _without(share: Share, held_out: Scores) -> Integers:
    return share.documents[~np.isin(np.asarray(share.store.digests)[share.documents], held_out)]


def _nothing_to_replay(phase: PhasePlan, earlier: PhasePlan) -> InputError:
    what = f"{earlier.name} has nothing to train on that no phase holds out"
    return InputError(f"phases.{phase.name}.replay: {what}; take it out, or name another phase")


def _by_source(
    phase: PhasePlan, shares: Sequence[Share], pack: Pack, seed: tuple[str | int, ...], shuffle: bool
) -> list[Part]:
    """A part for each source. Sources that hold 100 and 400 tokens: 0.2 and 0.8; at temperature 2, 0.33 and 0.67."""
    parts = [
        _part(phase, [replace(share, weight=1.0)], pack, (*seed, at), shuffle, share.weight)
        for at, share in enumerate(shares)
    ]
    parts = [part for part in parts if part.rows.tokens]
    heights = [(part.weight * part.rows.tokens) ** (1 / phase.settings.data.temperature) for part in parts]
    return [replace(part, share=height / math.fsum(heights)) for part, height in zip(parts, heights, strict=True)]


def _part(
    phase: PhasePlan,
    shares: Sequence[Share],
    pack: Pack,
    seed: tuple[str | int, ...],
    shuffle: bool,
    weight: float = 1.0,
) -> Part:
    index = pack(shares)
    return Part(phase.name, tuple(shares), index, Passes(index.blocks, seed, shuffle), weight=weight)


def _scaled(part: Part, share: float) -> Part:
    return replace(part, share=part.share * share)


# Shares -------------------------------------------------------------------------------------------------------------


def _shares(phase: PhasePlan, old: Mapping[str, Sequence[Part]]) -> dict[str, float]:
    """Of the tokens of the phase, by earlier phase: one number is shared out in proportion to their tokens."""
    replay = phase.phase.replay
    if isinstance(replay, float):
        sizes = {name: _epoch(parts) for name, parts in old.items()}
        return {name: replay * size / sum(sizes.values()) for name, size in sizes.items()}
    return dict(replay or {})


def _epoch(parts: Sequence[Part]) -> int:
    """The trained tokens of an epoch, whatever the temperature."""
    return round(sum(part.rows.tokens * Fraction(repr(part.weight)) for part in parts))


def _rows_of_a_step(phase: PhasePlan) -> int:
    """As long as the number of ranks is not known, one is taken for it: the rows are made anew when it is."""
    training = phase.settings.training
    return phase.global_rows or batch_of(1, training.micro_batch_size, training.gradient_accumulation_steps).rows


def _require_few_repeats(phase: PhasePlan, parts: Sequence[Part], tokens: Sequence[int], epochs: float) -> None:
    """More than four passes over a source teach little (arXiv 2305.16264), and nobody has asked for them."""
    most = phase.settings.data.max_repeats
    for part, each in zip(parts, tokens, strict=True):
        passes = each / part.rows.tokens
        if part.phase != phase.name:
            passes *= max(source.weight for source in part.sources)
            key, fits = "replay", math.floor(1000 * part.share * most / passes) / 1000 if passes else 1.0
            lower = f"a share of {fits:g}" if fits else "no replay of it"
        elif _is_tempered(phase) and passes > part.weight * epochs:
            key, lower = "data.temperature", "a temperature nearer to 1"
        else:
            continue  # the phase's own epochs and weights ask for it
        if passes > most:
            of = part.phase if key == "replay" else part.sources[0].store.name
            what = f"{each:,} tokens of {of} are {passes:.1f} passes over it, and data.max_repeats is {most:g}"
            mend = f"take {lower}, or data.max_repeats: {math.ceil(passes)}"
            raise InputError(f"phases.{phase.name}.{key}: {what}; {mend}")
