"""How backbones and tasks come from presets and checkpoints, and go to Transformers."""

import warnings

from keras_moe import architecture, checkpoints
from keras_moe.layers.initializers import skipped
from keras_moe.models import presets
from keras_moe.models._keras_hub import (
    Replicable,
    classproperty,
    is_orbax_checkpoint,
)
from keras_moe.models.one_process import OneProcess, check_one_process


class Pretrained(OneProcess, Replicable):
    """What backbones and tasks have in common."""

    @classproperty
    def presets(cls):
        """A dict of its presets by name: family, paper, licence, checkpoint."""
        backbone_cls = getattr(cls, "backbone_cls", cls)
        classes = [c.__name__ for c in backbone_cls.__mro__]
        return {name: presets.describe(name) for name in presets.names(*classes)}

    def load_weights(self, filepath, *args, **kwargs):
        """As Keras's, and what `keras.callbacks.OrbaxCheckpoint` wrote, on any mesh.

        Such a checkpoint sets the weights and, where the model is compiled, the state
        of its optimizer, so that `fit` goes on. See
        `keras_moe.distribution.training_checkpoints.restore`.

        Args:
            filepath: path of a file, or of the callback's folder: then of its latest
                step; or of one of its steps.
            *args: as for Keras's `load_weights`.
            **kwargs: as there.

        Raises:
            ValueError: for a folder with no whole checkpoint, or with one of another
                model or optimizer. Nothing has been changed then.
        """
        if is_orbax_checkpoint(filepath):
            if args or any(kwargs.values()):
                raise ValueError(
                    "The checkpoint of a training must fit the model, and takes no "
                    f"further arguments. Received: {args}, {kwargs}"
                )
            from keras_moe.distribution.training_checkpoints import restore

            restore(self, filepath)
        else:
            super().load_weights(filepath, *args, **kwargs)

    def set_state_tree(self, state_tree):
        """As Keras's, whatever the numbers in names of optimizers and random seeds."""
        from keras_moe.distribution.training_checkpoints import assign

        assign(self, state_tree)

    def export_to_transformers(
        self, path, dtype=None, max_shard_size="5GB", overwrite=False
    ):
        """Writes a folder for Transformers: see `checkpoints.export_to_transformers`.

        Args:
            path: path of the folder to make.
            dtype: `"float32"`, `"bfloat16"`, `"float16"`, or None for the weights'.
            max_shard_size: int, in bytes, or str such as `"5GB"`.
            overwrite: bool, whether a folder that exists is replaced.
        """
        check_one_process("export_to_transformers")
        checkpoints.export_to_transformers(self, path, dtype, max_shard_size, overwrite)


class PretrainedBackbone(Pretrained):
    """A backbone that is built from presets and checkpoints."""

    @classmethod
    def from_preset(
        cls,
        preset,
        load_weights=True,
        revision=None,
        token=None,
        verbose=None,
        **kwargs,
    ):
        """Builds a backbone from a preset, or from a checkpoint of Transformers.

        Args:
            preset: str: the name of a preset (see `MoEBackbone.presets`), a local
                folder, or a handle as KerasHub accepts them. A folder or a
                repository `"hf://user/model"` may also hold a checkpoint of
                Transformers (`config.json` and safetensors), and a preset may
                have its weights in such a repository: they are fetched.
            load_weights: bool, False for random weights.
            revision: str or None: a branch, tag or commit of the repository, which
                `"hf://user/model@revision"` may name as well.
            token: str or None: who asks the hub; None for the token that is logged
                in or in `HF_TOKEN`.
            verbose: bool or None: a progress bar as a checkpoint is converted; None
                shows one in a terminal.
            **kwargs: settings to override, such as `dtype`, `num_layers` or
                `dropout`. With weights, those that change none of them.

        Raises:
            ValueError: for an unknown preset, weights that do not exist or fit,
                broken JSON or files, and a checkpoint of a model that the layers
                do not compute.
            FileNotFoundError: for a folder in which a file is missing.
            MemoryError: for a checkpoint that there is no room for.
            PermissionError: for a repository that the token may not read.
            ConnectionError: where the hub cannot be reached.
        """
        folder = presets.preset_folder(
            preset, load_weights, revision, token, overrides=kwargs
        )
        if presets.is_checkpoint(folder):
            kwargs = {**presets.training_settings(preset), **kwargs}
            return checkpoints.load_backbone(
                cls, folder, load_weights, verbose=verbose, **kwargs
            )
        if not load_weights:
            return super().from_preset(folder, load_weights=False, **kwargs)
        with skipped():
            backbone = super().from_preset(folder, **kwargs)
        presets.check_weights(folder, backbone)
        return backbone


class PretrainedTask(Pretrained):
    """A task whose backbone and preprocessor are built from presets.

    Attributes:
        checkpoint_extras: dict or None: what the checkpoint of Transformers that it
            was loaded from says beyond model and tokenizer, by file. It has no effect
            here; saving keeps it, and an export gives it back.
    """

    checkpoint_extras = None

    def get_config(self):
        config = super().get_config()
        if self.checkpoint_extras:
            config["checkpoint_extras"] = self.checkpoint_extras
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        extras = config.pop("checkpoint_extras", None)
        task = super().from_config(config)
        task.checkpoint_extras = extras
        return task

    @classmethod
    def from_preset(
        cls,
        preset,
        load_weights=True,
        revision=None,
        token=None,
        verbose=None,
        **kwargs,
    ):
        """Builds a task from a preset, or from a checkpoint of Transformers.

        Args:
            preset: as for `MoEBackbone.from_preset`.
            load_weights: bool, as there.
            revision: str or None, as there.
            token: str or None, as there.
            verbose: bool or None, as there.
            **kwargs: settings of the backbone to override, as there, and
                arguments of this class. Without `preprocessor` the preset's own
                is loaded, and a preset without a tokenizer has none. Nor has a
                checkpoint of Transformers whose tokenizer cannot be read or names
                no end token: a warning says why.

        Raises:
            ValueError: as there.
        """
        trained = presets.training_settings(preset)
        names = ("dtype", *architecture.names(cls.backbone_cls))
        settings = {name: kwargs.pop(name) for name in names if name in kwargs}
        preset = presets.preset_folder(
            preset, load_weights, revision, token, overrides=settings
        )
        if "backbone" not in kwargs:
            if presets.is_checkpoint(preset):
                settings = {**trained, **settings}
            kwargs["backbone"] = cls.backbone_cls.from_preset(
                preset, load_weights=load_weights, verbose=verbose, **settings
            )
        elif settings:
            raise ValueError(
                "`backbone` cannot be given together with settings of a backbone. "
                f"Received: backbone and {', '.join(settings)}"
            )
        own_tokenizer = "preprocessor" not in kwargs
        if own_tokenizer and presets.has_tokenizer(preset):
            kwargs["preprocessor"] = _preprocessor(cls.preprocessor_cls, preset)
        task = cls(**kwargs)
        own_tokenizer = own_tokenizer and task.preprocessor is not None
        task.checkpoint_extras = presets.checkpoint_extras(preset, own_tokenizer)
        return task


def _preprocessor(preprocessor_cls, preset):
    """A preset's preprocessor, None for a checkpoint's that cannot be made."""
    try:
        return preprocessor_cls.from_preset(preset)
    except ValueError as error:
        if not presets.is_checkpoint(preset):
            raise
        warnings.warn(
            "The checkpoint is loaded without a preprocessor, and so works on token "
            f"ids: {error}",
            stacklevel=3,
        )
        return None
