"""Tasks that train on a `keras.utils.PyDataset`, which KerasHub's refuse."""

import keras


class TakesPyDatasets:
    """A task whose `fit`, `evaluate` and `predict` take a `PyDataset`.

    KerasHub maps a preprocessor over `tf.data` and grain alone. The batches of a
    `PyDataset` are ready for the model, so this wants `preprocessor=None`.
    """

    def fit(self, x=None, *args, **kwargs):
        trainer = self._trainer(x, kwargs.get("validation_data"))
        return trainer.fit(x, *args, **kwargs)

    def evaluate(self, x=None, *args, **kwargs):
        return self._trainer(x).evaluate(x, *args, **kwargs)

    def predict(self, x=None, *args, **kwargs):
        return self._trainer(x).predict(x, *args, **kwargs)

    def _trainer(self, *data):
        """This task as Keras sees it where data are batches, else as KerasHub does."""
        if not any(isinstance(d, keras.utils.PyDataset) for d in data):
            return super()
        if self.preprocessor is not None:
            raise ValueError(
                "A `PyDataset` gives batches that are ready for the model: set "
                "`preprocessor=None` to train on one. Received: "
                f"preprocessor={self.preprocessor}"
            )
        return super(keras.Model, self)
