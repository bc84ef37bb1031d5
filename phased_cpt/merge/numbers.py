"""The numbers of the base, parameter by parameter: as its files have them, as 4 bits leave them, or moved to others."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from phased_cpt.merge.places import Places
from phased_cpt.merge.stored import Folder

Read = Callable[[str], Tensor]


class Rounding(Protocol):
    """What becomes of some parameters before they are used."""

    names: frozenset[str]

    def through(self, param: str, weight: Tensor) -> Tensor: ...


class Base:
    """A base to read from."""

    def __init__(
        self, folder: Folder, places: Places, replaced: Mapping[str, Read], rounding: Rounding | None = None
    ) -> None:
        self.folder, self.places, self.replaced = folder, places, replaced
        self.rounding = rounding
        self._made: tuple[str, dict[str, Tensor]] = ("", {})  # a group makes several parameters, asked for in a row

    def read(self, param: str) -> Tensor:
        """A parameter, whatever it is called in the files."""
        first = self.places.tied.get(param, param)
        for name in (param, first):
            if name in self.replaced:
                return self.replaced[name](name)
        group = self.places.of[first]
        if group.converter is None:
            found = self.folder.read(group.names[0])
        else:
            if self._made[0] != group.first:
                self._made = ("", {})
                self._made = (group.first, self.places.together(group, self.folder.read))
            found = self._made[1][first]
        return self.rounding.through(first, found) if self.rounding else found

    def rows(self, param: str, begin: int, end: int) -> Tensor:
        """Some rows of it; of a tensor that is a parameter as it lies in the file, nothing else is read."""
        first = self.places.tied.get(param, param)
        group = self.places.of[first]
        name = group.names[0]
        made = {param, first} & self.replaced.keys() or group.converter or self.folder.is_mapped(name)
        if made or (self.rounding and first in self.rounding.names):
            return self.read(param)[
                begin:end
            ].clone()  # a view would keep all of it: 1 GB a token of a large vocabulary
        return self.folder.read_rows(name, begin, end)

    def forget(self) -> None:
        """Of groups of tensors, the last is held."""
        self._made = ("", {})


class Between(Base):
    """A base that is moved towards other weights of it, so far: 0 is the base, 1 the other."""

    def __init__(
        self, folder: Folder, places: Places, replaced: Mapping[str, Read], other: Base, strength: float
    ) -> None:
        super().__init__(folder, places, replaced)
        self.other, self.strength = other, strength

    def read(self, param: str) -> Tensor:
        return self._between(param, super().read(param), self.other.read(param))

    def rows(self, param: str, begin: int, end: int) -> Tensor:
        return self._between(param, super().rows(param, begin, end), self.other.rows(param, begin, end))

    def forget(self) -> None:
        super().forget()
        self.other.forget()

    def _between(self, param: str, here: Tensor, there: Tensor) -> Tensor:
        if param in self.replaced or not here.is_floating_point():
            return here
        return torch.lerp(here.float(), there.float(), self.strength)
