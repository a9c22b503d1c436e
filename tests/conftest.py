"""Settings every test shares."""

import os

# Read once, when a backend is first imported, so they are set before that.
for _variable in (
    "OMP_NUM_THREADS",  # torch and NumPy
    "PJRT_NPROC",  # JAX
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
):
    os.environ.setdefault(_variable, "2")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# For tests/distribution; without a distribution the first device is used alone.
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}"

import keras  # noqa: E402
import pytest  # noqa: E402

if keras.config.backend() == "tensorflow":
    import tensorflow as tf

    # Two, for tests/distribution, before TensorFlow looks for its devices.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )


@pytest.fixture(autouse=True)
def _fixed_seed():
    keras.utils.set_random_seed(1991)
