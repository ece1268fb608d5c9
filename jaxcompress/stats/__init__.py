"""Streaming statistics of activations and gradients, at the sites of any function.

A `Statistic` is three pure functions in the manner of optax, `(init, update, finalize)`, over 2-D
arrays `(tokens, features)`; `collect` streams batches through a function and gathers statistics
wherever it contracts its params. What holds for all of them:

- Accumulation is in float32, whatever the dtype of the activations; tokens and entries are
  counted exactly, to 2**64.
- Results do not depend on how the rows were cut into batches, up to rounding (moving averages,
  which weigh batches by age, excepted).
- NaN and infinity are not hidden: they show in the result (a histogram leaves them out), and
  `collect` refuses them by the name of the site.
"""

from jaxcompress.stats._by_matrix import by_matrix as by_matrix
from jaxcompress.stats._by_matrix import merge_results as merge_results
from jaxcompress.stats._by_matrix import place_leading as place_leading
from jaxcompress.stats._collect import Collected as Collected
from jaxcompress.stats._collect import collect as collect
from jaxcompress.stats._gradients import Fisher as Fisher
from jaxcompress.stats._gradients import GradientActivation as GradientActivation
from jaxcompress.stats._gradients import Kronecker as Kronecker
from jaxcompress.stats._gradients import channel_fisher as channel_fisher
from jaxcompress.stats._gradients import fisher as fisher
from jaxcompress.stats._gradients import gradient_activation as gradient_activation
from jaxcompress.stats._gradients import kronecker as kronecker
from jaxcompress.stats._histogram import Histogram as Histogram
from jaxcompress.stats._histogram import histogram as histogram
from jaxcompress.stats._lookups import Lookups as Lookups
from jaxcompress.stats._lookups import lookups as lookups
from jaxcompress.stats._moments import ChannelNorm as ChannelNorm
from jaxcompress.stats._moments import MeanCovariance as MeanCovariance
from jaxcompress.stats._moments import SecondMoment as SecondMoment
from jaxcompress.stats._moments import channel_norm as channel_norm
from jaxcompress.stats._moments import mean_covariance as mean_covariance
from jaxcompress.stats._moments import second_moment as second_moment
from jaxcompress.stats._ranges import MinMax as MinMax
from jaxcompress.stats._ranges import MovingAverage as MovingAverage
from jaxcompress.stats._ranges import absmax as absmax
from jaxcompress.stats._ranges import min_max as min_max
from jaxcompress.stats._ranges import moving_average as moving_average
from jaxcompress.stats._sequential import Stop as Stop
from jaxcompress.stats._sequential import sequential as sequential
from jaxcompress.stats._statistic import Statistic as Statistic
from jaxcompress.stats._step import sum_outputs as sum_outputs
