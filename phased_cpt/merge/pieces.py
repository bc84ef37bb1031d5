"""What the merged model consists of, before a number of it is read: tensors that are copied, and tensors that are made.

base files   q.weight   k.weight   norm.weight   experts.0.up … experts.7.down
               │          │            │                    │
             made       copied       copied      made together, and apart again
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from phased_cpt.merge.adapters import Adapted
from phased_cpt.merge.check import Probe
from phased_cpt.merge.numbers import Base
from phased_cpt.merge.places import Group
from phased_cpt.merge.stored import Stored
from phased_cpt.model.tensor_file import Shape


@dataclass
class Piece:
    """Tensors of the output that are made together; or one that is copied."""

    tensors: dict[str, Shape] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)  # layers that adapters change
    groups: list[Group] = field(default_factory=list)  # tensors of the base
    new: list[str] = field(default_factory=list)  # parameters that were tied, and are not any more
    copied: str = ""  # the name of a tensor that is only copied


class Output:
    """The tensors of the merged model, in the order of the files of the base."""

    def __init__(self, base: Base, adapted: Adapted, dtype: torch.dtype, through: Iterable[str] = ()) -> None:
        self.base, self.adapted, self.dtype = base, adapted, dtype
        self._stored = base.folder.tensors
        self._usual = usual_dtype(self._stored)
        self.off = 0.0  # the most that a merged layer differs from PEFT's own
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self.site_of = {param: site for site, params in adapted.changed().items() for param in params}
        self.untied = sorted(_untied(base.places.tied, adapted))
        every = base.places.of if base.places.writes_other_names else {}
        made = _joined(self._begun((*through, *every)))
        of = {name: piece for piece in made for group in piece.groups for name in group.names}
        self.pieces: list[Piece] = []
        for name in self._stored:
            if name in base.places.twice:
                continue
            piece = of.get(name) or Piece(copied=name)
            if not piece.tensors:
                self.pieces.append(self._announce(piece))
        self.pieces += [self._announce(piece) for piece in made if not piece.tensors]

    def make(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a piece, in the order in which they were announced."""
        values: dict[str, Tensor] = {}
        for site in piece.sites:
            values |= self._merged(site)
        params = [param for group in piece.groups for param in group.params] + piece.new
        for param in params:
            values[param] = values[param] if param in values else self.base.read(param)
        self.base.forget()
        for group in piece.groups:
            dtype = self._dtype_of(group.names[0])
            mine = {param: values.pop(param).to(dtype) for param in group.params}
            made = self.base.places.apart(group, mine)
            yield from ((name, made[name]) for name in piece.tensors if name in made)
        for param in piece.new:
            (made_new,) = self.base.places.apart(None, {param: values.pop(param).to(self.dtype)}).items()
            yield made_new

    def read(self, param: str) -> Tensor:
        """A parameter of the merged model, as it is written."""
        return self.exact(param).to(self.dtype_of(param))

    def rows(self, param: str, begin: int, end: int) -> Tensor:
        """Some rows of it."""
        if param in self.site_of:
            return self.read(param)[begin:end].clone()
        return self.base.rows(param, begin, end).to(self.dtype_of(param))

    def exact(self, param: str) -> Tensor:
        """The same before it is rounded, of what adapters change."""
        site = self.site_of.get(param)
        if site is None:
            return self.base.read(param)
        if self._last[0] != site:
            self._last = ("", {})
            self._last = (site, self._merged(site))
        return self._last[1][param]

    def dtype_of(self, param: str) -> torch.dtype:
        group = self.base.places.of.get(self.base.places.tied.get(param, param))
        return self._dtype_of(group.names[0]) if group else self.dtype

    def _merged(self, site: str) -> dict[str, Tensor]:
        layer = self.adapted.filled(site, self.base.read)
        probe = Probe(site, layer, self.adapted.names)
        values = self.adapted.merged(site, layer)
        self.off = max(self.off, probe.off())
        return values

    def _begun(self, through: Iterable[str]) -> Iterator[Piece]:
        """One for each layer that is changed, and for parameters that are changed without one."""
        of = self.base.places.of
        for site, params in self.adapted.changed().items():
            groups = {id(of[param]): of[param] for param in params if param in of}
            yield Piece(sites=[site], groups=[*groups.values()], new=[each for each in params if each in self.untied])
        in_sites = {param for params in self.adapted.changed().values() for param in params}
        for param in dict.fromkeys((*self.adapted.replaced, *through)):
            if param in of:
                yield Piece(groups=[of[param]])
        yield from (Piece(new=[param]) for param in self.untied if param not in in_sites)

    def _announce(self, piece: Piece) -> Piece:
        if piece.copied:
            stored = self._stored[piece.copied]
            piece.tensors = {piece.copied: (self._dtype_of(piece.copied), stored.shape)}
            return piece
        shapes = self.base.places.shapes
        for group in piece.groups:
            blank = {param: _blank(shapes[param], self._dtype_of(group.names[0])) for param in group.params}
            piece.tensors |= {name: (t.dtype, t.shape) for name, t in self.base.places.apart(group, blank).items()}
        for param in piece.new:
            blank = {param: _blank(shapes[param], self.dtype)}
            piece.tensors |= {name: (t.dtype, t.shape) for name, t in self.base.places.apart(None, blank).items()}
        return piece

    def _dtype_of(self, name: str) -> torch.dtype:
        """Tensors that the base keeps in a type of their own stay in it: a router in fp32, a mask of booleans."""
        dtype = self._stored[name].dtype
        return self.dtype if dtype == self._usual else dtype


def usual_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    """The type of most of the numbers."""
    sizes: dict[torch.dtype, int] = {}
    for each in stored.values():
        sizes[each.dtype] = sizes.get(each.dtype, 0) + each.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _untied(tied: Mapping[str, str], adapted: Adapted) -> set[str]:
    """Second names of parameters whose numbers are two from now on."""
    changed = {param for params in adapted.changed().values() for param in params}
    follows = {f"{site}.weight" for site in adapted.followers}
    return {name for name, first in tied.items() if name not in follows and {name, first} & changed}


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Those that share tensors are one."""
    found: list[Piece] = []
    by_group: dict[int, Piece] = {}
    for piece in pieces:
        same = {id(each): each for group in piece.groups if (each := by_group.get(id(group)))}
        for other in same.values():
            piece.sites = [*other.sites, *(site for site in piece.sites if site not in other.sites)]
            piece.groups = [*other.groups, *(each for each in piece.groups if each not in other.groups)]
            piece.new = [*other.new, *(each for each in piece.new if each not in other.new)]
            found = [each for each in found if each is not other]
        found.append(piece)
        by_group |= {id(group): piece for group in piece.groups}
    return found


def _blank(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def numbers_of(model: nn.Module) -> int:
    """How many numbers a model has."""
    return sum(param.numel() for param in model.parameters())
