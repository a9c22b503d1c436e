"""`python -m keras_moe`, the same as `keras-moe`."""

import sys

from keras_moe.cli import main

sys.exit(main())
