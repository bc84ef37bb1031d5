"""What a model is made of, read from its config.json alone: which linears, and how many weights besides.

A decoder of equal layers is meant. Where the file does not tell (an unknown family, layers of unlike kind, keys left to
the defaults of a library), the answer is that it is not known, and why: no figure is better than a wrong one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from phased_cpt.estimate.flops import LINEARS, ModelShape, shape_of

# Families whose head is the embedding unless their config says otherwise.
TIED = ("gemma", "gemma2", "gemma3_text", "gpt2", "smollm3", "starcoder2")
# Norms of a layer, each as wide as the model; two where nothing is said.
NORMS = {"gemma2": 4, "gemma3_text": 4, "glm4": 4, "olmo": 0}
# Families that norm q and k, each head on its own.
QK_NORMS = ("gemma3_text", "qwen3", "qwen3_moe")
# Families that norm the whole width of q and of k.
WIDE_QK_NORMS = ("olmo2", "olmo3")
WITHOUT_BIAS = ("ministral3", "mistral", "mixtral", "phi3")  # whatever attention_bias says
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class UnknownShapeError(ValueError):
    """What a config.json does not tell."""


@dataclass(frozen=True)
class Linear:
    """A linear of every layer: what adapters sit on, and what 4 bits are for."""

    name: str
    wide: int  # numbers that go in
    high: int  # and that come out

    @property
    def weights(self) -> int:
        return self.wide * self.high


@dataclass(frozen=True)
class Architecture:
    """A decoder, by its numbers."""

    family: str
    layers: int
    hidden: int
    inner: int  # width of the feed-forward that one token goes through, of all its experts together
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    linears: tuple[Linear, ...]  # of a layer
    loose: int  # weights of a layer that are in none of them: norms, biases, experts
    around: int  # weights outside of the layers, without a head of their own
    tied: bool  # the head is the embedding
    gated: bool = True  # the feed-forward has a gate beside what it lets through
    rms_norm: bool = True  # which computes in fp32, whatever the weights are
    qk_norm: bool = False

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def in_linears(self) -> int:
        """Of all layers."""
        return self.layers * sum(each.weights for each in self.linears)

    @property
    def layer(self) -> int:
        return sum(each.weights for each in self.linears) + self.loose

    @property
    def weights(self) -> int:
        return self.layers * self.layer + self.around + (0 if self.tied else self.head)

    @property
    def largest(self) -> int:
        """Of one tensor."""
        return max(self.head, *(each.weights for each in self.linears))

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def adapted(self, targets: Collection[str]) -> tuple[Linear, ...]:
        """The linears of a layer that PEFT finds by these names: `q_proj`, and `self_attn.q_proj` too."""
        if targets == "auto":
            return self.linears
        names = {target.rpartition(".")[2] for target in targets}
        return tuple(each for each in self.linears if each.name in names)

    def adapter(self, r: int, targets: Collection[str], *, dora: bool = False) -> int:
        """The weights of an adapter: a linear in → out gets in → r → out, and of DoRA a number for each row."""
        found = self.adapted(targets)
        return self.layers * sum(r * (each.wide + each.high) + each.high * dora for each in found)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Of a config.json; UnknownShapeError, with the reason, where it does not tell."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        what = f"a {config.get('model_type')} sees images or hears as well"
        raise UnknownShapeError(f"{what}, and the weights of that part are not in the keys that are read")
    for key in _NUMBERS:
        if not isinstance(config.get(key, 0) or 0, int):
            raise UnknownShapeError(f"{key} is {config[key]!r}, and a number is needed")
    family = config.get("model_type")
    if family == "gpt2":
        return _gpt2(config)
    if family in EXPERTS:
        return _of_experts(config)
    if family not in LINEARS:
        raise UnknownShapeError(f"model_type {family!r} is none of {', '.join([*LINEARS, 'gpt2', *EXPERTS])}")
    shape = shape_of({**config, "sliding_window": None})  # which is for the cost of attention alone
    if shape is None:
        raise UnknownShapeError(_left_out(config, "num_hidden_layers", "hidden_size", "intermediate_size", *_ALWAYS))
    return _decoder(config, shape)


_ALWAYS = ("num_attention_heads", "vocab_size")
_NUMBERS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "head_dim", *_ALWAYS),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
    *("shared_expert_intermediate_size", "n_layer", "n_embd", "n_head", "n_inner", "n_positions"),
)


def _left_out(config: Mapping[str, Any], *keys: str) -> str:
    missing = [key for key in keys if not config.get(key)]
    return f"config.json leaves {', '.join(missing)} to the defaults of transformers; write it there"


def _decoder(config: Mapping[str, Any], shape: ModelShape) -> Architecture:
    family = str(config["model_type"])
    linears = tuple(Linear(name, *shape.sides(name)) for name in shape.linears)
    norms, over_heads = _norms(family, shape)
    last = 0 if family == "olmo" else shape.hidden
    return Architecture(
        family=family,
        layers=shape.layers,
        hidden=shape.hidden,
        inner=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocabulary=shape.vocabulary,
        linears=linears,
        loose=norms + _biases(config, linears),
        around=shape.hidden * shape.vocabulary + (2 * last if family == "starcoder2" else last),
        tied=_tied(config),
        gated="c_fc" not in shape.linears,
        rms_norm=family not in ("olmo", "starcoder2"),
        qk_norm=over_heads,
    )


def _norms(family: str, shape: ModelShape) -> tuple[int, bool]:
    """The weights of the norms of a layer, and whether there are any over q and k."""
    wide = NORMS.get(family, 2) * shape.hidden * (2 if family == "starcoder2" else 1)  # which has a bias in each
    if family in QK_NORMS:
        return wide + 2 * shape.head_dim, True
    if family in WIDE_QK_NORMS:
        return wide + shape.attention_width + shape.kv_heads * shape.head_dim, True
    return wide, False


def _biases(config: Mapping[str, Any], linears: tuple[Linear, ...]) -> int:
    family = config["model_type"]
    if family in ("qwen2", "qwen2_moe"):
        named = {"q_proj", "k_proj", "v_proj"} if config.get("qkv_bias", True) else set()
    elif family == "starcoder2":
        named = {each.name for each in linears} if config.get("use_bias", True) else set()
    else:
        usual = family in ("glm", "glm4", "seed_oss")
        in_use = config.get("attention_bias", usual) and family not in WITHOUT_BIAS
        named = {"q_proj", "k_proj", "v_proj"} if in_use else set()
        out = config.get("attention_out_bias", False) if family == "seed_oss" else in_use
        named |= {"o_proj"} if out and family not in ("glm", "glm4") else set()
        named |= {"gate_proj", "up_proj", "down_proj"} if config.get("mlp_bias") else set()
    return sum(each.high for each in linears if each.name in named)


def _tied(config: Mapping[str, Any]) -> bool:
    said = config.get("tie_word_embeddings")
    return config["model_type"] in TIED if said is None else bool(said)


def _of_experts(config: Mapping[str, Any]) -> Architecture:
    """Mixtral and Qwen's mixtures: the experts of a layer are two tensors, which are no linears.

    So adapters on linears do not reach them, and 4 bits leave them as they are.
    """
    family = str(config["model_type"])
    size = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    count = next((config[key] for key in ("num_local_experts", "num_experts") if config.get(key)), None)
    needed = ("num_hidden_layers", "hidden_size", size, "num_experts_per_tok", *_ALWAYS)
    if count is None or not all(config.get(key) for key in needed):
        raise UnknownShapeError(_left_out(config, *needed, *(() if count else ("num_experts",))))
    if config.get("mlp_only_layers") or (config.get("decoder_sparse_step") or 1) != 1:
        raise UnknownShapeError(
            "some of its layers have experts and others none (mlp_only_layers, decoder_sparse_step)"
        )
    hidden, inner, per_token = config["hidden_size"], config[size], config["num_experts_per_tok"]
    shared = config.get("shared_expert_intermediate_size", 0) if family == "qwen2_moe" else 0
    shape = shape_of({**config, "model_type": "mistral", "intermediate_size": inner, "sliding_window": None})
    assert shape is not None
    linears = [Linear(name, *shape.sides(name)) for name in _ATTENTION]
    if shared:
        linears += [Linear("gate_proj", hidden, shared), Linear("up_proj", hidden, shared)]
        linears += [Linear("down_proj", shared, hidden), Linear("shared_expert_gate", hidden, 1)]
    norms, over_heads = _norms(family, shape)
    experts = count * (3 * hidden * inner + hidden)  # and a row of the router for each
    return Architecture(
        family=family,
        layers=shape.layers,
        hidden=hidden,
        inner=per_token * inner + shared,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocabulary=shape.vocabulary,
        linears=tuple(linears),
        loose=experts + norms + _biases(config, tuple(linears)),
        around=hidden * shape.vocabulary + hidden,
        tied=_tied(config),
        qk_norm=over_heads,
    )


def _gpt2(config: Mapping[str, Any]) -> Architecture:
    needed = ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
    if not all(config.get(key) for key in needed):
        raise UnknownShapeError(_left_out(config, *needed))
    hidden, heads = config["n_embd"], config["n_head"]
    inner = config.get("n_inner") or 4 * hidden
    linears = (
        Linear("c_attn", hidden, 3 * hidden),
        Linear("c_proj", hidden, hidden),
        Linear("c_fc", hidden, inner),
        Linear("c_proj", inner, hidden),
    )
    return Architecture(
        family="gpt2",
        layers=config["n_layer"],
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=config["vocab_size"],
        linears=linears,
        loose=4 * hidden + sum(each.high for each in linears),
        around=hidden * (config["vocab_size"] + config["n_positions"]) + 2 * hidden,
        tied=_tied(config),
        gated=False,
        rms_norm=False,
    )
