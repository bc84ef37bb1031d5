"""Which tensors of the files make which parameter of the model, and back.

mlp.experts.0.gate_proj.weight ┐
mlp.experts.0.up_proj.weight   ├─ transformers' own conversion ─ mlp.experts.gate_up_proj ─ and back again
mlp.experts.1.…                ┘

Mostly a name is a parameter. Where it is not, transformers knows, and is asked.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from phased_cpt.errors import InputError
from phased_cpt.merge.stored import Folder, Stored


@dataclass
class Group:
    """Tensors of the files that can only be read together, and the parameters that they make."""

    first: str
    sources: list[tuple[str, str]] = field(default_factory=list)  # name in the file, and the pattern it matched
    converter: Any = None
    params: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.sources]


class Places:
    """Of a model without weights, and the names in its files."""

    def __init__(self, model: PreTrainedModel, folder: Folder) -> None:
        self.model, stored = model, folder.tensors
        self._stored, self._folder = stored, folder.folder
        self.shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
        conversions = get_model_conversion_mapping(model)
        self.groups = _grouped(model, conversions, stored, self.shapes)
        used: Any = [each for each in conversions if each.was_used()] or None
        model._weight_conversions = used
        # What a phase has trained whole is saved by the names that the model has; others know it by those of the files.
        self.writes_other_names = used is None and _knows_others(model)
        for group in self.groups:
            if group.converter:
                blank = {name: _blank(stored[name]) for name in group.names}
                group.params = tuple(self.together(group, blank.__getitem__))
        self.of = {param: group for group in self.groups for param in group.params}
        twice = [self.of.pop(param) for param in _written_twice(model, self.of, folder)]
        self.twice = {name for group in twice for name in group.names}
        self.groups = [group for group in self.groups if group not in twice]
        self.tied = _tied(model, self.of)

    @property
    def differ(self) -> bool:
        """Whether tensors that the architecture ties are two in the files, and not the same."""
        return any(len(names) > 1 for names in _same_params(self.model, self.of))

    def _require_shapes(self) -> None:
        for group in self.groups:
            blank = {name: _blank(self._stored[name]) for name in group.names}
            for param, made in self.together(group, blank.__getitem__).items():
                if tuple(made.shape) != self.shapes[param]:
                    what = f"{param} is {list(made.shape)} in them, and {list(self.shapes[param])} by it"
                    raise InputError(f"{self._folder}: the weights are not those of its config.json: {what}")

    def together(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters that the tensors of a group make."""
        if group.converter is None:
            return {group.first: read(group.names[0])}
        converter = deepcopy(group.converter)
        for name, pattern in group.sources:
            converter.add_tensor(group.first, name, pattern, read(name))
        made = converter.convert(group.first, model=self.model, config=self.model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    def apart(self, group: Group | None, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the files, from the parameters that they made; or new ones, by the names that a file has."""
        if group is not None and group.converter is None and not self.writes_other_names:
            return {group.names[0]: params[group.first]}
        return dict(revert_weight_conversion(self.model, dict(params)))

    def require_all(self) -> None:
        """A parameter that the files lack would be drawn at random by whoever loads them."""
        named = (name for name, _ in self.model.named_parameters(remove_duplicate=False))
        self._require_shapes()
        if missing := [name for name in named if name not in self.of and name not in self.tied]:
            more = f", and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise InputError(f"{self._folder}: nothing can be merged into it: {missing[0]}{more} missing in its files")


def _written_twice(model: nn.Module, of: Mapping[str, Group], folder: Folder) -> list[str]:
    """Second names of tied tensors that the files have as well: torch.save writes both. The first is enough."""
    found = []
    for first, *others in _same_params(model, of):
        one = folder.read(of[first].names[0]) if others else None
        found += [each for each in others if one is not None and torch.equal(one, folder.read(of[each].names[0]))]
    return found


def _same_params(model: nn.Module, of: Mapping[str, Group]) -> Iterator[list[str]]:
    """The names of each parameter that the files know."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if name in of:
            names.setdefault(id(param), []).append(name)
    yield from names.values()


def _grouped(
    model: PreTrainedModel, conversions: list[Any], stored: Mapping[str, Stored], shapes: Mapping[str, Any]
) -> list[Group]:
    """As transformers places them when it loads."""
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, groups = model.base_model_prefix, dict[str, Group]()
    for name in sorted(stored, key=dot_natural_key):
        param, pattern = rename_source_key(name, renamings, converters, prefix, dict(shapes))
        if param not in shapes:
            param, pattern = rename_source_key(name, [], [], prefix, dict(shapes))
        if param in shapes:
            group = groups.setdefault(param, Group(param, params=(param,)))
            group.converter = by_pattern[pattern] if pattern is not None else None
            group.sources.append((name, pattern or name))
    return list(groups.values())


def _knows_others(model: PreTrainedModel) -> bool:
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return any(isinstance(each, WeightConverter) for each in mapping)


def _tied(model: nn.Module, of: Mapping[str, Group]) -> dict[str, str]:
    """Parameters that are another by a second name; that one is in the files."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    found: dict[str, str] = {}
    for same in names.values():
        there = [name for name in same if name in of]
        found |= {name: there[0] for name in same if there and name not in of}
    return found


def _blank(stored: Stored) -> Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")
