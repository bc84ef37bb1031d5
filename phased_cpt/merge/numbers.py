"""The numbers of the base, parameter by parameter: as its files have them, or as 4 bits leave them."""

from collections.abc import Callable, Mapping

from torch import Tensor

from phased_cpt.merge.places import Places
from phased_cpt.merge.stored import Folder

Read = Callable[[str], Tensor]
Through = Callable[[str, Tensor], Tensor]  # what becomes of a parameter, by its name


class Base:
    """A base to read from."""

    def __init__(
        self, folder: Folder, places: Places, replaced: Mapping[str, Read], through: Through | None = None
    ) -> None:
        self.folder, self.places, self.replaced = folder, places, replaced
        self.through = through
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
        return self.through(first, found) if self.through else found

    def rows(self, param: str, begin: int, end: int) -> Tensor:
        """Some rows of it; of a tensor that is a parameter as it lies in the file, nothing else is read."""
        first = self.places.tied.get(param, param)
        group = self.places.of[first]
        name = group.names[0]
        if {param, first} & self.replaced.keys() or group.converter or self.through or self.folder.is_mapped(name):
            return self.read(param)[begin:end]
        return self.folder.read_rows(name, begin, end)

    def forget(self) -> None:
        """Of groups of tensors, the last is held."""
        self._made = ("", {})
