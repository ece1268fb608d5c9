"""Physical shrinking: channels, heads, widths and layers removed, with a certificate."""

from typing import TYPE_CHECKING

from jaxcompress import lazy
from jaxcompress.budget import Bytes as Bytes
from jaxcompress.budget import Flops as Flops
from jaxcompress.budget import Params as Params
from jaxcompress.budget import Seconds as Seconds
from jaxcompress.structured._batch_norm import reestimate as reestimate
from jaxcompress.structured._certificate import Certificate as Certificate
from jaxcompress.structured._certificate import Distance as Distance
from jaxcompress.structured._certificate import Distances as Distances
from jaxcompress.structured._certificate import Leak as Leak
from jaxcompress.structured._certificate import Size as Size
from jaxcompress.structured._choose import choose as choose
from jaxcompress.structured._find import groups as groups
from jaxcompress.structured._groups import Group as Group
from jaxcompress.structured._groups import Groups as Groups
from jaxcompress.structured._groups import Member as Member
from jaxcompress.structured._keep import Keep as Keep
from jaxcompress.structured._keep import keep as keep
from jaxcompress.structured._shrink import mask_params as mask_params
from jaxcompress.structured._shrink import rebuild as rebuild
from jaxcompress.structured._shrink import shrink as shrink
from jaxcompress.structured._shrink import slice_params as slice_params
from jaxcompress.structured._widths import Width as Width
from jaxcompress.structured._widths import Widths as Widths
from jaxcompress.structured._widths import widths as widths
from jaxcompress.structured.depth._blocks import Block as Block
from jaxcompress.structured.depth._blocks import Blocks as Blocks
from jaxcompress.structured.depth._blocks import Layer as Layer
from jaxcompress.structured.depth._blocks import blocks as blocks
from jaxcompress.structured.depth._choose_layers import choose_layers as choose_layers
from jaxcompress.structured.depth._drop import drop_layers as drop_layers
from jaxcompress.structured.depth._drop import rebuild_layers as rebuild_layers
from jaxcompress.structured.depth._dropped import Dropped as Dropped
from jaxcompress.structured.depth._influence import block_influence as block_influence
from jaxcompress.structured.depth._influence import influence as influence
from jaxcompress.structured.depth._influence import loss_change as loss_change
from jaxcompress.structured.importance._activation_norm import ActivationNorm as ActivationNorm
from jaxcompress.structured.importance._fisher import Fisher as Fisher
from jaxcompress.structured.importance._fpgm import FPGM as FPGM
from jaxcompress.structured.importance._importance import Normalize as Normalize
from jaxcompress.structured.importance._importance import Reduce as Reduce
from jaxcompress.structured.importance._importance import importance as importance
from jaxcompress.structured.importance._lamp import LAMP as LAMP
from jaxcompress.structured.importance._magnitude import Magnitude as Magnitude
from jaxcompress.structured.importance._method import Given as Given
from jaxcompress.structured.importance._method import Method as Method
from jaxcompress.structured.importance._obd import OBD as OBD
from jaxcompress.structured.importance._random import Random as Random
from jaxcompress.structured.importance._taylor import Taylor as Taylor
from jaxcompress.structured.importance._wanda import Wanda as Wanda
from jaxcompress.structured.regularize._scales import BatchNormScale as BatchNormScale
from jaxcompress.structured.regularize._scales import scales as scales

if TYPE_CHECKING:  # what builds on optax or Flax
    from jaxcompress.structured._state import StateReport as StateReport
    from jaxcompress.structured._state import shrink_state as shrink_state
    from jaxcompress.structured.depth._gate import gate as gate
    from jaxcompress.structured.depth._gate import gate_scores as gate_scores
    from jaxcompress.structured.depth._gate import sparse_gates as sparse_gates
    from jaxcompress.structured.module import Rebuilt as Rebuilt
    from jaxcompress.structured.module import to_module as to_module
    from jaxcompress.structured.regularize._group_lasso import group_lasso as group_lasso
    from jaxcompress.structured.regularize._growing import (
        growing_regularization as growing_regularization,
    )
    from jaxcompress.structured.regularize._scale_l1 import scale_l1 as scale_l1
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        names={
            "depth._gate": ["gate", "gate_scores", "sparse_gates"],
            "regularize._group_lasso": ["group_lasso"],
            "regularize._growing": ["growing_regularization"],
            "regularize._scale_l1": ["scale_l1"],
            "_state": ["StateReport", "shrink_state"],
            "module": ["Rebuilt", "to_module"],
        },
    )
