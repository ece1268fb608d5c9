"""Training: optax's optimizers, a jitted and sharded step, a fit loop that resumes bit for bit."""

from jaxcompress.train import augment as augment
from jaxcompress.train import metrics as metrics
from jaxcompress.train._checkpoint import Checkpoints as Checkpoints
from jaxcompress.train._checkpoint import restore as restore
from jaxcompress.train._data import Batches as Batches
from jaxcompress.train._data import Data as Data
from jaxcompress.train._evaluate import evaluate as evaluate
from jaxcompress.train._fit import fit as fit
from jaxcompress.train._ledger import EarlyStopping as EarlyStopping
from jaxcompress.train._log import Row as Row
from jaxcompress.train._optimizer import optimizer as optimizer
from jaxcompress.train._precision import Precision as Precision
from jaxcompress.train._sharding import shard as shard
from jaxcompress.train._state import State as State
from jaxcompress.train._state import init as init
from jaxcompress.train._step import Aux as Aux
from jaxcompress.train._step import Step as Step
from jaxcompress.train._step import make_step as make_step
from jaxcompress.train._trainable import default_trainable as default_trainable
