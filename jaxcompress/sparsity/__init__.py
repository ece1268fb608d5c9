"""Pruning: scores, patterns, masks, schedules, and sparse training as an optax transformation."""

from typing import TYPE_CHECKING

from jaxcompress import lazy
from jaxcompress.sparsity import schedules as schedules
from jaxcompress.sparsity._apply import Sparsity as Sparsity
from jaxcompress.sparsity._apply import apply as apply
from jaxcompress.sparsity._apply import sparsity_of as sparsity_of
from jaxcompress.sparsity._masks import coverage as coverage
from jaxcompress.sparsity._masks import make_mask as make_mask
from jaxcompress.sparsity._patterns import NM as NM
from jaxcompress.sparsity._patterns import Block as Block
from jaxcompress.sparsity._patterns import Channel as Channel
from jaxcompress.sparsity._patterns import Pattern as Pattern
from jaxcompress.sparsity._patterns import Unstructured as Unstructured
from jaxcompress.sparsity._scores import Score as Score
from jaxcompress.sparsity._scores import fisher as fisher
from jaxcompress.sparsity._scores import init_scores as init_scores
from jaxcompress.sparsity._scores import magnitude as magnitude
from jaxcompress.sparsity._scores import movement as movement
from jaxcompress.sparsity._scores import random as random
from jaxcompress.sparsity._scores import saliency as saliency
from jaxcompress.sparsity._scores import taylor as taylor
from jaxcompress.sparsity._scores import update_scores as update_scores

if TYPE_CHECKING:  # what builds on optax
    from jaxcompress.sparsity._sparsify import SparsifyState as SparsifyState
    from jaxcompress.sparsity._sparsify import check as check
    from jaxcompress.sparsity._sparsify import get_mask as get_mask
    from jaxcompress.sparsity._sparsify import sparsify as sparsify
else:
    __getattr__, __dir__ = lazy.attach(
        __name__, names={"_sparsify": ["SparsifyState", "check", "get_mask", "sparsify"]}
    )
