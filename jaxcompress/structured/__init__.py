"""Physical shrinking: channels, heads, widths and layers removed, with a certificate."""

from typing import TYPE_CHECKING

from jaxcompress import lazy
from jaxcompress.budget import Bytes as Bytes
from jaxcompress.budget import Flops as Flops
from jaxcompress.budget import Params as Params
from jaxcompress.budget import Seconds as Seconds
from jaxcompress.structured._activation_norm import ActivationNorm as ActivationNorm
from jaxcompress.structured._batch_norm import reestimate as reestimate
from jaxcompress.structured._blocks import Block as Block
from jaxcompress.structured._blocks import Blocks as Blocks
from jaxcompress.structured._blocks import Layer as Layer
from jaxcompress.structured._blocks import blocks as blocks
from jaxcompress.structured._certificate import Certificate as Certificate
from jaxcompress.structured._certificate import Distance as Distance
from jaxcompress.structured._certificate import Distances as Distances
from jaxcompress.structured._certificate import Leak as Leak
from jaxcompress.structured._certificate import Size as Size
from jaxcompress.structured._choose import choose as choose
from jaxcompress.structured._choose_layers import choose_layers as choose_layers
from jaxcompress.structured._depth import drop_layers as drop_layers
from jaxcompress.structured._depth import rebuild_layers as rebuild_layers
from jaxcompress.structured._dropped import Dropped as Dropped
from jaxcompress.structured._find import groups as groups
from jaxcompress.structured._fisher import Fisher as Fisher
from jaxcompress.structured._fpgm import FPGM as FPGM
from jaxcompress.structured._groups import Group as Group
from jaxcompress.structured._groups import Groups as Groups
from jaxcompress.structured._groups import Member as Member
from jaxcompress.structured._importance import Normalize as Normalize
from jaxcompress.structured._importance import Reduce as Reduce
from jaxcompress.structured._importance import importance as importance
from jaxcompress.structured._influence import block_influence as block_influence
from jaxcompress.structured._influence import influence as influence
from jaxcompress.structured._influence import loss_change as loss_change
from jaxcompress.structured._keep import Keep as Keep
from jaxcompress.structured._keep import keep as keep
from jaxcompress.structured._lamp import LAMP as LAMP
from jaxcompress.structured._magnitude import Magnitude as Magnitude
from jaxcompress.structured._method import Given as Given
from jaxcompress.structured._method import Method as Method
from jaxcompress.structured._obd import OBD as OBD
from jaxcompress.structured._random import Random as Random
from jaxcompress.structured._scales import BatchNormScale as BatchNormScale
from jaxcompress.structured._scales import scales as scales
from jaxcompress.structured._shrink import mask_params as mask_params
from jaxcompress.structured._shrink import rebuild as rebuild
from jaxcompress.structured._shrink import shrink as shrink
from jaxcompress.structured._shrink import slice_params as slice_params
from jaxcompress.structured._taylor import Taylor as Taylor
from jaxcompress.structured._wanda import Wanda as Wanda
from jaxcompress.structured._widths import Width as Width
from jaxcompress.structured._widths import Widths as Widths
from jaxcompress.structured._widths import widths as widths

if TYPE_CHECKING:  # what builds on optax or Flax
    from jaxcompress.structured._gate import SparseGatesState as SparseGatesState
    from jaxcompress.structured._gate import gate as gate
    from jaxcompress.structured._gate import gate_scores as gate_scores
    from jaxcompress.structured._gate import sparse_gates as sparse_gates
    from jaxcompress.structured._group_lasso import GroupLassoState as GroupLassoState
    from jaxcompress.structured._group_lasso import group_lasso as group_lasso
    from jaxcompress.structured._growing import GrowingState as GrowingState
    from jaxcompress.structured._growing import growing_regularization as growing_regularization
    from jaxcompress.structured._scale_l1 import ScaleL1State as ScaleL1State
    from jaxcompress.structured._scale_l1 import scale_l1 as scale_l1
    from jaxcompress.structured._state import StateReport as StateReport
    from jaxcompress.structured._state import shrink_state as shrink_state
    from jaxcompress.structured.module import Rebuilt as Rebuilt
    from jaxcompress.structured.module import to_module as to_module
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        names={
            "_gate": ["SparseGatesState", "gate", "gate_scores", "sparse_gates"],
            "_group_lasso": ["GroupLassoState", "group_lasso"],
            "_growing": ["GrowingState", "growing_regularization"],
            "_scale_l1": ["ScaleL1State", "scale_l1"],
            "_state": ["StateReport", "shrink_state"],
            "module": ["Rebuilt", "to_module"],
        },
    )
