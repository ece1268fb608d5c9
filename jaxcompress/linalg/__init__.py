"""Exact selection, the damped Cholesky factor, and the blocked solver of second-order methods."""

from jaxcompress.linalg._cholesky import Damped as Damped
from jaxcompress.linalg._cholesky import damped_cholesky as damped_cholesky
from jaxcompress.linalg._columns import Round as Round
from jaxcompress.linalg._columns import Start as Start
from jaxcompress.linalg._columns import descend_columns as descend_columns
from jaxcompress.linalg._columns import matmul as matmul
from jaxcompress.linalg._columns import solve_columns as solve_columns
from jaxcompress.linalg._columns import vmap_leading as vmap_leading
from jaxcompress.linalg._top_k import common_float as common_float
from jaxcompress.linalg._top_k import top_k_in_groups as top_k_in_groups
from jaxcompress.linalg._top_k import top_k_mask as top_k_mask
from jaxcompress.linalg._top_k import top_k_masks as top_k_masks
from jaxcompress.linalg._top_k import widen as widen
from jaxcompress.linalg._top_k import without_explicit_axes as without_explicit_axes
