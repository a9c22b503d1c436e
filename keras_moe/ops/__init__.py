"""What `keras.ops` lacks, one public function each, on every backend."""

from keras_moe.ops.grouped_matmul import grouped_matmul
from keras_moe.ops.top_k import top_k

__all__ = ["grouped_matmul", "top_k"]
