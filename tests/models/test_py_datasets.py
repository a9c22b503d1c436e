import keras
import numpy as np
import pytest

from tests.models.small_models import full, random_ids, small_causal_lm


class Batches(keras.utils.PyDataset):
    """Twelve sequences in three batches."""

    def __init__(self):
        super().__init__()
        self.ids = random_ids(12, 7)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        ids = self.ids[4 * index : 4 * index + 4]
        return full(ids[:, :-1]), ids[:, 1:]


def model():
    keras.utils.set_random_seed(0)
    dense = dict(num_layers=1, num_experts=0, num_shared_experts=0)
    causal_lm = small_causal_lm(**dense)
    causal_lm.compile(keras.optimizers.SGD(0.1))
    return causal_lm


def test_they_give_what_their_arrays_give():
    data, causal_lm, twin = Batches(), model(), model()
    arrays = full(data.ids[:, :-1]), data.ids[:, 1:]
    histories = [
        causal_lm.fit(data, epochs=2, shuffle=False, validation_data=data, verbose=0),
        twin.fit(
            *arrays,
            batch_size=4,
            epochs=2,
            shuffle=False,
            validation_data=arrays,
            verbose=0,
        ),
    ]
    for key, values in histories[1].history.items():
        np.testing.assert_allclose(histories[0].history[key], values, rtol=1e-4)
    np.testing.assert_allclose(
        causal_lm.evaluate(data, verbose=0),
        twin.evaluate(*arrays, batch_size=4, verbose=0),
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        causal_lm.predict(data, verbose=0),
        twin.predict(arrays[0], batch_size=4, verbose=0),
        atol=1e-4,
    )


def test_validation_data_may_be_of_the_other_kind():
    data, causal_lm = Batches(), model()
    arrays = full(data.ids[:, :-1]), data.ids[:, 1:]
    expected = causal_lm.evaluate(*arrays, batch_size=4, verbose=0)[0]
    causal_lm.optimizer.learning_rate = 0.0
    for train, validation in ((arrays, data), ((data,), arrays)):
        history = causal_lm.fit(*train, validation_data=validation, verbose=0).history
        np.testing.assert_allclose(history["val_loss"], [expected], rtol=1e-4)


def test_a_preprocessor_has_nothing_to_do_on_them():
    causal_lm = model()
    causal_lm.preprocessor = lambda x: x
    for method in (causal_lm.fit, causal_lm.evaluate, causal_lm.predict):
        with pytest.raises(ValueError, match="set `preprocessor=None`.*Received"):
            method(Batches())
