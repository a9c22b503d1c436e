"""What `keras.ops` lacks, one public function each, on every backend."""

from keras_moe.ops.assign_parts import assign_parts, unwritten_zeros
from keras_moe.ops.grouped_apply import Stage, formulation, grouped_apply
from keras_moe.ops.grouped_matmul import grouped_matmul
from keras_moe.ops.inverse_permutation import inverse_permutation
from keras_moe.ops.sum_over_replicas import sum_over_replicas
from keras_moe.ops.top_k import top_k

__all__ = [
    "Stage",
    "assign_parts",
    "formulation",
    "grouped_apply",
    "grouped_matmul",
    "inverse_permutation",
    "sum_over_replicas",
    "top_k",
    "unwritten_zeros",
]
