"""Reading a `config.json`: every key is used, known to be harmless, or named."""

import math
import warnings

# Keys that say nothing about what a model computes, or only about its training.
HARMLESS = frozenset(
    """
    _name_or_path _attn_implementation architectures attention_dropout auto_map
    base_model_prefix bos_token_id chunk_size_feed_forward decoder_start_token_id dtype
    eos_token_id finetuning_task id2label initializer_range is_decoder
    is_encoder_decoder keys_to_ignore_at_inference label2id max_length model_type
    output_attentions output_hidden_states output_router_logits pad_token_id
    prefix pretraining_tp problem_type return_dict return_dict_in_generate
    router_aux_loss_coef sep_token_id task_specific_params tokenizer_class torch_dtype
    torchscript transformers_version unk_token_id use_bfloat16 use_cache
    use_return_dict
    """.split()
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "keras_moe>gelu_tanh",
    "gelu_new": "keras_moe>gelu_tanh",
    "relu": "relu",
}
REQUIRED = object()


class ConfigReader:
    """The content of a `config.json`, and which of its keys were read.

    Args:
        config: dict.
        defaults: dict or None: what a key means that is missing. A key that is null
            is not missing.
        aliases: dict or None: other names of keys, and theirs. A key's own name goes
            before them.
    """

    def __init__(self, config, defaults=None, aliases=None):
        self._given = config
        self._defaults = defaults or {}
        self._read = set(aliases or ())
        other_names = {
            key: config[alias]
            for alias, key in (aliases or {}).items()
            if config.get(alias) is not None and config.get(key) is None
        }
        self.config = {**self._defaults, **config, **other_names}

    def get(self, key, default=None):
        """A value as it is; `default` where it is missing or null."""
        self._read.add(key)
        value = self.config.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(
                f"`config.json` must have the key {key!r}. Received: {key}="
                f"{self.config.get(key)!r}"
            )
        return default

    def integer(self, key, default=REQUIRED, minimum=1):
        """An integer of at least `minimum`, or `default`."""
        value = self.get(key, default)
        if value is default:
            return value
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.refuse(key, f"an integer, at least {minimum}")
        return value

    def number(self, key, default=REQUIRED):
        """A finite number as a float, or `default`."""
        value = self.get(key, default)
        if value is default:
            return value
        return as_number(key, value)

    def flag(self, key, default=False):
        """A bool, or `default`; null says no in Transformers, and so not True."""
        value = self.get(key, default)
        null = key in self.config and self.config[key] is None
        is_set = default or self._defaults.get(key)
        if not isinstance(value, bool) or (null and is_set):
            self.refuse(key, "true or false")
        return value

    def activation(self, key="hidden_act", default="silu"):
        """The Keras name of an activation."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.refuse(key, f"one of {', '.join(map(repr, ACTIVATIONS))}")
        return ACTIVATIONS[value]

    def only(self, key, *values):
        """Refuses a key that is there and has none of `values`.

        They compare by type as well: 0 is not False.
        """
        value = self.get(key)
        if value is not None and not any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
            for allowed in values
        ):
            self.refuse(key, f"{' or '.join(map(repr, values)) or 'null'}")

    def harmless(self, *keys):
        """Counts keys as read that change no result."""
        self._read.update(keys)

    def refuse(self, key, expected):
        """Raises for the value of a key."""
        raise ValueError(
            f"`config.json` must have {key!r} as {expected}: nothing else is "
            f"implemented. Received: {key}={self.config.get(key)!r}"
        )

    def finish(self):
        """Warns of keys that nothing has read, as they may change what is computed."""
        left = sorted(set(self._given) - self._read - HARMLESS)
        left = [key for key in left if self._given[key] is not None]
        if left:
            warnings.warn(
                f"`config.json` has keys that are not known and were ignored: "
                f"{', '.join(f'{key}={self._given[key]!r}' for key in left)}",
                stacklevel=2,
            )


def as_number(key, value):
    """`value` as a float, where it is a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        value_ok = False
    else:
        value_ok = math.isfinite(value)
    if not value_ok:
        raise ValueError(
            f"`config.json` must have {key!r} as a finite number. "
            f"Received: {key}={value!r}"
        )
    return float(value)
