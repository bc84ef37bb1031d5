"""The adapters on a model without weights: which parameters they change, and what PEFT makes of each.

meta model ─ PEFT on it ─ one of its layers gets its numbers ─ PEFT merges that layer ─ the numbers go again
"""

import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from phased_cpt.config.values import CHANGE_THE_BASE
from phased_cpt.errors import InputError
from phased_cpt.merge.numbers import Base, Read
from phased_cpt.merge.stored import Folder

# What only exists while text is made, or is made elsewhere.
UNMERGEABLE = ("alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config", "use_qalora")

# What PEFT puts between the name of a layer and that of its parameter.
BETWEEN = ("base_layer", "original_module", "token_adapter")
TOP = "base_model.model."


@dataclass(frozen=True)
class Given:
    """An adapter, and how strongly it is meant."""

    folder: Path
    scale: float = 1.0


class Adapted:
    """A model on the meta device, with its adapters."""

    def __init__(self, model: PreTrainedModel, given: Sequence[Given]) -> None:
        self.names = [f"adapter_{at}" for at in range(len(given))]
        configs = [_config(each.folder) for each in given]
        _require_stackable(configs, given)
        self.reads: dict[str, Read] = {}  # by the name of the parameter in the adapted model
        self.replaced: dict[str, Read] = {}  # parameters of the base that an adapter brings its own values of
        self.adapted: PeftModel | None = None
        for name, config, each in zip(self.names, configs, given, strict=True):
            self._put_on(model, name, config, each.folder)
        if self.adapted is not None:
            self._set_all(given)
            for name, each in zip(self.names, given, strict=True):
                _scale(self.adapted, name, each.scale)
            self.adapted.eval()
        self.model = model
        self.keeps_ties = any(getattr(config, "ensure_weight_tying", False) for config in configs)
        self._share()
        self.followers: list[str] = []
        self.sites = dict(self._sites())

    def _set_all(self, given: Sequence[Given]) -> None:
        assert self.adapted is not None
        tuner: Any = self.adapted.base_model
        try:
            tuner.set_adapter(self.names)
        except ValueError:
            folders = ", ".join(str(each.folder) for each in given)
            what = "two of these adapters have whole weights of the same layer, and only one can hold"
            raise InputError(f"{folders}: {what}; merge them one after the other") from None

    def _put_on(self, model: PreTrainedModel, name: str, config: LoraConfig, folder: Path) -> None:
        options: dict[str, Any] = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tied weights, which are untied here
                if self.adapted is None:
                    self.adapted = PeftModel(model, config, name, **options)
                else:
                    self.adapted.add_adapter(name, config, **options)
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            raise InputError(f"{folder}: this adapter does not fit the base: {' '.join(str(error).split())}") from None
        _make_leaves(self.adapted)
        self._read_from(Folder(folder, "adapter_model"), name, config)

    def _read_from(self, file: Folder, name: str, config: LoraConfig) -> None:
        """Where the numbers of each of its parameters are."""
        assert self.adapted is not None
        params = dict(self.adapted.named_parameters(remove_duplicate=False))
        wanted = _saved_names(self.adapted, name, list(params))
        reads: dict[str, Read] = {key: _reader(file, key) for key in file.tensors}
        if not set(wanted) <= set(reads):
            reads = _converted(self.adapted, name, config, file)
        extra = {key: reads.pop(key) for key in set(reads) - set(wanted)}
        if missing := sorted(set(wanted) - set(reads)):
            raise InputError(f"{file.folder}: this adapter does not fit the base: {missing[0]} is missing")
        for key, param in wanted.items():
            self._require_shape(file, key, reads[key], params[param])
            if name in param.split("."):
                self.reads[param] = reads[key]
            else:  # a bias of the base
                self.replaced[base_name(param.removeprefix(TOP))] = reads[key]
        for key, read in extra.items():
            param = base_name(key.removeprefix(TOP))
            if param not in self.shapes():
                raise InputError(f"{file.folder}: this adapter does not fit the base: {key} has no place")
            self._require_shape(file, key, read, self.shapes()[param])
            self.replaced[param] = read  # PEFT saves embeddings that it thinks may have been trained

    def _share(self) -> None:
        """What is one parameter by two names is read by either."""
        named = [*self.adapted.named_parameters(remove_duplicate=False)] if self.adapted else []
        by_id = {id(param): self.reads[name] for name, param in named if name in self.reads}
        self.reads |= {name: by_id[id(param)] for name, param in named if id(param) in by_id}

    def shapes(self) -> dict[str, Tensor]:
        """The parameters of the base, as it was before anything was put on it."""
        assert self.adapted is not None
        named = self.adapted.get_base_model().named_parameters(remove_duplicate=False)
        return {base_name(name): param for name, param in named}

    def _require_shape(self, file: Folder, key: str, read: Read, param: Tensor) -> None:
        shape = tuple(file.tensors[key].shape) if key in file.tensors else tuple(read(key).shape)
        if shape != tuple(param.shape):
            what = f"{key} is {list(shape)}, and has room for {list(param.shape)}"
            if "embed" in key or "lm_head" in key:
                what += " (its vocabulary was resized: resize the base first, and save it)"
            raise InputError(f"{file.folder}: this adapter does not fit the base: {what}")

    def _sites(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers that PEFT has changed, by the name that they had before."""
        inside = "\0"
        for name, module in self.model.named_modules() if self.adapted else ():
            if not name.startswith(inside) and (
                hasattr(module, "unload_and_optionally_merge_module") or isinstance(module, BaseTunerLayer)
            ):
                inside = f"{name}."
                if self._follows(name, module):
                    self.followers.append(name)
                else:
                    yield name, module

    def _follows(self, name: str, site: nn.Module) -> bool:
        """A head that was trained as one with the embedding, and can stay tied to it."""
        if isinstance(site, TrainableTokensWrapper):
            return site.token_adapter.tied_adapter is not None
        embedding: nn.Module | None = self.model.get_input_embeddings()
        if not self.keeps_ties or site is embedding or embedding is None:
            return False
        below = next((each for each, module in self.model.named_modules() if module is embedding), "")
        mine, its = self._values(name), self._values(below)
        pairs = zip(mine, its if isinstance(site, ModulesToSaveWrapper) else its[::-1], strict=False)
        return len(mine) == len(its) > 0 and all(torch.equal(one, other) or _turned(one, other) for one, other in pairs)

    def _values(self, site: str) -> list[Tensor]:
        """What the adapters have of a layer, in the order of its parameters."""
        return [read(param) for param, read in self.reads.items() if param.startswith(f"{TOP}{site}.")]

    def changed(self) -> dict[str, tuple[str, ...]]:
        """The parameters that each layer has, and so may change."""
        found = {}
        for name, site in self.sites.items():
            named = (base_name(param) for param, _ in site.named_parameters() if not self._is_added(f"{name}.{param}"))
            found[name] = tuple(dict.fromkeys(f"{name}.{param}" for param in named))
        return found

    def _is_added(self, param: str) -> bool:
        return any(part in self.names for part in param.split("."))

    def filled(self, name: str, base: Read) -> nn.Module:
        """A layer with its numbers, in fp32: the adapters' and the base's."""
        site = deepcopy(self.sites[name])
        for inner, _ in list(site.named_parameters()):
            param = f"{name}.{inner}"
            value = self.reads.get(TOP + param, base)(base_name(param))
            holder, _, leaf = inner.rpartition(".")
            setattr(site.get_submodule(holder), leaf, nn.Parameter(value.float(), requires_grad=False))
        return site.eval()

    def merged(self, name: str, site: Any) -> dict[str, Tensor]:
        """What PEFT makes of a layer that has its numbers, by the names of the parameters of the base."""
        if self._is_plain(site):
            plain = site.get_base_layer()
            for each in self.names:
                if each in site.lora_A:
                    a, b = site.lora_A[each].weight, site.lora_B[each].weight
                    plain.weight.data.addmm_(b.data, a.data, alpha=site.scaling[each])
        elif hasattr(site, "unload_and_optionally_merge_module"):
            plain = site.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=self.names)
        else:
            site.merge(safe_merge=False, adapter_names=self.names)
            plain = site.get_base_layer()
        return {f"{name}.{inner}": param.data for inner, param in plain.named_parameters()}

    def _is_plain(self, site: Any) -> bool:
        """W + s·B·A, which is half of all merging, in one pass over W: PEFT's three take twice as long."""
        if type(site) is not Linear:
            return False
        special = site.lora_variant or site.fan_in_fan_out or any(site.lora_bias.values())
        return not special

    def require_mergeable(self) -> None:
        """Every layer is merged without numbers, so that one that cannot be is told before anything is written."""
        for name in self.sites:
            site = deepcopy(self.sites[name])
            try:
                self.merged(name, site)
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise InputError(f"{name} cannot be merged: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class Live:
    """The numbers of a model with its adapters on, by their names there."""

    adapted: Adapted
    base: Base

    def read(self, name: str) -> Tensor:
        return self.adapted.reads.get(name, self.base.read)(base_name(name.removeprefix(TOP)))

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        if name in self.adapted.reads:
            return self.read(name)[begin:end].clone()
        return self.base.rows(base_name(name.removeprefix(TOP)), begin, end)


def _require_stackable(configs: Sequence[LoraConfig], given: Sequence[Given]) -> None:
    """What hangs on the layers below it, or puts itself in their place, can only be merged into them."""
    for config, each in zip(configs, given, strict=True) if len(given) > 1 else ():
        kind = "DoRA" if config.use_dora else "of tokens" if config.trainable_token_indices else None
        if kind is not None:
            what = f"of adapters on top of each other, one is {kind}, which hangs on those below it"
            raise InputError(f"{each.folder}: {what}; merge them one after the other")


def base_name(param: str) -> str:
    """The name that a parameter has without adapters."""
    parts = param.split(".")
    return ".".join(part for part in parts if part not in BETWEEN)


def _turned(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.T.shape and torch.equal(one, other.T)


def _config(folder: Path) -> LoraConfig:
    if not (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: no adapter (it has no adapter_config.json)")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: its adapter_config.json cannot be read: {error}") from None
    if not isinstance(config, LoraConfig):
        raise InputError(f"{folder}: a {config.peft_type} adapter, which is not merged here; LoRA is")
    if set_ := [name for name in UNMERGEABLE if getattr(config, name, None)]:
        raise InputError(f"{folder}: an adapter with {set_[0]} cannot be merged: it does not change weights alone")
    began = str(config.init_lora_weights).lower()
    if began.startswith(CHANGE_THE_BASE):
        mend = "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain one of it"
        raise InputError(f"{folder}: begun with init_lora_weights={began}, which changes the base, too; {mend}")
    config.init_lora_weights = True  # nothing is drawn here
    config.inference_mode = True
    return config


def _scale(adapted: PeftModel, name: str, scale: float) -> None:
    for module in adapted.modules() if scale != 1.0 else ():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.scaling[name] *= scale


def _make_leaves(adapted: PeftModel) -> None:
    """Of an adapter that is tied to another, PEFT makes views, which cannot be copied."""
    for module in adapted.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if not param.is_leaf:
                setattr(module, name, nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False))


def _saved_names(adapted: PeftModel, adapter: str, names: Sequence[str]) -> dict[str, str]:
    """The parameter for each name that an adapter file has."""
    places = {name: torch.tensor(at) for at, name in enumerate(names)}
    saved = get_peft_model_state_dict(adapted, places, adapter, save_embedding_layers=False)
    return {key: names[int(at)] for key, at in saved.items()}


def _reader(file: Folder, key: str) -> Read:
    return lambda _: file.read(key)


def _converted(adapted: PeftModel, name: str, config: LoraConfig, file: Folder) -> dict[str, Read]:
    """An adapter of an earlier transformers, which had other modules: as PEFT converts it."""
    state = convert_peft_adapter_state_dict_for_transformers(
        model=adapted,
        peft_config=config,
        adapter_state_dict={key: file.read(key) for key in file.tensors},
        adapter_name=name,
    )
    return {key: (lambda _, tensor=tensor: tensor) for key, tensor in state.items()}  # type: ignore[misc]
